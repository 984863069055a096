"""Checks of configurations and shared data, made before the long loop starts; each error is one line."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from breaching.attacks.auxiliaries.objectives import objective_lookup
from breaching.attacks.auxiliaries.regularizers import DeepInversion, FeatureRegularization, regularizer_lookup

from ..errors import ConfigError, SharedDataError, unknown
from ..matching import BATCHING_MODES
from ..matching.client import matched_parameters
from ..matching.memory import parse_bytes
from ..registration import REGULARIZERS

log = logging.getLogger(__name__)

OPTIMIZERS = ("adam", "adam-safe", "bert-adam", "momgd", "gd", "l-bfgs")
SCHEDULES = ("none", "step-lr", "cosine-decay", "linear")
SIGNS = ("none", "hard", "soft")
SCORINGS = ("euclidean", "cosine-similarity", "total-variation", "TV", "registered-group-regularization")
OUTPUTS = ("best", "consensus")


def check_config(cfg: Any) -> None:
    """Check an attack configuration.

    Raises:
        ConfigError: naming the key, its value and the valid ones.
    """
    restarts, optim = cfg.restarts, cfg.optim
    if not isinstance(restarts.num_trials, int) or restarts.num_trials < 1:
        raise ConfigError(f"restarts.num_trials={restarts.num_trials} is not possible; valid: 1, 2, 3, ...")
    if not isinstance(optim.max_iterations, int) or optim.max_iterations < 1:
        raise ConfigError(f"optim.max_iterations={optim.max_iterations} is not possible; valid: 1, 2, 3, ...")
    if not isinstance(optim.callback, int) or optim.callback < 1:
        raise ConfigError(f"optim.callback={optim.callback} is not possible; valid: 1, 2, 3, ...")
    check_impl(cfg.impl)
    parse_bytes(cfg.impl.get("memory_budget"))
    _check_option("restarts.scoring", restarts.scoring, SCORINGS)
    _check_option("restarts.output", restarts.get("output", "best"), OUTPUTS)
    _check_option("restarts.candidate_batching", restarts.get("candidate_batching", "auto"), BATCHING_MODES)
    for name, least in (("langevin_noise", 0.0), ("warmup", 0)):
        value = optim.get(name, least)
        if not isinstance(value, (int, float)) or not value >= least:
            raise ConfigError(f"optim.{name}={value} is not possible; valid: a number from {least}.")
    _check_option("optim.optimizer", str(optim.optimizer).lower(), OPTIMIZERS)
    _check_option("optim.step_size_decay", optim.step_size_decay or "none", SCHEDULES)
    _check_option("optim.signed", optim.signed or "none", SIGNS)
    # Breaching's pearlmutter-* change leaf parameters in place, which torch refuses in the first iteration.
    objectives = [name for name in objective_lookup if not name.startswith("pearlmutter")]
    _check_option("objective.type", cfg.objective.type, objectives)
    for key in cfg.regularization or ():
        _check_option("regularization key", key, {**regularizer_lookup, **REGULARIZERS})
        scale = (cfg.regularization[key] or {"scale": 0}).get("scale")
        if not isinstance(scale, (int, float)) or not scale >= 0:
            raise ConfigError(
                f"regularization.{key}.scale={scale} is not possible; valid: a number from 0, which switches it off."
            )


def check_impl(impl: Any) -> None:
    """Raise ConfigError where checkpoints are due at no whole number, or the type is none."""
    every = impl.get("checkpoint_every")
    if every is not None and (not isinstance(every, int) or every < 1):
        raise ConfigError(f"impl.checkpoint_every={every} is not possible; valid: empty, or 1, 2, 3, ...")
    check_dtype("impl.dtype", impl.dtype)


def check_dtype(key: str, name: Any) -> None:
    """Raise ConfigError where `name` is not one of torch's floating types."""
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"{key}={name} is not possible; valid: float, double, float32, ...")


def _check_option(key: str, value: Any, valid: Iterable[Any]) -> None:
    if value not in valid:
        raise unknown(key, value, valid)


def check_shared_data(
    model: torch.nn.Module, server_payload: Sequence[dict], shared_data: Sequence[dict], modality: str
) -> None:
    """Check what the client shared against the model.

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
        if not isinstance(number, int) or number < 1:
            raise SharedDataError(
                f"The number of data points is {number}, but the attack must know how many images to reconstruct: "
                "set case.user.provide_num_data_points=True or give metadata['num_data_points'] >= 1."
            )
        if modality == "vision":
            _check_labels(data["metadata"]["labels"], number, server_payload[0]["metadata"].get("classes"))


def _check_gradients(gradients: list[torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    if len(gradients) != len(expected):
        raise SharedDataError(
            f"The client shared {len(gradients)} gradients, but the model has {len(expected)} parameters that "
            "require a gradient (frozen parameters have no gradient in the list)."
        )
    for (name, parameter), gradient in zip(expected.items(), gradients, strict=True):
        if gradient is None:
            raise SharedDataError(f"The gradient of {name} is None; a parameter that is not used has one of zeros.")
        if gradient.shape != parameter.shape:
            raise SharedDataError(
                f"The gradient of {name} has shape {tuple(gradient.shape)}, the parameter {tuple(parameter.shape)}."
            )
        if not bool(torch.isfinite(gradient).all()):
            raise SharedDataError(f"The gradient of {name} is not finite; nothing can be reconstructed from it.")


def _check_labels(labels: torch.Tensor | None, number: int, classes: int | None) -> None:
    if labels is None or labels.is_floating_point():
        return
    if labels.shape != (number,):
        raise SharedDataError(f"The labels have shape {tuple(labels.shape)}, but there are {number} data points.")
    if classes is not None and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        raise SharedDataError(f"The labels {labels.tolist()} are out of range; valid: 0 to {classes - 1}.")


def check_augmentations(
    augmentations: torch.nn.Sequential, start: torch.Tensor, differentiable: bool, group: Any
) -> None:
    """Check augmentations that change the images' size, with which not everything works; warn of doubtful company.

    Args:
        augmentations: Breaching's, in a row; they may be none.
        start: images (B, C, H, W) of the size that is reconstructed.
        differentiable: whether the gradient flows through them; if not, they change the candidates themselves.
        group: the group term, or None.

    Raises:
        ConfigError: naming what can be done.
    """
    with torch.random.fork_rng(devices=[]):
        size = copy.deepcopy(augmentations)(start).shape  # a copy: some keep what they drew first
    if size == start.shape:
        if differentiable and group is not None and len(augmentations):
            log.warning(
                "differentiable_augmentations=true: the group term compares augmented images with a consensus of "
                "images that are not; regularization.group_regularization.scale=0 leaves it out."
            )
        return
    sizes = f"augmentations make images of {tuple(size[1:])} from {tuple(start.shape[1:])}"
    if not differentiable:
        raise ConfigError(f"{sizes}, which cannot take a candidate's place; valid: differentiable_augmentations=true.")
    if group is not None:
        raise ConfigError(
            f"{sizes}, which cannot be compared with the consensus; valid: regularization.group_regularization.scale=0."
        )


def check_local_steps(regularizers: Sequence[Any], local_hyperparams: Any) -> None:
    """Refuse regularizers that look into the model together with several local steps, which run in copies of it.

    Raises:
        ConfigError: naming them.
    """
    names = [type(r).__name__ for r in regularizers if isinstance(r, (DeepInversion, FeatureRegularization))]
    if local_hyperparams is not None and names:
        raise ConfigError(
            f"{', '.join(names)} compares what is inside the model, which changes from local step to local step; "
            "valid: regularization.deep_inversion.scale=0 and regularization.features.scale=0."
        )


def warn_of_choice(restarts: Any, labels: torch.Tensor, group: Any) -> None:
    """Warn of a group term, or a choice, that means less than it seems.

    Args:
        restarts: the config's part.
        labels: (B,) of images, or (B, ...) of text.
        group: the group term, or None.
    """
    trials = restarts.num_trials
    if group is not None and trials > 1 and labels.dim() == 1 and len(labels.unique()) < len(labels):
        log.warning(
            "Labels repeat: nothing fixes the order of images with one label, so image k of one candidate may be "
            "another photo in the next, and the group term compares them all the same."
        )
    if restarts.scoring == "registered-group-regularization" and trials < 3:
        log.warning(
            "restarts.scoring=registered-group-regularization says nothing about %d candidate%s; valid: euclidean, "
            "cosine-similarity.",
            *(trials, "s" if trials > 1 else ""),
        )


def check_initial_data(initial_data: torch.Tensor, candidates: int, shape: Sequence[int]) -> None:
    """Check start values: (B, C, H, W) for all candidates, or (N, B, C, H, W) for one each.

    Raises:
        SharedDataError: for any other shape, or for values that are not finite.
    """
    single, stacked = tuple(shape), (candidates, *shape)
    if tuple(initial_data.shape) not in (single, stacked):
        raise SharedDataError(f"initial_data has shape {tuple(initial_data.shape)}; valid: {single} or {stacked}.")
    if not bool(torch.isfinite(initial_data).all()):
        raise SharedDataError("initial_data is not finite.")
