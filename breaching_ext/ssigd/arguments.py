"""Checks of what a caller passes, before anything long begins; each error is one line that names the argument.

Raises:
    SSIGDError: the value is not possible. NonFiniteError: it holds NaN or infinity.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from breaching_ext.ssigd.errors import NonFiniteError, SSIGDError
from breaching_ext.ssigd.rows import Array
from breaching_ext.values import is_number, is_whole


def check_number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    where: str = "",
) -> None:
    """Refuse what is not a finite number in the range.

    Args:
        name: of the argument.
        value: what was passed.
        above, least, below: limits, None (default) for none; `least` itself is possible, the others are not.
        where: added to the error, such as " in the regime 'convex'".
    """
    inside = is_number(value) and all(
        (above is None or value > above, least is None or value >= least, below is None or value < below)
    )
    if not inside:
        limits = (("above", above), ("from", least), ("below", below))
        valid = " ".join(f"{word} {limit:g}" for word, limit in limits if limit is not None)
        raise SSIGDError(f"{name}={value!r} is not possible{where}; valid: a number {valid}".rstrip())


def check_whole(name: str, value: Any, least: int) -> None:
    """Refuse what is not a whole number from `least` on."""
    if not is_whole(value) or value < least:
        raise SSIGDError(f"{name}={value!r} is not possible; valid: a whole number from {least}")


def check_tensor(name: str, value: Any, *shapes: tuple[int | str, ...], finite: bool = True) -> None:
    """Refuse what is not a tensor of real numbers.

    Args:
        name: of the argument.
        value: what was passed.
        *shapes: the possible ones, in which text such as "N" stands for any number; none: every shape is possible.
        finite: refuse NaN and infinity, default True.
    """
    if not isinstance(value, Tensor) or value.is_complex() or value.dtype == torch.bool:
        kind = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise SSIGDError(f"{name} is {kind}; expected a tensor of real numbers")
    shape = tuple(value.shape)
    if shapes and shape not in shapes and not any(_fits(shape, possible) for possible in shapes):
        expected = " or ".join(f"({', '.join(map(str, s))}{',' if len(s) == 1 else ''})" for s in shapes)
        raise SSIGDError(f"{name} has shape {shape}; expected {expected}")
    if finite and not _all_finite(value):
        raise NonFiniteError(f"{name} holds NaN or infinity")


def _all_finite(value: Tensor) -> bool:
    """Whether no entry is NaN or infinite; NumPy is several times as fast for few of them."""
    if value.device.type == "cpu" and value.numel() < 1000 and value.dtype != torch.bfloat16:
        return bool(np.isfinite(value.detach().numpy()).all())
    return bool(torch.isfinite(value).all())


def _fits(shape: tuple[int, ...], possible: tuple[int | str, ...]) -> bool:
    return len(shape) == len(possible) and all(
        isinstance(want, str) or size == want for size, want in zip(shape, possible, strict=True)
    )


def real_array(name: str, value: Any) -> Array:
    """Return a float64 copy of what can be read as real numbers: arrays, tensors, lists; the shape is the caller's."""
    try:
        if isinstance(value, Tensor):
            value = value.detach().cpu().numpy()
        if np.iscomplexobj(value):
            raise TypeError
        return np.array(value, dtype=float)
    except (TypeError, ValueError):
        raise SSIGDError(f"{name} is no array of real numbers: {str(value)[:40]!r}") from None
