"""Files that are either whole or not there: written beside their place and moved into it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from breaching_ext import files


def write_atomically(path: str | Path, write: Callable[[IO[bytes]], object]) -> Path:
    """Let ``write`` fill a temporary file in the folder of ``path``, then move it there.

    A reader, and a run that resumes after a kill, sees the old file or the new one, never half of one.
    """

    def fill(target: Path) -> None:
        with target.open("wb") as file:
            write(file)

    return files.write_atomically(path, fill)


def write_json(path: str | Path, values: Any) -> Path:
    """Write strict JSON (no NaN or Infinity, which other readers reject)."""
    text = json.dumps(values, allow_nan=False, ensure_ascii=False, default=plain) + "\n"
    return write_atomically(path, lambda file: file.write(text.encode()))


def plain(value: Any) -> Any:
    """Return NumPy's number as Python's, for JSON."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is no JSON type")


def read_json(path: str | Path) -> Any:
    """Read a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_npz(path: str | Path, arrays: dict[str, np.ndarray]) -> Path:
    """Write arrays into one compressed file."""
    return write_atomically(path, lambda file: np.savez_compressed(file, **arrays))  # type: ignore[arg-type]


def to_json_floats(value: Any) -> Any:
    """Replace non-finite numbers, also in a list, by None (JSON's null)."""
    if isinstance(value, list):
        return [to_json_floats(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def from_json_floats(values: list[float | None]) -> list[float]:
    """Replace None by NaN."""
    return [math.nan if value is None else value for value in values]
