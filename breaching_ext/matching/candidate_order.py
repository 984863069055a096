"""Candidates whose images stand in different orders: match them before they are compared or averaged.

The averaged gradient of a batch does not depend on the order of its images. Where labels are optimised, nothing
fixes that order, and image 0 of one candidate may be image 5 of another.
"""

from __future__ import annotations

from typing import Any

import torch
from scipy.optimize import linear_sum_assignment

from ..regularizers import GroupRegularization

__all__ = ["GroupAnyOrder", "aligned_to", "aligned_within"]


def aligned_to(reference: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """Order (B,) in which `candidate`'s images are nearest to `reference`'s, both (B, C, H, W).

    The sum of squared distances is minimised over all one-to-one assignments; images that are not finite cost most.
    """
    left, right = (images.detach().flatten(1).cpu().double() for images in (reference, candidate))
    cost = torch.cdist(left, right).square()  # (B, B)
    finite = cost[cost.isfinite()]
    worst = 1.0 + (float(finite.max()) if len(finite) else 0.0)
    _, columns = linear_sum_assignment(cost.nan_to_num(nan=worst, posinf=worst).numpy())
    return torch.as_tensor(columns, device=candidate.device)


def aligned_within(reference: torch.Tensor, candidate: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Order (B,) in which `candidate`'s images are nearest to `reference`'s, changed among images of one label only.

    Args:
        reference, candidate: images (B, C, H, W).
        labels: (B,), which fix the order of images with different labels.
    """
    order = torch.arange(len(labels), device=candidate.device)
    for label in labels.unique():
        places = (labels == label).nonzero()[:, 0].to(candidate.device)
        if len(places) > 1:
            order[places] = places[aligned_to(reference[places], candidate[places])]
    return order


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
