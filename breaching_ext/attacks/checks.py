"""Checks of configurations, made before the long loop starts; each error is one line."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
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
from ..values import check_number, check_seed, check_switches, check_whole
from .augmentation_checks import check_augmentation_options
from .config_keys import ConfigKeys, check_arguments, check_keys, check_option, is_section, keys_of_breaching

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


def check_config(cfg: Any, keys: ConfigKeys | None = None) -> None:
    """Check an attack configuration.

    Args:
        cfg: the attack's config.
        keys: names of its keys; None: any, of which only those that the joint attack reads are checked.

    Raises:
        ConfigError: naming the key, its value and the valid ones.
    """
    if keys is not None:
        check_keys(cfg, keys)
    check_switches(cfg, SWITCHES)
    check_option("impl.JIT", cfg.impl.get("JIT") or "none", ("none", "script", "trace"))
    check_impl(cfg.impl)
    parse_bytes(cfg.impl.get("memory_budget"))
    _check_names(cfg)
    _check_restarts(cfg.restarts)
    _check_optim(cfg.optim, has_own_step_size=cfg.get("attack_type") == "magia")
    _check_objective(cfg.objective)
    _check_regularizers(cfg.regularization)


def _check_restarts(restarts: Any) -> None:
    check_whole("restarts.num_trials", restarts.num_trials, 1)
    check_seed("restarts.seed", restarts.get("seed"))
    check_option("restarts.scoring", restarts.scoring, SCORINGS)
    check_option("restarts.output", restarts.get("output", "best"), OUTPUTS)
    check_option("restarts.candidate_batching", restarts.get("candidate_batching", "auto"), BATCHING_MODES)


def _check_optim(optim: Any, has_own_step_size: bool) -> None:
    check_whole("optim.max_iterations", optim.max_iterations, 1)
    check_whole("optim.callback", optim.callback, 1)
    for name in ("langevin_noise", "warmup"):
        check_number(f"optim.{name}", optim.get(name, 0), least=0)
    check_number("optim.step_size", optim.get("step_size"), above=0, may_be_empty=has_own_step_size)
    check_number("optim.grad_clip", optim.get("grad_clip"), above=0, may_be_empty=True)
    check_option("optim.optimizer", str(optim.optimizer).lower(), OPTIMIZERS)
    check_option("optim.step_size_decay", optim.step_size_decay or "none", SCHEDULES)
    check_option("optim.signed", optim.signed or "none", SIGNS)


def _check_objective(objective: Any) -> None:
    if not is_section(objective):
        raise ConfigError(f"objective={objective} is not possible; valid: such as objective.type=euclidean.")
    # Breaching's pearlmutter-* change leaf parameters in place, which torch refuses in the first iteration.
    valid = [key for key in objective_lookup if not key.startswith("pearlmutter")]
    check_option("objective.type", objective.type, valid)
    kind = objective_lookup[objective.type]
    parameters = inspect.signature(kind.__init__).parameters

    def anothers(key: str) -> bool:  # a key of another objective, which Breaching's configs leave there
        return key == "type" or (key not in parameters and key in keys_of_breaching("objective"))

    check_arguments("objective", kind, {key: value for key, value in objective.items() if not anothers(key)})


def _check_regularizers(regularization: Any) -> None:
    if regularization is not None and not is_section(regularization):
        raise ConfigError(
            f"regularization={regularization} is not possible; valid: such as regularization.total_variation.scale=0.1."
        )
    for key in regularization or ():
        _check_regularizer(key, regularization[key])


def _check_regularizer(key: str, options: Any) -> None:
    check_option("regularization key", key, {**regularizer_lookup, **REGULARIZERS})
    if options is None or options == {}:
        return
    if not is_section(options):
        raise ConfigError(
            f"regularization.{key}={options} is not possible; valid: regularization.{key}.scale=0 (off), or above."
        )
    check_number(f"regularization.{key}.scale", options.get("scale"), least=0)  # 0 switches it off
    if key == "group_regularization":
        GroupRegularization({}, **options)  # where it is off, choosing reads its aligner
    else:
        check_arguments(f"regularization.{key}", regularizer_lookup[key], options)


def _check_names(cfg: Any) -> None:
    """Check names that Breaching looks up, or compares, only when it needs them."""
    check_augmentation_options(cfg.get("augmentations"))
    strategy = cfg.get("label_strategy") or "none"  # some configs of Breaching's say "None"
    check_option("label_strategy", "none" if strategy == "None" else strategy, LABEL_STRATEGIES)
    start = str(cfg.init)
    side = "".join(filter(str.isdigit, start))  # what Breaching reads of it: the side of a square
    pattern = any(word in start for word in ("patterned", "wei")) and bool(side) and int(side) > 0
    plain = (*STARTS, "grey") if cfg.get("attack_type") == "magia" else STARTS
    if start not in plain and not pattern and not any(colour in start for colour in COLOURS):
        raise unknown("init", start, (*plain, "patterned-4", "rand-wei-4", *COLOURS, *(f"{c}-true" for c in COLOURS)))


def check_impl(impl: Any) -> None:
    """Raise ConfigError where checkpoints are due at no whole number or go to no file, or the type is none."""
    check_whole("impl.checkpoint_every", impl.get("checkpoint_every"), 1, may_be_empty=True)
    path = impl.get("checkpoint_path")
    if path is not None and not isinstance(path, (str, Path)):
        raise ConfigError(f"impl.checkpoint_path={path} is not possible; valid: empty, or a file's name.")
    check_dtype("impl.dtype", impl.dtype)
    progress = impl.get("progress", "auto")
    check_option("impl.progress", progress if isinstance(progress, bool) else str(progress), ("auto", True, False))


def check_dtype(key: str, name: Any) -> None:
    """Raise ConfigError where `name` is not one of torch's floating types."""
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"{key}={name} is not possible; valid: float, double, float32, ...")


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
