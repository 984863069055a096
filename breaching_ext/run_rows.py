"""What the runs below a folder say of themselves, one row a run; files that are damaged are rows that say so."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from .errors import first_line

COLUMNS = (
    "folder", "attack", "case", "model", "num_data_points", "labels_known", "seed", "candidate_seed", "user_idx",
    "psnr", "worst_psnr", "ssim", "lpips", "mse", "label_acc", "opt_value", "seconds", "gradient_evaluations", "engine",
    "device", "overrides", "error",
)  # fmt: skip
_METRICS = ("psnr", "ssim", "lpips", "mse", "label_acc", "opt_value", "seconds", "gradient_evaluations")
CONFIG_NAME = "breaching_ext"  # of the application, see cli.py
REPEATED = ("seed", "candidate_seed", "user_idx")
_REPEATS = (
    "seed", "case.user.user_idx", "attack.restarts.seed", "name", "base_dir", "launch", "attack.impl.progress",
    "attack.impl.checkpoint_every", "attack.impl.checkpoint_path", "case.training.checkpoint_path",
    "case.training.cache_path",
)  # fmt: skip


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """Return one row a run found below `folder`, in path order, with the keys of :data:`COLUMNS`."""
    homes = {path.parent for path in folder.rglob("metrics.json")}
    homes |= {path.parent for path in folder.rglob(".hydra") if _is_of_a_run(path)}
    rows = (_row(home, folder) for home in sorted(homes))
    return [row for row in rows if row is not None]


def _is_of_a_run(hydra: Path) -> bool:
    """Whether Hydra made a folder for a run of ours; studies and other programs write no metrics.json."""
    try:
        text = (hydra / "hydra.yaml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return True  # killed before it was written, or damaged
    return f"config_name: {CONFIG_NAME}\n" in text or "config_name:" not in text  # killed while it was


def _row(home: Path, root: Path) -> dict[str, Any] | None:
    """Return a run's row; None for a metrics.json of another program."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row["folder"] = str(home.relative_to(root))
    row["overrides"] = _what_was_changed(_overrides(home))
    failure = home / "error.json"
    file = failure if failure.exists() else home / "metrics.json"
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {**row, "error": "no metrics.json: the run was killed or is still running"}
    except (OSError, ValueError, RecursionError) as error:  # a folder, other bytes, other text, without end
        return {**row, "error": f"{file.name} is damaged: {first_line(error)}"}
    if not isinstance(record, dict) or not {"error", "attack"} & set(record):
        return None
    try:
        return _filled(dict(row), record)
    except (AttributeError, TypeError, ValueError, RecursionError) as error:  # text where there should be a number
        return {**row, "error": f"{file.name} is damaged: {first_line(error)}"}


def _filled(row: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """Put what a metrics.json says into its row.

    Raises:
        TypeError: where a metric is no number, or another column no single value.
    """
    row.update({key: record[key] for key in COLUMNS if key in record})
    if "error" in record:
        row["error"] = " ".join(str(record["error"]).split())  # one line of the table
    if "overrides" in record:  # the file beside it may be that of a later run in this folder
        row["overrides"] = _what_was_changed(record["overrides"])
    config = record.get("config") or {}
    row["candidate_seed"] = ((config.get("attack") or {}).get("restarts") or {}).get("seed")
    _check_values(row)
    values = flattened(config).items()
    row["settings"] = {key: value for key, value in values if value is not None and not _says_nothing(key)}
    if record.get("interrupted"):
        why = "out of memory" if record.get("out_of_memory") else "interrupted"
        row["error"] = f"{why}: its files hold the best so far"
    if record.get("no_reconstruction"):
        row["error"] = row["error"] or "no candidate stayed finite: the result is zeros"
    if "error" not in record and not _finite(record.get("psnr")):
        row["error"] = row["error"] or "its PSNR is not finite"
    elif record.get("per_image", {}).get("psnr"):
        images = record["per_image"]["psnr"]
        if not all(map(_is_real, images)):
            raise TypeError(f"per_image.psnr is {images}")
        row["worst_psnr"] = min(images)
    return row


def _check_values(row: dict[str, Any]) -> None:
    """Raise TypeError for text where there should be a number, and for lists where there should be one value."""
    for key, value in row.items():
        if key in _METRICS and not (value is None or _is_real(value)):
            raise TypeError(f"{key} is {value!r}")
        if isinstance(value, (list, dict)):
            raise TypeError(f"{key} is {type(value).__name__}")


def _is_real(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _overrides(home: Path) -> list[str]:
    """Return the overrides of the last run in a folder, as Hydra wrote them."""
    try:
        text = (home / ".hydra" / "overrides.yaml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):  # not there, or damaged
        return []
    return [line[2:].strip() for line in text.splitlines() if line.startswith("- ")]


def _finite(psnr: float | None) -> bool:
    return psnr is not None and math.isfinite(psnr)


def _what_was_changed(overrides: list[str]) -> str:
    """Return overrides as one text, without what only repeats a run (seed, client)."""
    return " ".join(sorted(line for line in overrides if not _says_nothing(line.lstrip("+").split("=")[0])))


def flattened(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a config's values by their dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        inner = isinstance(value, dict) and value
        flat.update(flattened(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value})
    return flat


def _says_nothing(key: str) -> bool:
    """Whether a key decides nothing, or only repeats a run (seed, client), so that runs that differ in it compare."""
    return key in _REPEATS or key.startswith(("hydra.", "hydra/"))
