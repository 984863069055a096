"""What MAGIA asks of a model and its loss, and settings that do less than they seem to; before the loop starts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from ..errors import ConfigError, SharedDataError, first_line
from ..matching.client import unscripted
from .magia_options import MagiaOptions

log = logging.getLogger(__name__)


def check_output(output: Any) -> None:
    """Raise SharedDataError where a model's output is not one row of class scores an image, (B, K)."""
    if not isinstance(output, torch.Tensor) or output.dim() != 2:
        found = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise SharedDataError(f"The model's output is {found}; valid: a tensor (B, classes).")


def check_loss(loss_fn: Callable[..., torch.Tensor], output: torch.Tensor) -> None:
    """Raise ConfigError for a loss that does not take label probabilities: labels are optimised as such.

    Args:
        loss_fn: the loss.
        output: what the model gives, (B, K).
    """
    try:
        unscripted(loss_fn)(output, torch.full_like(output, 1 / output.shape[1]))
    except Exception as error:  # whatever a user's loss throws
        name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
        raise ConfigError(
            f"The loss {name} does not take label probabilities (B, classes) ({type(error).__name__}: "
            f"{first_line(error)}); valid: one that does, as torch.nn.CrossEntropyLoss."
        ) from error


def warn_of_sizes(options: MagiaOptions, batch_size: int, steps: int) -> None:
    """Warn of settings of a subset term that is off, and of a subset larger than the batch."""
    if options.term.kind == "none":
        if options.without_effect:
            log.warning("%s: no effect with subset.term=none.", ", ".join(options.without_effect))
        return
    if options.schedule.mode == "constk" and not 1 <= options.schedule.k <= batch_size:
        size = options.schedule.size(0, batch_size, steps)
        log.warning("subset.sel_k=%d is outside 1 ... %d; taking %d.", options.schedule.k, batch_size, size)


def warn_of_grid(options: MagiaOptions) -> None:
    """Warn that a start which is given is averaged to a coarser grid first."""
    factor = options.pyramid.factors[0]
    if factor > 1:
        log.warning(
            "initial_data loses its detail: it is averaged to a grid coarser by %d first; pyramid.factors=[1] "
            "pyramid.shares=[] starts from it as it is.",
            factor,
        )
