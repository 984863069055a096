"""What counts as a number, or as a switch, in a config; each error is one line."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any, TypeGuard

from omegaconf import OmegaConf

from .errors import ConfigError


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number; true and false are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether a value is a whole number, written as one."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_whole(key: str, value: Any, least: int, may_be_empty: bool = False) -> None:
    """Raise ConfigError, which names the key and its value, for anything but a whole number from `least` on."""
    if value is None and may_be_empty:
        return
    if not is_whole(value) or not least <= value < 2**63:
        empty = "empty, or " if may_be_empty else ""
        raise ConfigError(f"{key}={value} is not possible; valid: {empty}{least}, {least + 1}, {least + 2}, ...")


def check_seed(key: str, value: Any) -> None:
    """Raise ConfigError for anything but a whole number that torch takes for a seed, or nothing."""
    if value is not None and not (is_whole(value) and -(2**63) <= value < 2**63):
        raise ConfigError(f"{key}={value} is not possible; valid: empty, or a whole number.")


def check_number(
    key: str, value: Any, above: float | None = None, least: float | None = None, may_be_empty: bool = False
) -> None:
    """Raise ConfigError, which names the key and its value, for anything but a finite number in the range."""
    if value is None and may_be_empty:
        return
    in_range = is_number(value) and (above is None or value > above) and (least is None or value >= least)
    if not in_range:
        empty = "empty, or " if may_be_empty else ""
        where = f" above {above:g}" if above is not None else "" if least is None else f" from {least:g}"
        raise ConfigError(f"{key}={value} is not possible; valid: {empty}a number{where}.")


def check_switch(key: str, value: Any) -> None:
    """Raise ConfigError, which names the key and its value, for what is neither true nor false."""
    if not isinstance(value, bool):
        raise ConfigError(f"{key}={value} is not possible; valid: true, false.")


def check_switches(cfg: Any, keys: Iterable[str]) -> None:
    """Check switches: Hydra reads `no`, `off` and every slip of the pen as text, which would count as true.

    Args:
        cfg: a config.
        keys: dotted keys; those that are not there are left alone.

    Raises:
        ConfigError: for the first that is neither true nor false; empty is neither.
    """
    for key in keys:
        check_switch(key, OmegaConf.select(cfg, key, default=False))
