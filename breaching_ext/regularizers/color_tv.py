"""Total variation as plain functions of one image batch: per channel, and coupled over the colours.

In photos the edges of the three colour channels coincide and most of an edge is a change of brightness: differences
between the channels vary far less than their mean. `color_total_variation` says both: one norm over all channels
per pixel (so that an edge shared by the channels costs once), and a weight above 1 on the part of a channel's
gradient that the other channels do not share.

References:
    P. Blomgren and T. Chan, "Color TV: total variation methods for restoration of vector-valued images", IEEE
    Transactions on Image Processing 7 (1998) (the coupled norm; the extra weight on chroma is ours).
"""

from __future__ import annotations

import torch

__all__ = ["anisotropic_total_variation", "color_total_variation"]


def anisotropic_total_variation(x: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of vertical neighbours plus that of horizontal ones.

    Args:
        x: images (B, C, H, W) with any number of channels.

    Returns:
        A scalar; an axis of length 1 adds nothing.
    """
    value = x.new_zeros(())
    for axis in (-2, -1):
        if x.shape[axis] > 1:
            value = value + x.diff(dim=axis).abs().mean()
    return value


def color_total_variation(x: torch.Tensor, chroma: float = 5.0, eps: float = 0.01) -> torch.Tensor:
    """Mean over pixels of √(|∇m|² + chroma² / C · Σ_c |∇(x_c − m)|² + eps²), m being the mean of the C channels.

    With chroma = 1 the first two parts add up to Σ_c |∇x_c|² / C: the coupled total variation of Blomgren and Chan,
    smoothed.

    Args:
        x: images (B, C, H, W) with any number of channels; with one there is no chroma.
        chroma: weight of colour differences against brightness; 1 treats them alike.
        eps: differences well below this are penalised quadratically, which keeps the function smooth for L-BFGS.

    Returns:
        A scalar; a grey image has the value of its single channel.
    """
    mean = x.mean(dim=-3, keepdim=True)  # (B, 1, H, W)
    squares = _squared_gradient(mean).sum(dim=-3)  # (B, H, W)
    if x.shape[-3] > 1:
        squares = squares + chroma**2 / x.shape[-3] * _squared_gradient(x - mean).sum(dim=-3)
    return (squares + eps**2).sqrt().mean()


def _squared_gradient(x: torch.Tensor) -> torch.Tensor:
    """|∇x|² per pixel from forward differences that are 0 at the last row and column: (..., H, W)."""
    down = torch.nn.functional.pad(x.diff(dim=-2), (0, 0, 0, 1))
    across = torch.nn.functional.pad(x.diff(dim=-1), (0, 1))
    return down.square() + across.square()
