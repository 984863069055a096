"""Group consistency where nothing fixes the order of a candidate's images, as with labels that are optimised."""

from __future__ import annotations

from typing import Any

import torch

from ..matching.candidate_order import aligned_to
from .group import GroupRegularization


class GroupAnyOrder(GroupRegularization):
    """Group consistency for candidates whose images stand in different orders.

    The consensus stands in the order of the first finite candidate; each candidate is compared with it image by
    image, after matching. Arguments are those of `GroupRegularization`.
    """

    def update(self, candidates: torch.Tensor, iteration: int) -> None:
        """Recompute the consensus if it is due; candidates (N, B, C, H, W)."""
        if len(candidates):
            reference = next((c for c in candidates if bool(c.isfinite().all())), candidates[0])
            ordered = [candidate[aligned_to(reference, candidate)] for candidate in candidates]
            super().update(torch.stack(ordered), iteration)

    def forward(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the term for one candidate (B, C, H, W), a scalar."""
        if self.consensus is None or not self.active:
            return tensor.new_zeros(())
        order = aligned_to(tensor, self.consensus)
        return self.scale * (tensor - self.consensus[order]).square().mean()
