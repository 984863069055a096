"""Candidates whose images stand in different orders: match them before they are compared or averaged.

The averaged gradient of a batch does not depend on the order of its images. Where labels are optimised, nothing
fixes that order, and image 0 of one candidate may be image 5 of another; where they are known, images of one label
have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment

__all__ = ["aligned_to", "aligned_within", "interchangeable"]


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


def interchangeable(labels: torch.Tensor, local_hyperparams: Mapping[str, Any] | None = None) -> torch.Tensor:
    """Return a number for every image, (B,): an update does not say which of two images with one number is which.

    Args:
        labels: (B,). An averaged gradient tells images with different labels apart, no others.
        local_hyperparams: of several local steps (see `client_update`), which tell apart what does not go through the
            same steps with the same labels.
    """
    if local_hyperparams is None:
        return labels
    count, start = len(labels), 0
    seen = [[(-1, label)] for label in labels.tolist()]
    for step in range(local_hyperparams["steps"]):
        block = range(start, min(start + local_hyperparams["data_per_step"], count))
        for place, label in zip(block, local_hyperparams["labels"][step].flatten().tolist(), strict=False):
            seen[place].append((step, label))
        start = (start + local_hyperparams["data_per_step"]) % count
    numbers: dict[tuple[tuple[int, int], ...], int] = {}
    return torch.tensor([numbers.setdefault(tuple(steps), len(numbers)) for steps in seen])
