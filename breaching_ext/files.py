"""Files that are whole or absent: written beside their place and moved there."""

from __future__ import annotations

import contextlib
import json
import math
import os
import uuid
from collections.abc import Callable, Iterator
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


@contextlib.contextmanager
def only_here(folder: str | os.PathLike) -> Iterator[None]:
    """Keep other processes that ask for the same out of a folder, which is made, until the block ends.

    The lock ends with its process, however that ends. Where the system or the file system knows none, nothing is kept.

    Raises:
        ConfigError: when another process has it.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder) / ".lock", "w", encoding="utf-8") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"out={folder} is in use: another process works there; wait, or take another.") from None
        except (ImportError, OSError):
            pass
        yield


def write_json(path: str | os.PathLike, content: Any) -> Path:
    """Write strict JSON atomically; numbers that are not finite, which JSON does not have, become null."""
    text = json.dumps(_finite(content), indent=2) + "\n"
    return write_atomically(path, lambda target: target.write_text(text, encoding="utf-8"))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
