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


def trial_images(shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return images to try things on, always the same: noise, because some models take no constant image."""
    with CandidateStreams([0], device).use(0):
        return torch.rand(tuple(shape), device=device, dtype=dtype)


def output_of(model: torch.nn.Module, images: torch.Tensor, what: str = "data") -> Any:
    """Return what a model gives for images (B, C, H, W), without side effects; a forward may differentiate.

    Args:
        model: the model.
        images: what it is tried on.
        what: their name, for the error.

    Raises:
        SharedDataError: where it does not take them.
    """
    try:
        with torch.enable_grad(), CandidateStreams([0], images.device).use(0):  # dropout that is on draws
            return copy.deepcopy(model)(images)  # a copy: in training mode statistics move
    except Exception as error:  # whatever a user's model throws
        if is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise SharedDataError(f"The model does not take {what} of shape {tuple(images.shape)} ({reason}).") from error


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
    if not local_hyperparams:
        _check_step(unscripted(loss_fn), output, labels.to(output.device))
    elif len(output) == len(labels):  # otherwise its rows are not images, and a step's cannot be told
        for told in local_hyperparams["labels"][: local_hyperparams["steps"]]:
            _check_step(unscripted(loss_fn), output[: len(told)], told.to(output.device))


def _check_step(loss_fn: Callable[..., torch.Tensor], output: torch.Tensor, labels: torch.Tensor) -> None:
    classes = output.shape[1] if output.dim() > 1 else 1
    outside = not labels.is_floating_point() and int(labels.max()) >= classes
    if outside and type(loss_fn) in _CLASS_LOSSES and getattr(loss_fn, "ignore_index", -100) < classes:
        raise SharedDataError(
            f"The labels {labels.tolist()} do not fit the model's {classes} outputs; valid: 0 to {classes - 1}."
        )
    if outside and output.is_cuda:
        return  # a loss of the user's own may take them; asking it could cost the process its GPU
    try:
        with torch.enable_grad():
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
            wider = "" if dtype == "float64" else "impl.dtype=double" + (", euclidean" if norm == 0 else "")
            raise SharedDataError(
                f"The squared norm of the shared gradient is {norm:g} in {dtype}, so it has no direction to compare "
                f"with by {key}={name}; valid: {wider or 'euclidean'}."
            )
