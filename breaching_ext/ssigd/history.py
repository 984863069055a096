"""What a run leaves behind: the log of every iteration, the result, the checkpoint. Atomic JSON files."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from breaching_ext.files import write_atomically
from breaching_ext.ssigd.rows import Array

SERIES = (
    "objective",
    "seconds",
    "gradient_norm",
    "momentum_norm",
    "step",
    "active_changes",
    "margin",
    "violation",
)


def write_json(path: str | Path, data: Any) -> None:
    """Write JSON so that a reader sees the old file or the whole new one, never a part.

    Args:
        path: target; its folder is created.
        data: what to write. Infinities become strings, which JSON does not know otherwise.
    """
    text = _format(_plain(data)) + "\n"
    write_atomically(path, lambda target: target.write_text(text, encoding="utf-8"))


def _format(value: Any, indent: str = "") -> str:
    """Format like json.dumps with an indent, but a list of scalars on one line."""
    deeper = indent + " "
    if isinstance(value, dict) and value:
        items = [f"{deeper}{json.dumps(key)}: {_format(item, deeper)}" for key, item in value.items()]
        return "{\n" + ",\n".join(items) + "\n" + indent + "}"
    if isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        return "[\n" + ",\n".join(deeper + _format(item, deeper) for item in value) + "\n" + indent + "]"
    return json.dumps(value, allow_nan=False, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (np.ndarray, Tensor)):
        return _plain(value.tolist())
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else str(float(value))
    if isinstance(value, np.integer):
        return int(value)
    return value


@dataclass(frozen=True)
class Snapshot:
    """State after an iteration: all that an interrupted run needs to go on as if it had not been interrupted.

    It is replaced as a whole at the end of an iteration, so an interruption can never leave half an update
    in it.

    Attributes:
        iteration: the next iteration.
        x: present iterate, (n,).
        vectors: other vectors of the algorithm: its perturbation, its momentum.
        total, weight: weighted sum of the iterates, (n,), and of the weights.
        best_x, best_objective: iterate with the lowest objective at the unperturbed y* so far.
        active: active rows of the last lower-level solution.
        seconds: time spent in the algorithm so far.
        rng: state of the random generator.
    """

    iteration: int
    x: Array
    vectors: dict[str, Array]
    total: Array
    weight: float
    best_x: Array
    best_objective: float
    active: list[int]
    seconds: float
    rng: dict[str, Any]


def save_checkpoint(
    path: str | Path, settings: dict[str, Any], snapshot: Snapshot, history: dict[str, list[float]]
) -> None:
    """Write the checkpoint of a run with these settings."""
    kept = {name: values[: snapshot.iteration] for name, values in history.items()}
    write_json(path, {"settings": settings, "snapshot": asdict(snapshot), "history": kept})


def load_checkpoint(path: str | Path, settings: dict[str, Any]) -> tuple[Snapshot, dict[str, list[float]]] | None:
    """Return the snapshot and history in `path`, or None where there is no such file.

    Raises:
        ValueError: the checkpoint belongs to a run with other settings.
    """
    if not Path(path).exists():
        return None
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        complete = {"settings", "snapshot", "history"} <= set(data)
    except (ValueError, TypeError):
        complete = False
    if not complete:
        raise ValueError(f"checkpoint={path} is not a checkpoint; delete it or change the path")
    if data["settings"] != json.loads(json.dumps(_plain(settings))):
        raise ValueError(f"checkpoint={path} belongs to a run with other settings; delete it or change the path")
    raw = data["snapshot"]
    for name in ("x", "total", "best_x"):
        raw[name] = np.array(raw[name], dtype=float)
    raw["vectors"] = {name: np.array(value, dtype=float) for name, value in raw["vectors"].items()}
    raw["best_objective"] = float(raw["best_objective"])
    history = {name: [float(value) for value in values] for name, values in data["history"].items()}
    return Snapshot(**raw), history


@dataclass(frozen=True)
class BilevelResult:
    """Result of a run.

    Attributes:
        x: output of the algorithm, (n,): the average for SSIGD, the last iterate for DS-BLO.
        objective: F(x) at the unperturbed y*.
        x_last, x_average, x_best: the last iterate, the weighted average, and the iterate of the lowest
            logged objective, (n,) each.
        objectives: F at these points, by the same names without "x_".
        history: a list for each of SERIES, one entry an iteration. objective: F(x) at the unperturbed y* after
            the iteration; gradient_norm, momentum_norm, margin and violation belong to the point that it started
            from (DS-BLO: that it drew its gradient at);
            seconds: time spent in the algorithm so far, without this log; active_changes: rows that entered
                or left the active
            set since the last iteration; margin: strict-complementarity margin; violation: of A x + B y ≤ b.
        settings: algorithm, its parameters, seed and versions.
    """

    x: Tensor
    objective: float
    x_last: Tensor
    x_average: Tensor
    x_best: Tensor
    objectives: dict[str, float]
    history: dict[str, list[float]]
    settings: dict[str, Any]

    def thinned(self, most: int = 100) -> dict[str, list[float]]:
        """Return the history at about `most` evenly spaced iterations, to six digits, with their numbers.

        Enough for a figure in a small file; `to_json` has all of it.
        """
        count = len(self.history["objective"])
        kept = range(0, count, max(1, count // most))
        series = {name: [float(f"{values[i]:.6g}") for i in kept] for name, values in self.history.items()}
        return {"iteration": list(kept), **series}

    def to_json(self, path: str | Path) -> None:
        """Write everything to a JSON file."""
        write_json(path, asdict(self))


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    from importlib.metadata import version

    return {"torch": torch.__version__, "numpy": np.__version__, "daqp": version("daqp")}
