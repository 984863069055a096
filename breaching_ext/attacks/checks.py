"""Checks of configurations, made before the long loop starts; each error is one line."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from breaching.attacks.auxiliaries.augmentations import augmentation_lookup
from breaching.attacks.auxiliaries.objectives import objective_lookup
from breaching.attacks.auxiliaries.regularizers import (
    DeepInversion,
    FeatureRegularization,
    TotalVariation,
    regularizer_lookup,
)

from ..errors import ConfigError, unknown
from ..matching import BATCHING_MODES
from ..matching.memory import parse_bytes
from ..registration import REGULARIZERS
from ..regularizers import GroupRegularization
from ..values import check_number, check_seed, check_switches, check_whole, is_number

log = logging.getLogger(__name__)

OPTIMIZERS = ("adam", "adam-safe", "bert-adam", "momgd", "gd", "l-bfgs")
SCHEDULES = ("none", "step-lr", "cosine-decay", "linear")
SIGNS = ("none", "hard", "soft")
SCORINGS = ("euclidean", "cosine-similarity", "total-variation", "TV", "registered-group-regularization")
OUTPUTS = ("best", "consensus")
STARTS = ("randn", "randn-trunc", "rand", "zeros")
COLOURS = ("red", "green", "blue", "dark", "light")
SWITCHES = (
    *("optim.boxed", "restarts.parallel_candidates", "normalize_gradients", "differentiable_augmentations"),
    "impl.mixed_precision",
)
LABEL_STRATEGIES = (
    *("none", "iDLG", "analytic", "yin", "wainakh-simple", "wainakh-whitebox"),
    *("bias-corrected", "bias-text", "random", "exhaustive"),
)


def check_config(cfg: Any) -> None:
    """Check an attack configuration.

    Raises:
        ConfigError: naming the key, its value and the valid ones.
    """
    check_switches(cfg, SWITCHES)
    _check_option("impl.JIT", cfg.impl.get("JIT") or "none", ("none", "script", "trace"))
    check_impl(cfg.impl)
    parse_bytes(cfg.impl.get("memory_budget"))
    _check_names(cfg)
    _check_restarts(cfg.restarts)
    _check_optim(cfg.optim, has_own_step_size=cfg.get("attack_type") == "magia")
    _check_objective(cfg.objective)
    for key in cfg.regularization or ():
        _check_regularizer(key, cfg.regularization[key])


def _check_restarts(restarts: Any) -> None:
    check_whole("restarts.num_trials", restarts.num_trials, 1)
    check_seed("restarts.seed", restarts.get("seed"))
    _check_option("restarts.scoring", restarts.scoring, SCORINGS)
    _check_option("restarts.output", restarts.get("output", "best"), OUTPUTS)
    _check_option("restarts.candidate_batching", restarts.get("candidate_batching", "auto"), BATCHING_MODES)


def _check_optim(optim: Any, has_own_step_size: bool) -> None:
    check_whole("optim.max_iterations", optim.max_iterations, 1)
    check_whole("optim.callback", optim.callback, 1)
    for name in ("langevin_noise", "warmup"):
        check_number(f"optim.{name}", optim.get(name, 0), least=0)
    check_number("optim.step_size", optim.get("step_size"), above=0, may_be_empty=has_own_step_size)
    check_number("optim.grad_clip", optim.get("grad_clip"), above=0, may_be_empty=True)
    _check_option("optim.optimizer", str(optim.optimizer).lower(), OPTIMIZERS)
    _check_option("optim.step_size_decay", optim.step_size_decay or "none", SCHEDULES)
    _check_option("optim.signed", optim.signed or "none", SIGNS)


def _check_objective(objective: Any) -> None:
    # Breaching's pearlmutter-* change leaf parameters in place, which torch refuses in the first iteration.
    valid = [key for key in objective_lookup if not key.startswith("pearlmutter")]
    _check_option("objective.type", objective.type, valid)
    for name in ("scale", "task_regularization"):
        check_number(f"objective.{name}", objective.get(name, 0.0))


def _check_regularizer(key: str, options: Any) -> None:
    _check_option("regularization key", key, {**regularizer_lookup, **REGULARIZERS})
    if not options:
        return
    check_number(f"regularization.{key}.scale", options.get("scale"), least=0)  # 0 switches it off
    if key == "group_regularization":
        GroupRegularization({}, **options)  # where it is off, choosing reads its aligner
    else:
        _check_options(f"regularization.{key}", regularizer_lookup[key], options)


def _check_names(cfg: Any) -> None:
    """Check names that Breaching looks up, or compares, only when it needs them."""
    for key in cfg.get("augmentations") or ():
        _check_option("augmentations key", key, augmentation_lookup)
    strategy = cfg.get("label_strategy") or "none"  # some configs of Breaching's say "None"
    _check_option("label_strategy", "none" if strategy == "None" else strategy, LABEL_STRATEGIES)
    start = str(cfg.init)
    side = "".join(filter(str.isdigit, start))  # what Breaching reads of it: the side of a square
    pattern = any(word in start for word in ("patterned", "wei")) and bool(side) and int(side) > 0
    plain = (*STARTS, "grey") if cfg.get("attack_type") == "magia" else STARTS
    if start not in plain and not pattern and not any(colour in start for colour in COLOURS):
        raise unknown("init", start, (*plain, "patterned-4", "rand-wei-4", *COLOURS, *(f"{c}-true" for c in COLOURS)))


def check_impl(impl: Any) -> None:
    """Raise ConfigError where checkpoints are due at no whole number, or the type is none."""
    check_whole("impl.checkpoint_every", impl.get("checkpoint_every"), 1, may_be_empty=True)
    check_dtype("impl.dtype", impl.dtype)
    progress = impl.get("progress", "auto")
    _check_option("impl.progress", progress if isinstance(progress, bool) else str(progress), ("auto", True, False))


def check_dtype(key: str, name: Any) -> None:
    """Raise ConfigError where `name` is not one of torch's floating types."""
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"{key}={name} is not possible; valid: float, double, float32, ...")


def _check_options(name: str, kind: Any, options: Mapping[str, Any]) -> None:
    """Check a part of the config that one of Breaching's classes takes as its keyword arguments, by their defaults."""
    known = {key: p.default for key, p in inspect.signature(kind.__init__).parameters.items()}
    valid = {key: default for key, default in known.items() if key not in ("self", "setup")}
    for key, value in options.items():
        _check_option(f"{name} key", key, valid)
        if isinstance(valid[key], bool):
            check_switches(options, [str(key)], f"{name}.")
        elif is_number(valid[key]):
            check_number(f"{name}.{key}", value)


def _check_option(key: str, value: Any, valid: Iterable[Any]) -> None:
    if value not in valid:
        raise unknown(key, value, valid)


def check_total_variation(regularizers: Sequence[Any], scoring: str, data_shape: Sequence[int]) -> None:
    """Refuse total variation for data that are no images (C, H, W).

    Raises:
        ConfigError: naming what asks for it.
    """
    if len(data_shape) == 3:
        return
    what = f"the data have shape {tuple(data_shape)}, and total variation is one of images (C, H, W)"
    if any(isinstance(regularizer, TotalVariation) for regularizer in regularizers):
        raise ConfigError(f"regularization.total_variation: {what}; valid: regularization.total_variation.scale=0.")
    if scoring in ("TV", "total-variation"):
        raise ConfigError(f"restarts.scoring={scoring}: {what}; valid: euclidean, cosine-similarity.")


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


def warn_of_repeated_labels(restarts: Any, labels: torch.Tensor, group: Any) -> None:
    """Warn of a group term that may compare different photos.

    Args:
        restarts: the config's part.
        labels: (B,) of images, or (B, ...) of text.
        group: the group term, or None.
    """
    if group is not None and restarts.num_trials > 1 and labels.dim() == 1 and len(labels.unique()) < len(labels):
        log.warning(
            "Labels repeat: nothing fixes the order of images with one label, so image k of one candidate may be "
            "another photo in the next, and the group term compares them all the same."
        )


def warn_of_scoring(restarts: Any) -> None:
    """Warn of a score that says nothing about so few candidates: two are equally far from their mean."""
    trials = restarts.num_trials
    if restarts.scoring == "registered-group-regularization" and trials < 3:
        log.warning(
            "restarts.scoring=registered-group-regularization says nothing about %d candidate%s; valid: euclidean, "
            "cosine-similarity.",
            *(trials, "s" if trials > 1 else ""),
        )
