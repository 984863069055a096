"""torch's own optimizers where they compute what a variant asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .config import AdamWConfig, OptimizerConfig

_FUSED_DEVICES = ("cpu", "cuda")


def torch_optimizer(config: OptimizerConfig, params: Sequence[Tensor]) -> torch.optim.Optimizer | None:
    """The `torch.optim` optimizer with the same definition, fused where the device has it.

    Learning rate and weight decay are left to the caller, who sets them at every step; for
    ``decay="schedule"`` the group's weight decay must be λ / lr, since torch's AdamW removes lr·λ.

    Args:
        config: Settings of the variant.
        params: The model's parameters.

    Returns:
        Adam, AdamW or SGD; None for Adafactor, whose published implementations differ from each other, and
        for SGD with a decoupled decay, which torch does not have.
    """
    fused = all(p.device.type in _FUSED_DEVICES and p.is_floating_point() for p in params)
    common: dict[str, Any] = {"lr": config.lr, "fused": fused}
    if isinstance(config, AdamWConfig):
        kind = torch.optim.Adam if config.decay == "l2" else torch.optim.AdamW
        return kind(params, betas=(config.beta1, config.beta2), eps=config.eps, **common)
    if config.second_moment == "none" and config.decay == "l2":
        return torch.optim.SGD(params, momentum=config.beta1, **common)
    return None
