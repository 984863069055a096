"""What counts as a number in a config."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any, TypeGuard


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether a value is a whole number, written as one."""
    return isinstance(value, Integral) and not isinstance(value, bool)
