"""Checks of a full config (case and attack together), made before anything is computed; each error is one line."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from omegaconf import OmegaConf

from .attacks.checks import check_dtype
from .attacks.output_checks import output_of, trial_images
from .data import is_registered_dataset
from .errors import BreachingExtError, ConfigError, SharedDataError, first_line
from .modes import evaluating
from .out_of_memory import is_out_of_memory
from .ranks import current as ranks_of_run
from .values import check_number, check_switches, check_whole

log = logging.getLogger(__name__)

SWITCHES = (
    "dryrun",
    *(f"case.user.provide_{what}" for what in ("labels", "buffers", "num_data_points", "local_hyperparams")),
    *("case.server.provide_public_buffers", "case.server.pretrained", "case.data.normalize", "case.training.untrained"),
    *("case.impl.deterministic", "case.impl.benchmark"),
)
#: What Breaching's case and attack are built from by name.
_NAMES = (
    *("case.model", "case.data.name", "case.data.partition", "case.server.name", "case.user.user_type"),
    "attack.attack_type",
)


def check_values(cfg: Any) -> None:
    """Check values of a config before the case is built from it.

    Raises:
        ConfigError: naming the key, its value and the valid ones.
    """
    for section in ("case", "attack", "attack.impl", *(f"case.{part}" for part in ("data", "impl", "server", "user"))):
        if not OmegaConf.is_dict(OmegaConf.select(cfg, section)):
            raise ConfigError(
                f"{section}={OmegaConf.select(cfg, section)} is not possible; valid: a part with its keys."
            )
    check_switches(cfg, SWITCHES)
    if cfg.case.data.modality != "vision":
        raise ConfigError(
            f"case.data.modality={cfg.case.data.modality}: breaching-ext evaluates images; valid: vision. Text attacks "
            "run through Breaching's own scripts, which know our attacks as well."
        )
    check_dtype("case.impl.dtype", cfg.case.impl.dtype)
    check_whole("seed", cfg.seed, 0)
    check_whole("case.user.num_data_points", cfg.case.user.num_data_points, 1)
    check_whole("case.user.user_idx", cfg.case.user.get("user_idx"), 0, may_be_empty=True)
    check_whole("case.data.default_clients", cfg.case.data.get("default_clients", 1), 1)
    check_whole("case.server.num_queries", cfg.case.server.get("num_queries", 1), 1)
    _check_normalisation(cfg.case.data)
    _check_user(cfg.case.user)
    if cfg.case.user.user_type == "trained_model" and cfg.case.get("training") is None:
        raise ConfigError(
            "case.user.user_type=trained_model needs case.training, how it is trained; valid: case=kkt_fashion_mnist."
        )
    if cfg.case.user.user_type == "local_update" and not cfg.case.user.get("provide_local_hyperparams"):
        raise ConfigError(
            "case.user.provide_local_hyperparams=false: the update of several steps would be matched as one gradient, "
            "whose sign is the opposite, and nothing would leak; valid: true."
        )
    if cfg.case.user.user_type == "multiuser_aggregate":
        raise ConfigError(
            "case.user.user_type=multiuser_aggregate: Breaching's server keeps one client's images of several to "
            "compare with; valid here: local_gradient, local_update. Its own scripts run our attacks on such an update."
        )


def _check_user(user: Any) -> None:
    """Check what the client computes with; Breaching takes what is below 0 for no defence."""
    for name in ("gradient_noise", "input_noise", "per_example_clipping"):
        key = f"local_diff_privacy.{name}"
        check_number(f"case.user.{key}", OmegaConf.select(user, key, default=0), least=0)
    if user.user_type == "local_update":
        for name in ("num_local_updates", "num_data_per_local_update_step"):
            check_whole(f"case.user.{name}", user.get(name, 1), 1)
        check_number("case.user.local_learning_rate", user.get("local_learning_rate", 1), above=0)


def _check_normalisation(data: Any) -> None:
    """Check mean and deviation of the images; empty, Breaching computes those of its own datasets."""
    if not data.normalize:
        return
    channels = len(data.shape) and data.shape[0] if OmegaConf.is_list(data.shape) else None
    for key, above in (("mean", None), ("std", 0)):
        values = data.get(key)
        if values is None and not is_registered_dataset(data.name):
            continue
        if not OmegaConf.is_list(values) or len(values) not in (1, channels):
            raise ConfigError(f"case.data.{key}={values} is not possible; valid: a list of one number a channel.")
        for value in values:
            check_number(f"case.data.{key}", value, above=above)


def cannot_be_built(cfg: Any, error: Exception) -> ConfigError:
    """Return what to raise where Breaching cannot build its case or attack: one line with the names it went by."""
    names = ", ".join(f"{key}={OmegaConf.select(cfg, key)}" for key in _NAMES)
    reason = f"{type(error).__name__}: {first_line(error)}"
    return ConfigError(
        f"Breaching cannot build this case or attack ({reason}; hydra.verbose=true shows where); it has {names}."
    )


@contextmanager
def failures_named(cfg: Any, attacker: Any) -> Iterator[None]:
    """Within the block, turn what an attack of Breaching's own throws into one line: its checks are few.

    Raises:
        BreachingExtError: in its place; a lack of memory, and errors of all other attacks, stay what they are.
    """
    try:
        yield
    except Exception as error:
        theirs = type(attacker).__module__.startswith("breaching.")
        if not theirs or isinstance(error, BreachingExtError) or is_out_of_memory(error):
            raise
        log.debug("Where it happened:", exc_info=error)
        raise BreachingExtError(
            f"Breaching's own attack {cfg.attack.type} (attack_type={cfg.attack.attack_type}) failed on this case "
            f"({type(error).__name__}: {first_line(error)}; hydra.verbose=true shows where)."
        ) from error


def check_case(cfg: Any, user: Any, attacker: Any) -> None:
    """Refuse what cannot work together, before the client computes anything.

    Args:
        cfg: a full config.
        user, attacker: Breaching's, as they were built from it.

    Raises:
        ConfigError: naming what can be done.
    """
    if ranks_of_run().size > 1 and not getattr(attacker, "shares_candidates", False):
        raise ConfigError(
            f"attack_type={cfg.attack.attack_type} runs in one process only; valid under torchrun: joint-candidates "
            "with attack.restarts.parallel_candidates=true."
        )
    weights_only = cfg.case.user.user_type == "trained_model"
    if weights_only and not getattr(attacker, "attacks_weights", False):
        raise ConfigError(
            f"The attack {cfg.attack.type} needs a gradient, and case.user.user_type=trained_model shares weights "
            "alone; valid: attack=kkt."
        )
    if weights_only and not cfg.case.user.provide_num_data_points:
        raise ConfigError(
            "case.user.provide_num_data_points=false: attack=kkt must be told how many images to suspect; valid: true."
        )
    if cfg.attack.attack_type == "joint-optimization" and cfg.case.user.provide_labels:
        raise ConfigError(
            f"case.user.provide_labels=true: attack={cfg.attack.type} optimises labels and takes none; valid: false."
        )
    images = cfg.case.user.num_data_points
    data: Any = getattr(getattr(user, "dataloader", None), "dataset", None)  # a user of users has none of its own
    owned = len(data) if hasattr(data, "__len__") else images
    if images > owned:
        raise ConfigError(f"case.user.num_data_points={images} is more than this client owns; valid: 1 to {owned}.")
    _check_network(cfg, user)


def _check_network(cfg: Any, user: Any) -> None:
    """Refuse a network that does not take the data, before the client computes with it."""
    model = getattr(user, "model", None)
    if not isinstance(model, torch.nn.Module):
        return
    parameter = next(model.parameters(), torch.empty(0))
    images = trial_images((1, *cfg.case.data.shape), parameter.device, parameter.dtype)
    try:
        with evaluating(model):  # one image is not enough for batch norm in training
            output_of(model, images)
    except SharedDataError as error:
        raise ConfigError(
            f"case.model={cfg.case.model} does not go with case.data.shape={list(cfg.case.data.shape)}: {error}"
        ) from error
