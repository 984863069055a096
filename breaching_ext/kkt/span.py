"""Coordinates in the span of the data, which the first layer gives away, and what its singular values say.

Gradient descent changes the first layer of a fully connected network only by multiples of the training inputs:
W₁ = s·W₀ + Cᵀ X. With a small start W₀ the large singular values of W₁ belong to the span of the n training images
and the others to the start, so that an attack needs to look for images in that span only, a few numbers an image
instead of every pixel. The same singular values say what can be recovered at all: fewer than n of them above the
noise mean that the data have collapsed to fewer directions than there are images, and no extraction can tell the
images apart.

References:
    Gavish and Donoho, "The optimal hard threshold for singular values is 4/√3", IEEE Trans. Information Theory 2014
    (how far above the median a singular value must be).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError


@dataclass(frozen=True)
class Span:
    """An orthonormal basis of a space of images.

    Attributes:
        basis: (r, D), orthonormal rows; (0, D) for the space of all images, which needs none (D × D may be too large).
        singular_values: of the first layer, (min(m, D),), largest first.
    """

    basis: Tensor
    singular_values: Tensor

    @property
    def full(self) -> bool:
        """Whether it is the space of all images."""
        return len(self.basis) in (0, self.basis.shape[1])

    @property
    def rank(self) -> int:
        """Dimension r of the space."""
        return len(self.basis) or self.basis.shape[1]

    def inside(self, weight: Tensor) -> Tensor:
        """Return a weight (m, D) in the coordinates of the space, (m, r)."""
        return weight if self.full else weight @ self.basis.T

    def outside(self, weight: Tensor) -> float:
        """Return the squared norm of what `inside` loses."""
        return max(0.0, float(weight.square().sum() - self.inside(weight).square().sum()))

    def pixels(self, coordinates: Tensor) -> Tensor:
        """Return images (..., D) from coordinates (..., r)."""
        return coordinates if self.full else coordinates @ self.basis


def span_of(weight: Tensor, rank: str | int = "auto", candidates: int | None = None, images: int | None = None) -> Span:
    """Return the space in which to look for the images.

    Args:
        weight: first layer (m, D).
        rank: 'auto' takes the singular vectors whose value stands above the noise (:func:`signal_rank`), at most
            `candidates`, and all pixels where there are none, or where `images` are more than half of all singular
            values: then their median may be no noise, and what stands above it a part of the data only; 'full' takes
            all pixels; a number takes that many.
        candidates: number of candidates.
        images: suspected number of images, the most directions that their data can have; None: few.

    Raises:
        ConfigError: for any other `rank`.
    """
    if rank == "full":
        return Span(weight.new_zeros(0, weight.shape[1]), torch.linalg.svdvals(weight.cpu().double()).to(weight))
    _, values, right = torch.linalg.svd(weight.cpu().double(), full_matrices=False)  # not every device has it
    values, right = values.to(weight), right.to(weight)
    if rank == "auto":
        chosen = signal_rank(values, min(weight.shape) / max(weight.shape))
        if chosen == 0 or 2 * (images or 0) > len(values):
            return Span(weight.new_zeros(0, weight.shape[1]), values)
        return Span(right[: min(chosen, candidates or chosen)], values)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= len(values):
        raise ConfigError(f"span={rank!r} is not possible; valid: auto, full, or 1 to {len(values)}.")
    return Span(right[:rank], values)


def span_of_images(images: Tensor) -> Span:
    """Return the space that known images (n, D) span; of the first layer it keeps all that depends on them."""
    basis, _ = torch.linalg.qr(images.cpu().double().T)  # (D, n)
    return Span(basis.T.to(images), images.new_zeros(0))


def signal_rank(singular_values: Tensor, aspect: float) -> int:
    """Number of singular values above the noise of the start, by the threshold of Gavish and Donoho.

    Args:
        singular_values: of a matrix whose entries carry independent noise of unknown size.
        aspect: its shorter side over its longer one, β.
    """
    factor = 0.56 * aspect**3 - 0.95 * aspect**2 + 1.82 * aspect + 1.43  # their approximation of ω(β)
    return int((singular_values > factor * singular_values.median()).sum())


def singular_values_in_span(weight: Tensor, images: Tensor) -> Tensor:
    """Singular values of the first layer restricted to the span of known images, (n,), for who owns the data.

    Args:
        weight: first layer (m, D).
        images: the training images as the layer sees them, (n, D).
    """
    return torch.linalg.svdvals(span_of_images(images.cpu().double()).inside(weight.cpu().double()))
