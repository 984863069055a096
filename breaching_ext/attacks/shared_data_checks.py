"""Checks of what a client shared, made before the long loop starts; each error is one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import SharedDataError
from ..matching.client import matched_parameters
from ..values import is_whole


def check_shared_data(
    model: torch.nn.Module, server_payload: Sequence[dict], shared_data: Sequence[dict], labels: bool
) -> None:
    """Check what the client shared against the model, its labels of images too, if `labels`.

    Raises:
        SharedDataError: for no gradients, a gradient list of the wrong length or shapes, non-finite gradients, an
            unknown number of data points, or labels that are not classes.
    """
    if len(server_payload) != len(shared_data):
        raise SharedDataError(f"{len(server_payload)} server payloads but {len(shared_data)} sets of shared data.")
    expected = matched_parameters(model)
    for data in shared_data:
        if data["gradients"] is None:
            raise SharedDataError("The client shared weights and no gradient; valid for that: attack=kkt.")
        _check_gradients(list(data["gradients"]), expected)
        number = data["metadata"]["num_data_points"]
        if not is_whole(number) or number < 1:
            raise SharedDataError(
                f"The number of data points is {number}, but the attack must know how many images to reconstruct: "
                "set case.user.provide_num_data_points=True or give metadata['num_data_points'] >= 1."
            )
        if labels:
            classes, about = server_payload[0]["metadata"].get("classes"), data["metadata"]
            _check_labels(about["labels"], number, classes)
            if about.get("local_hyperparams"):
                _check_labels_of_steps(about["local_hyperparams"], number, classes)


def _check_gradients(gradients: list[torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    if not expected:
        raise SharedDataError("No parameter of the model requires a gradient, so there is nothing to match.")
    if len(gradients) != len(expected):
        raise SharedDataError(
            f"The client shared {len(gradients)} gradients, but the model has {len(expected)} parameters that "
            "require a gradient (frozen parameters have no gradient in the list)."
        )
    for (name, parameter), gradient in zip(expected.items(), gradients, strict=True):
        if gradient is None:
            raise SharedDataError(f"The gradient of {name} is None; a parameter that is not used has one of zeros.")
        if not isinstance(gradient, torch.Tensor):
            raise SharedDataError(f"The gradient of {name} is of type {type(gradient).__name__}; valid: a tensor.")
        if gradient.shape != parameter.shape:
            raise SharedDataError(
                f"The gradient of {name} has shape {tuple(gradient.shape)}, the parameter {tuple(parameter.shape)}."
            )
        if not bool(torch.isfinite(gradient).all()):
            raise SharedDataError(f"The gradient of {name} is not finite; nothing can be reconstructed from it.")


def _check_labels(labels: torch.Tensor | None, number: int, classes: int | None) -> None:
    if labels is None:
        return
    if not isinstance(labels, torch.Tensor):
        raise SharedDataError(f"The labels are of type {type(labels).__name__}; valid: a tensor (B,).")
    soft = labels.is_floating_point()  # probabilities (B, K), or what else a loss takes
    if labels.shape[:1] != (number,) or (labels.dim() != 1 and not soft):
        raise SharedDataError(f"The labels have shape {tuple(labels.shape)}, but there are {number} data points.")
    if soft:
        if not bool(torch.isfinite(labels).all()):
            raise SharedDataError("The labels are not finite; valid: probabilities (B, classes), or whole numbers.")
        return
    if int(labels.min()) < 0 or (classes is not None and int(labels.max()) >= classes):
        valid = "0 or more" if classes is None else f"0 to {classes - 1}"
        raise SharedDataError(f"The labels {labels.tolist()} are out of range; valid: {valid}.")


def _check_labels_of_steps(local: Any, number: int, classes: int | None) -> None:
    """Check that every local step says the labels of its data: a block of them after the other, round and round."""
    steps, at_a_time = local["steps"], local["data_per_step"]
    if len(local["labels"]) < steps:
        raise SharedDataError(f"The client made {steps} local steps, but says the labels of {len(local['labels'])}.")
    start = 0
    for labels in local["labels"][:steps]:
        _check_labels(labels, min(at_a_time, number - start), classes)
        start = (start + at_a_time) % number


def check_initial_data(initial_data: torch.Tensor, candidates: int, shape: Sequence[int]) -> None:
    """Check start values: (B, C, H, W) for all candidates, or (N, B, C, H, W) for one each.

    Raises:
        SharedDataError: for any other shape, or for values that are not finite.
    """
    if not isinstance(initial_data, torch.Tensor):
        raise SharedDataError(f"initial_data is of type {type(initial_data).__name__}; valid: a tensor.")
    single, stacked = tuple(shape), (candidates, *shape)
    if tuple(initial_data.shape) not in (single, stacked):
        raise SharedDataError(f"initial_data has shape {tuple(initial_data.shape)}; valid: {single} or {stacked}.")
    if not bool(torch.isfinite(initial_data).all()):
        raise SharedDataError("initial_data is not finite.")
