"""Files that are whole or absent: written beside their place and moved there."""

from __future__ import annotations

import json
import math
import os
import pickle
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .errors import ConfigError


def write_atomically(path: str | os.PathLike, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a temporary file in the same folder, then move it to `path`.

    A reader, or a run that was killed, sees the old file or the new one, never a part. The temporary file keeps the
    suffix of `path`, by which image writers choose their format.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}-{uuid.uuid4().hex[:12]}{path.suffix}")
    beside.touch(exist_ok=False)  # readable by whom the user's umask lets
    try:
        write(beside)
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    return path


def write_json(path: str | os.PathLike, content: Any) -> Path:
    """Write strict JSON atomically; numbers that are not finite, which JSON does not have, become null."""
    text = json.dumps(_finite(content), indent=2) + "\n"
    return write_atomically(path, lambda target: target.write_text(text, encoding="utf-8"))


def read_tensors(path: str | os.PathLike, name: str, what: str, keys: Iterable[str] = ()) -> Any:
    """Read a file of torch's onto the CPU; nothing in it is executed.

    Args:
        path: the file.
        name: the config key that names it, for the error.
        what: what it should be, for the error.
        keys: what a dict in it must have.

    Raises:
        ConfigError: for a file that torch cannot read, or that holds something else.
    """
    import torch  # here: commands that read no tensors start without it

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ConfigError(f"{name}={path} is not {what}; remove it or name another file.") from error
    if keys and not (isinstance(content, dict) and set(keys) <= set(content)):
        raise ConfigError(f"{name}={path} is not {what}; remove it or name another file.")
    return content


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
