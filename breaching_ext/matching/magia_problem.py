"""What random-subset matching is given: the subset term, and the gradients that are to be matched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.func import functional_call

from .magia_objective import SUBSET_TERMS, rescaling

__all__ = ["SubsetTerm", "Target"]

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class SubsetTerm:
    """Which subset term enters, and how strongly.

    Attributes:
        kind: 'none', 'released', 'mean' or 'residual' (see `magia_objective`).
        alpha: α in [0, 1], the full-batch term's share.
        rescaling: c: 'none', 'ratio', 'variance' or a positive number.

    Raises:
        ValueError: naming the value that cannot work and the valid ones.
    """

    kind: str = "none"
    alpha: float = 0.999
    rescaling: str | float = "none"

    def __post_init__(self) -> None:
        if self.kind not in SUBSET_TERMS:
            raise ValueError(f"subset.term={self.kind!r} is unknown; valid: {', '.join(SUBSET_TERMS)}.")
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"subset.alpha={self.alpha} is out of range; valid: 0 to 1.")
        rescaling(self.rescaling, 1, 1)


@dataclass(frozen=True)
class Target:
    """Shared gradients and the parameters at which they were taken.

    Attributes:
        model: the architecture (its buffers are used as they are; batch norm must be in eval mode).
        loss_fn: (outputs, soft labels) -> mean loss; torch.nn.CrossEntropyLoss takes soft labels.
        parameters: matched parameters by name; with a leading candidate axis if `per_candidate`.
        gradients: the shared gradients in the same order; with that axis if `per_candidate`.
        per_candidate: whether every candidate has a model and a target of its own (a stack of seeds).
        mean, std: normalisation (C,) that turns pixels in [0, 1] into the model's input, or None.
    """

    model: torch.nn.Module
    loss_fn: Loss
    parameters: Mapping[str, torch.Tensor]
    gradients: Sequence[torch.Tensor]
    per_candidate: bool = False
    mean: torch.Tensor | None = None
    std: torch.Tensor | None = None

    def loss(self, parameters: Mapping[str, torch.Tensor], pixels: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
        """Mean loss of images (B, C, H, W) in [0, 1] with soft labels (B, K)."""
        if self.mean is not None and self.std is not None:
            pixels = (pixels - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)
        return self.loss_fn(functional_call(self.model, dict(parameters), (pixels,)), probs)

    def of(self, n: int) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        """Parameters and gradients of one candidate."""
        if not self.per_candidate:
            return dict(self.parameters), list(self.gradients)
        return {k: v[n] for k, v in self.parameters.items()}, [g[n] for g in self.gradients]

    def squared_norm(self, n: int = 0) -> float:
        """‖g*‖² of one candidate's target, in double precision: squares of a small gradient are 0 in single."""
        return sum(float(g.double().square().sum()) for g in self.of(n)[1])
