"""Random changes of the candidates' images before they are evaluated, with the gradient taken through them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .randomness import CandidateStreams

#: random change of one candidate's images, (B, C, H, W) -> (B, C, H', W')
Augmentation = Callable[[torch.Tensor], torch.Tensor]


class AugmentedImages:
    """The `through` of one evaluation (:class:`.evaluation.StackedEvaluation`): images are augmented window by window.

    So augmented images exist for as many candidates as are evaluated at a time. Candidates are augmented one by one,
    because Breaching's augmentations branch on random numbers, and with the numbers that their streams held when this
    evaluation began: windows overlap, and an evaluation is repeated where memory runs out, which must not draw others.

    Args:
        augmentation: the change.
        streams: the candidates' random streams; after the evaluation each has drawn once.
    """

    def __init__(self, augmentation: Augmentation, streams: CandidateStreams) -> None:
        self._augmentation, self._streams = augmentation, streams
        self._before = list(streams.states)

    def __call__(
        self, begin: int, window: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]]:
        """Return a window of stacks, each (n, ...), with augmented images, and what brings its gradients back.

        Args:
            begin: number of the window's first candidate.
            window: the stacks' rows from there on, images first.
        """
        images, *others = window
        leaves = [image.detach().requires_grad_() for image in images]
        augmented = [self._augment(begin + offset, leaf) for offset, leaf in enumerate(leaves)]

        def back(gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            first, *rest = gradients
            return [torch.stack(torch.autograd.grad(augmented, leaves, grad_outputs=list(first))), *rest]

        return [torch.stack([each.detach() for each in augmented]), *others], back

    def _augment(self, index: int, images: torch.Tensor) -> torch.Tensor:
        self._streams.states[index] = self._before[index]
        with self._streams.use(index):
            return self._augmentation(images)
