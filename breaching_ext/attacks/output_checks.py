"""Checks of a model's outputs, its loss, labels and gradients together, before the long loop; each error is one line.

What a model gives is found by one evaluation of a copy, which leaves the model, its buffers and the random state alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import ConfigError, SharedDataError, first_line
from ..matching.client import unscripted
from ..matching.randomness import CandidateStreams
from ..out_of_memory import is_out_of_memory

#: Objectives, and scores, that compare directions.
_DIRECTIONS = ("cosine-similarity", "fast-cosine-similarity", "angular", "masked-cosine-similarity")
_MASK = 1e-6  # what Breaching's masked objective leaves out, whatever its config says
#: Losses that take whole numbers for classes, one an output.
_CLASS_LOSSES = (torch.nn.CrossEntropyLoss, torch.nn.NLLLoss, torch.nn.MultiMarginLoss)


def output_of(model: torch.nn.Module, images: torch.Tensor) -> Any:
    """Return what a model gives for images (B, C, H, W), without gradient and without side effects.

    Raises:
        SharedDataError: where it does not take them.
    """
    try:
        with torch.no_grad(), CandidateStreams([0], images.device).use(0):  # dropout that is on draws
            return copy.deepcopy(model)(images)  # a copy: in training mode statistics move
    except Exception as error:  # whatever a user's model throws
        if is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise SharedDataError(f"The model does not take data of shape {tuple(images.shape)} ({reason}).") from error


def check_labels_of_output(
    loss_fn: Callable[..., torch.Tensor], output: Any, labels: torch.Tensor, local_hyperparams: Any = None
) -> None:
    """Check that a loss takes what a model gives together with the labels; outputs that are no tensor are left alone.

    Args:
        loss_fn: the loss.
        output: what the model gives for all images, such as (B, K).
        labels: (B,) or soft ones (B, K).
        local_hyperparams: of several local steps, each with labels of its own (b,) or (b, K); then these count.

    Raises:
        SharedDataError: for a class that is none of the K outputs, or labels that the loss does not take.
        ConfigError: for a loss whose value is no single number.
    """
    if not isinstance(output, torch.Tensor) or not output.dim():
        return
    steps = local_hyperparams["labels"][: local_hyperparams["steps"]] if local_hyperparams else [labels]
    for told in steps:
        _check_step(unscripted(loss_fn), output[: len(told)], told.to(output.device))


def _check_step(loss_fn: Callable[..., torch.Tensor], output: torch.Tensor, labels: torch.Tensor) -> None:
    classes = output.shape[1] if output.dim() > 1 else 1
    outside = not labels.is_floating_point() and int(labels.max()) >= classes
    if outside and isinstance(loss_fn, _CLASS_LOSSES):
        raise SharedDataError(
            f"The labels {labels.tolist()} do not fit the model's {classes} outputs; valid: 0 to {classes - 1}."
        )
    if outside and output.is_cuda:
        return  # a loss of the user's own may take them; asking it could cost the process its GPU
    try:
        with torch.no_grad():
            value = loss_fn(output, labels)
    except Exception as error:  # whatever a user's loss throws
        raise SharedDataError(
            f"The loss {_name(loss_fn)} does not take the model's output {tuple(output.shape)} with labels of shape "
            f"{tuple(labels.shape)} ({type(error).__name__}: {first_line(error)})."
        ) from error
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        found = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"type {type(value).__name__}"
        raise ConfigError(
            f"The loss {_name(loss_fn)} gives a value of {found}; valid: a single number (a mean or sum)."
        )


def _name(loss_fn: Any) -> str:
    return getattr(loss_fn, "__name__", type(loss_fn).__name__)


def check_direction(gradients: Sequence[torch.Tensor], objective: str, scoring: str) -> None:
    """Check that a shared gradient has a direction where directions are compared; of zeros no candidate is finite.

    Args:
        gradients: one query's, in the attack's type.
        objective: `objective.type`.
        scoring: `restarts.scoring`.

    Raises:
        SharedDataError: naming what asks for it.
    """
    for key, name in (("objective.type", objective), ("restarts.scoring", scoring)):
        if name not in _DIRECTIONS:
            continue
        masked = name.startswith("masked")
        seen = [g * (g.abs() > _MASK) for g in gradients] if masked else gradients
        norm = float(sum(g.pow(2).sum() for g in seen))
        if not 0 < norm < float("inf"):
            dtype = str(gradients[0].dtype).removeprefix("torch.")
            raise SharedDataError(
                f"The squared norm of the shared gradient is {norm:g} in {dtype}, so it has no direction to compare "
                f"with by {key}={name}; valid: euclidean."
            )
