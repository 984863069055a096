"""How much of a training set a pool of candidates shows: each image with its nearest candidate, as in the paper.

The same is measured for as many images that the network never saw; what they reach is what resemblance to the data's
distribution gives for free. SSIM alone is a weak measure: the mean image that all share is in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import SharedDataError
from ..evaluation import ssim
from .candidates import correlations, stretch

#: an image counts as recovered above these
NCC_RECOVERED = 0.8
SSIM_RECOVERED = 0.4


@dataclass
class Nearest:
    """Each image's nearest candidate.

    Attributes:
        index: (n,) into the pool.
        ncc: normalised cross-correlation without the mean image, (n,).
        ssim: structural similarity of the image and the stretched candidate, (n,).
        images: the stretched candidates, (n, C, H, W).
    """

    index: Tensor
    ncc: Tensor
    ssim: Tensor
    images: Tensor

    def as_dict(self) -> dict[str, Any]:
        """Return the shares recovered, the means and the lists."""
        return {
            "ncc_share": float((self.ncc > NCC_RECOVERED).double().mean()),
            "ssim_share": float((self.ssim > SSIM_RECOVERED).double().mean()),
            "ncc_mean": float(self.ncc.mean()),
            "ssim_mean": float(self.ssim.mean()),
            "ncc": self.ncc.tolist(),
            "ssim": self.ssim.tolist(),
        }


def nearest(pool: Tensor, images: Tensor, mean: Tensor) -> Nearest:
    """Find the candidate with the highest correlation to every image.

    Args:
        pool: candidates (k, C, H, W), with the mean image added, not stretched.
        images: (n, C, H, W) in [0, 1].
        mean: mean image (C, H, W).

    Raises:
        SharedDataError: for images of another size than the candidates'.
    """
    if not (pool.shape[1:] == images.shape[1:] == mean.shape):
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in (("images", images), ("mean", mean)))
        raise SharedDataError(f"Candidates {tuple(pool.shape)} do not compare with {shapes}; valid: one (C, H, W).")
    pool, images, mean = (x.detach().cpu().double() for x in (pool, images, mean))
    similarity = correlations(images - mean, pool - mean)  # (n, k)
    best, index = similarity.max(dim=1)
    shown = stretch(pool[index])
    return Nearest(index, best, ssim(shown, images), shown)
