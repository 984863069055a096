"""What counts as a number, or as a switch, in a config."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral
from typing import Any, TypeGuard

from omegaconf import OmegaConf

from .errors import ConfigError


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether a value is a whole number, written as one."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_switches(cfg: Any, keys: Iterable[str], prefix: str = "") -> None:
    """Check switches: Hydra reads `no`, `off` and every slip of the pen as text, which would count as true.

    Args:
        cfg: a config.
        keys: dotted keys; those that are not there, or empty, are left alone.
        prefix: what the error puts before the key.

    Raises:
        ConfigError: for the first that is neither true nor false.
    """
    for key in keys:
        value = OmegaConf.select(cfg, key)
        if value is not None and not isinstance(value, bool):
            raise ConfigError(f"{prefix}{key}={value} is not possible; valid: true, false.")
