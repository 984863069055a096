"""Image metrics after a one-to-one assignment of reconstructions to true images.

The order of a batch cannot be known from an averaged gradient, so every metric first assigns each reconstruction to
exactly one true image (Hungarian method on the mean squared error). The ground truth is used here and nowhere else:
nothing is selected with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from skimage.metrics import structural_similarity

from ..matching.candidate_order import aligned_to
from .perceptual import lpips_distances

#: A mean squared error below this counts as exact, so that one exact image does not make the mean PSNR infinite.
EXACT_MSE = 1e-10


@dataclass
class Evaluation:
    """Metrics of one batch.

    Attributes:
        order: (B,) reconstruction `order[i]` is assigned to true image i.
        per_image: metric -> one number for every true image (`lpips` may be absent).
        means: metric -> mean; `lpips` is None where it could not be computed.
        reasons: metric -> why it is None.
    """

    order: torch.Tensor
    per_image: dict[str, list[float]]
    means: dict[str, float | None]
    reasons: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Return the flat layout of metrics.json: means by name, `per_image`, `order`, and `<metric>_reason`."""
        reasons = {f"{name}_reason": reason for name, reason in self.reasons.items()}
        return {**self.means, **reasons, "per_image": self.per_image, "order": self.order.tolist()}


def to_images(
    data: torch.Tensor, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> torch.Tensor:
    """Undo a per-channel normalisation and clamp to [0, 1]; (..., C, H, W) in, the same out, on the CPU in double."""
    data = data.detach().cpu().double()
    if mean is not None and std is not None:
        data = data * torch.as_tensor(std, dtype=torch.double).view(-1, 1, 1)
        data = data + torch.as_tensor(mean, dtype=torch.double).view(-1, 1, 1)
    return data.clamp(0, 1)


def assign(reconstructed: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """Return the order (B,) that minimises the summed squared error of reconstructed[order] against true.

    Args:
        reconstructed: images (B, C, H, W).
        true: images (B, C, H, W).
    """
    return aligned_to(true, reconstructed)


def psnr(reconstructed: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each image, (B,), for values in [0, 1]; at most 100 dB."""
    return -10 * (reconstructed - true).pow(2).flatten(1).mean(dim=1).clamp_min(EXACT_MSE).log10()


def ssim(reconstructed: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang et al. 2004) of each image, (B,), for values in [0, 1].

    Images of fewer than 7 pixels a side take the largest odd window that fits; below 3 there is none: NaN.
    """
    side = min(7, *true.shape[-2:])
    if side < 3:
        return torch.full((len(true),), float("nan"), dtype=torch.float64)
    window = side if side % 2 else side - 1
    return torch.tensor(
        [
            structural_similarity(t.numpy(), r.numpy(), channel_axis=0, data_range=1.0, win_size=window)
            for r, t in zip(reconstructed, true, strict=True)
        ]
    )


def evaluate(
    reconstructed: torch.Tensor,
    true: torch.Tensor,
    labels: torch.Tensor | None = None,
    true_labels: torch.Tensor | None = None,
) -> Evaluation:
    """Compare a batch of reconstructions with the true images.

    Args:
        reconstructed: images (B, C, H, W) in [0, 1] (see :func:`to_images`).
        true: images (B, C, H, W) in [0, 1].
        labels: (B,) label of each reconstruction, if there is one.
        true_labels: (B,) true labels.

    Returns:
        mse, psnr (dB), ssim, lpips and, with labels, `label_acc` (share of true images whose assigned
        reconstruction has the right label) and `label_overlap` (share of labels that are right as a multiset, which
        does not depend on the assignment).

    Raises:
        ValueError: when the shapes differ.
    """
    if reconstructed.shape != true.shape:
        raise ValueError(f"Reconstructions {tuple(reconstructed.shape)} do not fit true images {tuple(true.shape)}.")
    order = assign(reconstructed, true)
    matched = reconstructed[order]
    per_image = {
        "mse": (matched - true).pow(2).flatten(1).mean(dim=1).tolist(),
        "psnr": psnr(matched, true).tolist(),
        "ssim": ssim(matched, true).tolist(),
    }
    distances, reason = lpips_distances(matched, true)
    if distances is not None:
        per_image["lpips"] = distances
    overlap: dict[str, float] = {}
    if labels is not None and true_labels is not None:
        right = labels.cpu()[order] == true_labels.cpu()
        per_image["label_acc"] = right.double().tolist()
        overlap["label_overlap"] = _overlap(labels, true_labels)
    means: dict[str, float | None] = {name: sum(values) / len(values) for name, values in per_image.items()}
    if distances is None:
        means["lpips"] = None
    return Evaluation(order, per_image, {**means, **overlap}, {"lpips": reason} if reason else {})


def _overlap(labels: torch.Tensor, true_labels: torch.Tensor) -> float:
    common = Counter(labels.tolist()) & Counter(true_labels.tolist())
    return sum(common.values()) / len(true_labels)
