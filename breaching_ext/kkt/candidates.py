"""From the restarts of an extraction to images: starts, labels, the choice, and the contrast of what is shown."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .problem import Problem

#: candidates of one restart whose correlation is above this show the same image
DUPLICATE = 0.9


def candidate_labels(count: int, known: Tensor | None = None) -> Tensor:
    """±1 of k candidates, (k,), those with +1 first.

    Args:
        count: k.
        known: ±1 of the images, (n,): their share of +1 is that of the candidates, and no label that occurs is left
            out where there are two candidates. None: half are +1, as in the paper; the odd one is +1.
    """
    positive = (count + 1) // 2
    if known is not None:
        share = float((known > 0).double().mean())
        positive = int(count * share + 0.5)
        if 0 < share < 1 and count > 1:
            positive = min(max(positive, 1), count - 1)
    labels = torch.ones(count)
    labels[positive:] = -1
    return labels


def signs(labels: Sequence[float] | Tensor) -> Tensor | None:
    """Return labels ±1, (k,), from 0 and 1 or from -1 and 1; None where they are neither, or not one-dimensional."""
    try:
        values = torch.as_tensor(labels).detach().cpu().double()
    except (TypeError, ValueError):
        return None
    if values.ndim != 1 or not any(set(values.tolist()) <= pair for pair in ({0.0, 1.0}, {-1.0, 1.0})):
        return None
    return 2 * (values > 0).double() - 1


def draw_starts(
    problem: Problem, count: int, seeds: Sequence[int], scale: float
) -> tuple[Tensor, list[torch.Generator]]:
    """Return normal starts (R, k, ...) and the generators that drew them, one a restart."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    draws = [torch.randn(count, *problem.coordinate_shape, generator=g) for g in generators]
    return (scale * torch.stack(draws)).to(problem.mean), generators


def correlations(left: Tensor, right: Tensor) -> Tensor:
    """Normalised cross-correlation of every pair of images, (p, q).

    Args:
        left: images (p, ...), in practice without the mean image, which would correlate everything.
        right: images (q, ...).
    """
    a, b = (x.detach().cpu().flatten(1).double() for x in (left, right))  # not every device has double precision
    a, b = (x - x.mean(dim=1, keepdim=True) for x in (a, b))
    a, b = (x / x.norm(dim=1, keepdim=True).clamp_min(1e-12) for x in (a, b))
    return a @ b.T


def stretch(images: Tensor) -> Tensor:
    """Stretch each image (..., C, H, W) to the range [0, 1], as the paper does before it shows or compares a candidate.

    The scale of a candidate is known badly, because a larger multiplier makes up for a smaller image.
    """
    low, high = images.amin(dim=(-3, -2, -1), keepdim=True), images.amax(dim=(-3, -2, -1), keepdim=True)
    return (images - low) / (high - low).clamp_min(1e-12)


def strongest(centred: Tensor, multipliers: Tensor, count: int) -> Tensor:
    """Indices of `count` candidates of one restart: by multiplier, near-duplicates last. No ground truth is used.

    Args:
        centred: candidates (k, ...) without the mean image.
        multipliers: λ, (k,).
        count: how many images to return; where there are fewer candidates, the first repeat.
    """
    similarity = correlations(centred, centred)
    kept: list[int] = []
    repeats: list[int] = []
    for index in multipliers.argsort(descending=True).tolist():
        duplicate = bool(kept) and float(similarity[index, kept].max()) > DUPLICATE
        (repeats if duplicate else kept).append(index)
    order = (kept + repeats) * -(-count // len(centred))
    return torch.tensor(order[:count], device=centred.device)
