"""LPIPS without surprises: no download behind the user's back, no warnings, a reason where it cannot be computed."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path

import torch

_BACKBONE = "alexnet-owt-7be5be79.pth"
#: Pixels each way below which AlexNet's strides leave nothing.
_LEAST_SIDE = 31
_HOW_TO_GET_IT = (
    f"LPIPS needs torchvision's AlexNet weights ({_BACKBONE}) in $TORCH_HOME/hub/checkpoints; once, with a network: "
    "python -c \"import torchvision; torchvision.models.alexnet(weights='DEFAULT')\""
)


def lpips_distances(reconstructed: torch.Tensor, true: torch.Tensor) -> tuple[list[float] | None, str]:
    """Return the LPIPS distance (Zhang et al., CVPR 2018; AlexNet) of each pair of images, or None and the reason.

    Args:
        reconstructed: images (B, C, H, W) in [0, 1]; one channel is repeated to three.
        true: images (B, C, H, W) in [0, 1].
    """
    if true.shape[1] not in (1, 3):
        return None, f"LPIPS needs 1 or 3 channels, the images have {true.shape[1]}"
    height, width = true.shape[-2:]
    if min(height, width) < _LEAST_SIDE:
        return None, f"LPIPS needs images of {_LEAST_SIDE} pixels each way or more, these have {height} x {width}"
    if not (Path(torch.hub.get_dir()) / "checkpoints" / _BACKBONE).exists():
        return None, _HOW_TO_GET_IT
    try:
        scorer = _scorer(torch.hub.get_dir())
        pair = [x.float().expand(-1, 3, -1, -1) * 2 - 1 for x in (reconstructed, true)]
        with torch.no_grad():
            return scorer(*pair).flatten().double().tolist(), ""
    except Exception as error:  # such as a damaged file: the other metrics remain
        return None, f"LPIPS failed ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"


@functools.lru_cache(maxsize=1)
def _scorer(hub_dir: str) -> torch.nn.Module:
    """Build the scorer once per hub folder (the argument is only the cache's key)."""
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips asks torchvision for weights in a way that it deprecates
        return lpips.LPIPS(net="alex", verbose=False).eval()
