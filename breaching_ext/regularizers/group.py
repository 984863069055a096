"""Group consistency between jointly optimised candidates (Yin et al., CVPR 2021, "See through gradients").

R_group(x_i) = scale * mean((x_i - E)^2), where E, the consensus, is the mean of the live candidates after aligning
each to their pixel mean (equations 11 and 12 of the paper, with the mean in place of the squared norm so that the
scale does not depend on the image size). E is a constant for the gradient: nothing flows through the other
candidates or through the alignment, so the gradient is exactly 2 * scale * (x_i - E) / x_i.numel().
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ConfigError, unknown
from ..ranks import Ranks
from ..values import is_number
from .aligners import ALIGNERS, align


def registered_consensus(
    candidates: torch.Tensor, aligner: str = "none", ranks: Ranks | None = None
) -> tuple[torch.Tensor, int]:
    """Return the mean of candidates after aligning each image to the candidates' pixel mean.

    Args:
        candidates: (N, B, C, H, W). One that is not finite, or whose squares are not, is left out: it has diverged, its
            next evaluation will say so, and the others must not follow it.
        aligner: a key of :data:`~breaching_ext.regularizers.aligners.ALIGNERS`.
        ranks: the processes over which the mean goes, each with candidates of its own; None: this one.

    Returns:
        The consensus (B, C, H, W), without gradient, and the number of images whose alignment failed and which
        entered the mean as they are.
    """
    candidates, ranks = candidates.detach(), ranks or Ranks()
    mean, everybody = _mean(candidates, ranks)
    if not bool(_sound(mean[None])):  # the mean is the same for all processes
        candidates = candidates[_sound(candidates)]
        mean, everybody = _mean(candidates, ranks)
    if aligner == "none":
        return mean, 0
    total, failures = torch.zeros_like(mean), 0
    for candidate in candidates:
        for index, image in enumerate(candidate):
            aligned, found = align(image, mean[index], aligner)
            total[index] += aligned
            failures += not found
    return ranks.total(total) / max(everybody, 1), failures


def _sound(images: torch.Tensor) -> torch.Tensor:
    """Return which of (N, ...) have finite squares, (N,); those of 16-bit numbers would overflow in their own type."""
    wide = images.float() if images.element_size() == 2 else images
    return wide.flatten(1).square().sum(dim=1).isfinite()


def _mean(candidates: torch.Tensor, ranks: Ranks) -> tuple[torch.Tensor, int]:
    """Return the mean over all processes' candidates, (B, C, H, W), and how many they are."""
    if ranks.size == 1 and len(candidates):
        return candidates.mean(dim=0), len(candidates)
    everybody = ranks.number(len(candidates))
    return ranks.total(candidates.sum(dim=0)) / max(everybody, 1), everybody


class GroupRegularization(torch.nn.Module):
    """Pull every candidate towards the registered mean of all of them.

    Registered with Breaching as `regularization.group_regularization`; the joint attack calls :meth:`update` with
    the live candidates before every step. Outside a joint attack there is no group and the term is 0.

    Args:
        setup: Breaching's dict(device=..., dtype=...).
        scale: weight of the term; 0 switches it off.
        warmup_iters: the term is 0 in iterations 0 ... warmup_iters - 1. Values without it do not compare with those
            with it, so each candidate's best point begins anew where it sets in.
        aligner: none | phase_correlation | ransac | optical_flow | ransac_flow.
        update_every: iterations between two computations of the consensus.

    Raises:
        ConfigError: for an unknown aligner or key, a negative scale or warm-up, or update_every < 1.

    References:
        Yin et al., "See through gradients: Image batch recovery via GradInversion", CVPR 2021, section 3.3.
    """

    def __init__(
        self,
        setup: dict[str, Any],
        scale: float = 0.01,
        warmup_iters: int = 0,
        aligner: str = "none",
        update_every: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if kwargs:
            valid = ("scale", "warmup_iters", "aligner", "update_every")
            raise unknown("regularization.group_regularization key", next(iter(kwargs)), valid)
        if aligner not in ALIGNERS:
            raise unknown("regularization.group_regularization.aligner", aligner, ALIGNERS)
        for key, value, least in (
            ("scale", scale, 0),
            ("warmup_iters", warmup_iters, 0),
            ("update_every", update_every, 1),
        ):
            if not is_number(value) or not value >= least:
                raise ConfigError(
                    f"regularization.group_regularization.{key}={value} is not possible; valid: >= {least}."
                )
            if key != "scale" and not float(value).is_integer():
                raise ConfigError(f"regularization.group_regularization.{key}={value} is not a whole number.")
        self.setup = setup
        self.scale, self.warmup_iters, self.aligner, self.update_every = scale, warmup_iters, aligner, update_every
        self.ranks = Ranks()
        self.initialize([])

    def initialize(self, models: Any, *args: Any, **kwargs: Any) -> None:
        """Forget the last attack's consensus (Breaching calls this at the start of every trial)."""
        self.active = False
        self.consensus: torch.Tensor | None = None
        self._weight: torch.Tensor | None = None
        self.alignment_failures = self.alignments = 0

    def prepare(self, candidates: torch.Tensor) -> None:
        """Allocate for candidates (N, B, C, H, W), so that a compiled evaluation never sees a tensor appear."""
        self.consensus = torch.zeros_like(candidates[0])
        self._weight = candidates.new_zeros(())

    def update(self, candidates: torch.Tensor, iteration: int) -> None:
        """Recompute the consensus if it is due.

        Args:
            candidates: the live candidates (N, B, C, H, W); failed ones are left out by the caller. With several
                processes (`ranks`) each gives its own, and all of them call this together.
            iteration: 0-based outer iteration.
        """
        if iteration < self.warmup_iters or self.ranks.number(len(candidates)) == 0:
            return
        if self.consensus is None or self.consensus.shape != candidates.shape[1:]:
            self.prepare(candidates)
        due = (iteration - self.warmup_iters) % self.update_every == 0
        if due or not self.active:
            assert self.consensus is not None
            assert self._weight is not None
            consensus, failures = registered_consensus(candidates, self.aligner, self.ranks)
            self.consensus.copy_(consensus)
            self._weight.fill_(self.scale)
            self.active = True
            self.alignment_failures += failures
            self.alignments += candidates.shape[0] * candidates.shape[1]

    def state(self) -> dict[str, Any]:
        """Return what the term depends on, for a checkpoint."""
        return {
            "consensus": self.consensus,
            "weight": self._weight,
            "active": self.active,
            "alignments": self.alignments,
            "alignment_failures": self.alignment_failures,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`, in the tensors that exist (see :meth:`prepare`)."""
        assert self.consensus is not None
        assert self._weight is not None
        self.consensus.copy_(state["consensus"])
        self._weight.copy_(state["weight"])
        self.active = state["active"]
        self.alignments, self.alignment_failures = state["alignments"], state["alignment_failures"]

    def forward(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the term for one candidate (B, C, H, W), a scalar."""
        if self.consensus is None or self._weight is None:
            return tensor.new_zeros(())
        return self._weight * (tensor - self.consensus).pow(2).mean()  # the weight is 0 until the warm-up ends

    def __repr__(self) -> str:
        return (
            f"Group consistency, scale={self.scale}, warm-up {self.warmup_iters} iterations, "
            f"aligner {self.aligner} every {self.update_every} iterations"
        )
