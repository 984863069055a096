"""Files that are whole or absent: written beside their place and moved there."""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any


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


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
