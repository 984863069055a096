"""Checks of a full config (case and attack together), made before anything is computed; each error is one line."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from .attacks.checks import check_dtype
from .errors import ConfigError, first_line
from .ranks import current as ranks_of_run
from .values import check_switches, check_whole

SWITCHES = (
    "dryrun",
    *(f"case.user.provide_{what}" for what in ("labels", "buffers", "num_data_points", "local_hyperparams")),
    *("case.server.provide_public_buffers", "case.data.normalize", "case.training.untrained"),
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


def cannot_be_built(cfg: Any, error: Exception) -> ConfigError:
    """Return what to raise where Breaching cannot build its case or attack: one line with the names it went by."""
    names = ", ".join(f"{key}={OmegaConf.select(cfg, key)}" for key in _NAMES)
    reason = f"{type(error).__name__}: {first_line(error)}"
    return ConfigError(
        f"Breaching cannot build this case or attack ({reason}; hydra.verbose=true shows where); it has {names}."
    )


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
