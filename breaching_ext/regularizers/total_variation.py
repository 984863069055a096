"""Total variation for images of any channel count; Breaching's is hard-wired to three channels."""

from __future__ import annotations

from typing import Any

import torch
from breaching.attacks.auxiliaries.regularizers import TotalVariation

from ..errors import ConfigError


class AnyChannelTotalVariation(TotalVariation):
    """Breaching's TotalVariation with the channel count read off the image; the same number for three channels.

    Args: as Breaching's (scale, inner_exp, outer_exp, double_opponents, eps). `double_opponents` needs colour.

    Raises:
        ConfigError: for double_opponents on images that do not have three channels.
    """

    def forward(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the scaled total variation of a batch (B, C, H, W), a scalar."""
        channels = tensor.shape[1]
        if channels == 3:
            return super().forward(tensor)
        if self.double_opponents:
            raise ConfigError(
                f"regularization.total_variation.double_opponents=True needs 3 channels, the images have {channels}."
            )
        weight = self.weight[:2].repeat(channels, 1, 1, 1)  # (2 C, 1, 3, 3): forward difference in each direction
        diffs = torch.nn.functional.conv2d(tensor, weight, padding=1, groups=channels)  # (B, 2 C, H, W)
        squares = (diffs.abs() + self.eps).pow(self.inner_exp)
        return (squares[:, 0::2] + squares[:, 1::2]).pow(self.outer_exp).mean() * self.scale

    def by_differences(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the same number without a convolution, whose gradient is slow for so small a kernel."""
        if self.double_opponents:
            return self(tensor)
        down = torch.nn.functional.pad(tensor, (0, 0, 0, 1))[..., 1:, :] - tensor  # beyond the border is 0
        right = torch.nn.functional.pad(tensor, (0, 1))[..., 1:] - tensor
        squares = [(diff.abs() + self.eps).pow(self.inner_exp) for diff in (down, right)]
        return (squares[0] + squares[1]).pow(self.outer_exp).mean() * self.scale

    @classmethod
    def like(cls, other: TotalVariation) -> AnyChannelTotalVariation:
        """Return the same regularizer for any channel count."""
        return cls(
            other.setup,
            scale=other.scale,
            inner_exp=other.inner_exp,
            outer_exp=other.outer_exp,
            double_opponents=other.double_opponents,
            eps=other.eps,
        )
