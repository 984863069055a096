"""What `auto` decided, kept in the user's cache folder.

The same command on the same machine takes the same engine again, and with it the same numbers: engines agree to
rounding only, and timing is not reproducible. `restarts.candidate_batching` fixes the engine everywhere.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..files import write_json
from .calibration import Calibration

log = logging.getLogger(__name__)


def choice_file(parts: Sequence[Any]) -> Path | None:
    """Return where the choice for a problem (anything whose text identifies it) is kept; None: nowhere."""
    base: str | Path | None = os.environ.get("BREACHING_EXT_CACHE") or os.environ.get("XDG_CACHE_HOME")
    if not base:
        try:
            base = Path.home() / ".cache"
        except RuntimeError as error:  # a user without a home, as in some containers
            _not_kept(error)
            return None
    digest = hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:20]
    return Path(base) / "breaching_ext" / "engines" / f"{digest}.json"


def remembered(path: Path, valid: Sequence[str]) -> Calibration | None:
    """Return an earlier choice, or None where there is none that can be read."""
    try:
        found = Calibration(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    if found.engine not in valid:
        return None
    found.reason = f"as an earlier run found ({path})"
    return found


def remember(path: Path, calibration: Calibration, valid: Sequence[str]) -> Calibration | None:
    """Keep a choice for the next run, unless another process has: then return that one's, which holds."""
    earlier = remembered(path, valid)
    if earlier is not None:
        return earlier
    try:
        write_json(path, calibration.as_dict())
    except OSError as error:
        _not_kept(error)
    return None


def _not_kept(error: Exception) -> None:
    log.warning(
        "The choice of the engine is not kept (%s), so the same command may take another one; BREACHING_EXT_CACHE "
        "says where to.",
        error,
    )


def machine(device: torch.device) -> list[Any]:
    """Return what decides which engine is fast besides the problem: device, threads, and versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return [name, torch.get_num_threads(), torch.__version__, __version__]


def _processor() -> str:
    """The processor's name and vector instructions: nodes of a cluster may share a home and not these."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name} {torch.backends.cpu.get_cpu_capability()}"
