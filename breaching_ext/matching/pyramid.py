"""Coarse-to-fine pixels: which grid a run is on, and the way from one grid to the next."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..values import is_number

__all__ = ["Pyramid", "enlarge", "shrink"]


@dataclass(frozen=True)
class Pyramid:
    """Coarse-to-fine pixels: images are optimised on coarser grids first, bilinearly enlarged to their size.

    A grid coarser by 4 has a sixteenth of the unknowns, so that early iterations, which settle labels and rough
    colours, need fewer evaluations, and L-BFGS's vectors are short. (1,) is plain pixels.

    Attributes:
        factors: how much coarser each stage's grid is than the image.
        shares: share of the run that each stage takes; the last stage takes the rest.

    Raises:
        ValueError: for factors below 1, a last factor other than 1, or shares that do not fit.
    """

    factors: tuple[int, ...] = (4, 2, 1)
    shares: tuple[float, ...] = (0.25, 0.3)

    def __post_init__(self) -> None:
        if not all(isinstance(factor, int) for factor in self.factors):
            raise ValueError(f"pyramid.factors={self.factors} must be whole numbers.")
        if not self.factors or self.factors[-1] != 1 or min(self.factors) < 1:
            raise ValueError(f"pyramid.factors={self.factors} must be 1 or more each, and end with 1.")
        if not all(is_number(share) for share in self.shares):
            raise ValueError(f"pyramid.shares={self.shares} must be numbers.")
        if len(self.shares) != len(self.factors) - 1 or min(self.shares, default=0) < 0 or sum(self.shares) > 1:
            raise ValueError(f"pyramid.shares={self.shares}: valid: one per stage but the last, 0 to 1, sum up to 1.")

    def factor(self, progress: float) -> int:
        """The stage's factor at progress in [0, 1]."""
        end = 0.0
        for factor, share in zip(self.factors, self.shares, strict=False):
            end += share
            if progress < end:
                return factor
        return 1


def shrink(pixels: torch.Tensor, factor: int) -> torch.Tensor:
    """Averages of about factor × factor pixels: (N, B, C, H, W) -> (N, B, C, ⌈H/factor⌉, ⌈W/factor⌉)."""
    height, width = (-(-side // factor) for side in pixels.shape[-2:])
    return F.adaptive_avg_pool2d(pixels.flatten(0, 1), (height, width)).unflatten(0, pixels.shape[:2])


def enlarge(grid: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """Bilinear interpolation to `size` (H, W); the identity where the grid has that size."""
    if grid.shape[-2:] == size:
        return grid
    return F.interpolate(grid.flatten(0, 1), size=size, mode="bilinear", align_corners=False).unflatten(
        0, grid.shape[:2]
    )
