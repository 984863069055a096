"""Put gradients that were observed elsewhere into the form that Breaching's attacks take."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from omegaconf import OmegaConf

from ..errors import SharedDataError

log = logging.getLogger(__name__)


def observe(
    model: torch.nn.Module,
    gradients: Sequence[torch.Tensor],
    shape: Sequence[int],
    num_data_points: int,
    classes: int,
    labels: torch.Tensor | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    buffers: Sequence[torch.Tensor] | None = None,
    local_hyperparams: dict[str, Any] | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Wrap a model and the update that a client sent for it, for `attacker.reconstruct`; no simulation involved.

    Args:
        model: the model in the state in which the client received it. Its gradient is matched in evaluation mode, with
            the statistics of its buffers; a gradient that was taken in training mode with batch norm is another one.
        gradients: one tensor for each parameter that requires a gradient, in the order of `model.parameters()`;
            after several local steps, the parameters' change, after minus before, with `local_hyperparams`.
        shape: shape of one data point, for example (3, 32, 32).
        num_data_points: how many data points the update averages.
        classes: number of classes.
        labels: (B,) integer labels, if known; None to have the attack infer them.
        mean, std: per-channel normalisation of the client's data, if it is normalised.
        buffers: batch-norm statistics that the client sent, if it did.
        local_hyperparams: Breaching's dict (steps, data_per_step, lr, labels) for several local steps.

    Returns:
        (server_payload, shared_data), each a list with one entry, one query to the client.

    Raises:
        SharedDataError: for `local_hyperparams` without one of its keys, or a mean without a deviation.
    """
    if local_hyperparams is not None:
        lacking = {"steps", "data_per_step", "lr", "labels"} - set(local_hyperparams)
        if lacking:
            raise SharedDataError(f"local_hyperparams lacks {', '.join(sorted(lacking))}.")
    if (mean is None) != (std is None):
        raise SharedDataError("mean and std belong together; valid: both or neither (0 and 1 change nothing).")
    if model.training and any(True for _ in model.buffers()):
        log.warning(
            "The model is in training mode and has buffers: its gradient is matched as in evaluation mode, with the "
            "statistics that it has now. Call model.eval() where the client's gradient was taken so."
        )
    metadata: dict[str, Any] = {
        "name": "observed",
        "modality": "vision",
        "task": "classification",
        "shape": list(shape),
        "classes": classes,
    }
    if mean is not None and std is not None:
        metadata.update(mean=list(mean), std=list(std))
    payload = {
        "parameters": _clones(model.parameters()),
        "buffers": _clones(model.buffers()),
        "metadata": OmegaConf.create(metadata),
    }
    shared = {
        "gradients": _clones(gradients),
        "buffers": None if buffers is None else _clones(buffers),
        "metadata": {
            "num_data_points": num_data_points,
            "labels": None if labels is None else labels.detach().clone(),
            "local_hyperparams": local_hyperparams,
        },
    }
    return [payload], [shared]


def own_copy(shared_data: Sequence[dict[str, Any]], device: torch.device) -> list[dict[str, Any]]:
    """Copy what was shared to a device; Breaching would cast and normalise the user's own tensors in place."""
    copies = []
    for data in shared_data:
        metadata = dict(data["metadata"])
        metadata["num_data_points"] = int(metadata["num_data_points"])  # NumPy's will not do everywhere
        if metadata["labels"] is not None:
            metadata["labels"] = _labels(metadata["labels"], device)
        if metadata["local_hyperparams"] is not None:
            steps = dict(metadata["local_hyperparams"])
            steps["labels"] = [_labels(labels, device) for labels in steps["labels"]]
            metadata["local_hyperparams"] = steps
        tensors = {
            key: None if data[key] is None else [t.to(device) for t in _clones(data[key])]
            for key in ("gradients", "buffers")
        }
        copies.append({**data, **tensors, "metadata": metadata})
    return copies


def _labels(labels: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Labels on a device, classes as int64, which torch's losses ask for."""
    return labels.to(device) if labels.is_floating_point() else labels.to(device, torch.long)


def _clones(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [t if t is None else t.detach().clone() for t in tensors]
