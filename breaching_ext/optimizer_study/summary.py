"""Numbers of a study: what each variant reached, and its coupling over the seeds."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..intervals import mean_interval
from .config import require
from .coupling import coupling
from .records import GridSearchResult, OptimizerExperiment
from .storage import to_json_floats, write_atomically, write_json
from .training_log import TrainingLog

log = logging.getLogger(__name__)

_SETTINGS = ("optimizer", "schedule", "budget", "model", "data_sha256")
WEAK_RATIO = 1.05
"""A second, smaller harm: normalized decay is so small that few rows of a grid reach the usual one."""


def merge_seeds(experiments: Sequence[OptimizerExperiment]) -> OptimizerExperiment:
    """Average the losses of one variant over seeds; a cell that diverged for any seed stays diverged.

    Raises:
        ValueError: If variants, grids or settings differ, or there is no experiment.
    """
    require(bool(experiments), "experiments", "an empty list", "at least one experiment")
    first = experiments[0]
    for other in experiments[1:]:
        same = other.optimizer_id == first.optimizer_id and _grid(other) == _grid(first)
        require(same, "experiments", other.optimizer_id, f"of the same variant and grid as {first.optimizer_id}")
        ours, theirs = _repeated(first), _repeated(other)
        differ = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
        what = f"{other.optimizer_id} with other {', '.join(differ)}"
        require(not differ, "experiments", what, "runs that differ in seed and device only")
    seeds = [experiment.config["seed"] for experiment in experiments]
    require(len(set(seeds)) == len(seeds), "experiments", seeds, "one run of each seed (is a copy in the folder?)")
    cells = [{result.cell: result for result in experiment.results} for experiment in experiments]
    results = [_mean_result([by_cell[result.cell] for by_cell in cells]) for result in first.results]
    config = {**first.config, "seeds": seeds}
    return OptimizerExperiment(first.optimizer_id, first.optimizer_name, config, results)


def _grid(experiment: OptimizerExperiment) -> tuple[list[float], list[float]]:
    """The axes of a grid."""
    return experiment.lr_multipliers, experiment.wd_multipliers


def _repeated(experiment: OptimizerExperiment) -> dict[str, Any]:
    """What seeds of one study have in common, so that their losses can be averaged; of a grid alone, its settings."""
    config = experiment.config
    study = {k: v for k, v in config.get("study", {}).items() if k not in ("seed", "device")}
    return study | data_of(experiment) if study else {key: config[key] for key in _SETTINGS if key in config}


def data_of(experiment: OptimizerExperiment) -> dict[str, Any]:
    """What identifies the images of a run, where its file says so."""
    found = experiment.config.get("data_sha256")
    return {"data_sha256": found} if found else {}


def _mean_result(results: Sequence[GridSearchResult]) -> GridSearchResult:
    """One cell, averaged over seeds."""
    first, logs = results[0], [result.log for result in results]
    log = TrainingLog(
        epoch_train_losses=np.mean([log.epoch_train_losses for log in logs], axis=0).tolist(),
        epoch_test_losses=np.mean([log.epoch_test_losses for log in logs], axis=0).tolist(),
        runtime_seconds=float(np.sum([log.runtime_seconds for log in logs])),
    )
    return GridSearchResult(*first.cell, first.learning_rate, first.weight_decay, log)


def widened(experiment: OptimizerExperiment, beyond: Sequence[OptimizerExperiment]) -> OptimizerExperiment:
    """A grid with the columns that were trained beyond it for the same variant, seed and setting, if any.

    Raises:
        ValueError: If the rows differ, or a column is in both.
    """
    seed = experiment.config["seed"]
    fits = (e for e in beyond if (e.optimizer_id, e.config["seed"]) == (experiment.optimizer_id, seed))
    more = next(fits, None)
    if more is None:
        return experiment
    same = more.lr_multipliers == experiment.lr_multipliers and _setting(more) == _setting(experiment)
    require(same, f"beyond of {more.optimizer_id}", more.lr_multipliers, "the rows and settings of the grid itself")
    both = sorted(set(more.wd_multipliers) & set(experiment.wd_multipliers))
    require(not both, "beyond", both, "weight decays that the grid does not have")
    return replace(experiment, results=[*experiment.results, *more.results])


def _widened_alike(
    experiments: Sequence[OptimizerExperiment], beyond: Sequence[OptimizerExperiment]
) -> list[OptimizerExperiment]:
    """All grids with their further columns, or, where seeds have different ones, none: their slopes do not compare."""
    wide = [widened(e, beyond) for e in experiments]
    if len({tuple(e.wd_multipliers) for e in wide}) == 1:
        return wide
    log.warning(
        "%s: not every seed was trained beyond the grid to the same weight decays; the coupling is that of the grid.",
        experiments[0].optimizer_id,
    )
    return list(experiments)


def _setting(experiment: OptimizerExperiment) -> dict[str, Any]:
    """What identifies a study but for its columns."""
    study = experiment.config.get("study", {})
    return {k: v for k, v in study.items() if k not in ("wd_multipliers", "device")} | data_of(experiment)


def summarize(experiments: Sequence[OptimizerExperiment], beyond: Sequence[OptimizerExperiment] = ()) -> dict[str, Any]:
    """What one variant reached over its seeds (JSON types).

    The best cell is that of the lowest final test loss: it is chosen, and judged, by the test images.

    Args:
        experiments: The grids, one a seed.
        beyond: More columns for the coupling numbers, of any variant and seed.
    """
    merged = merge_seeds(experiments)
    data, lrs, wds = merged.get_heatmap_data()
    best = divmod(int(np.nanargmin(data)), data.shape[1]) if np.isfinite(data).any() else None
    wide = _widened_alike(experiments, beyond)
    found = [coupling(e) for e in wide] if wds[:1] == [0.0] else []
    slopes = [c.slope for c in found if math.isfinite(c.slope)]
    mean, half_width = mean_interval(slopes) if slopes else (math.nan, math.nan)
    weak = [coupling(e, WEAK_RATIO).slope for e in wide] if found else []
    members = len(merged.results) * len(experiments)
    values = {
        "optimizer_id": merged.optimizer_id,
        "optimizer_name": merged.optimizer_name,
        "decay": merged.config["optimizer"]["decay"],
        "schedule": merged.config["schedule"],
        "seeds": merged.config["seeds"],
        "best_final_test_loss": math.nan if best is None else float(data[best]),
        "best_lr_multiplier": math.nan if best is None else lrs[best[0]],
        "best_wd_multiplier": math.nan if best is None else wds[best[1]],
        "diverged_cells": sum(len(e.diverged) for e in experiments),
        "cells": members,
        "coupling": mean,
        "coupling_half_width": half_width,
        "coupling_by_seed": [c.slope for c in found],
        "coupling_standard_errors": [c.standard_error for c in found],
        "coupling_rows": [len(c.lr_multipliers) for c in found],
        "coupling_wd_multipliers": wide[0].wd_multipliers,
        "weak_ratio": WEAK_RATIO,
        "weak_coupling_by_seed": weak,
        "seconds": sum(e.config["wall_seconds"] for e in experiments),
        "device": merged.config["device"],
        "versions": merged.config["versions"],
        "lr_multipliers": lrs,
        "wd_multipliers": wds,
        "final_test_loss": [[float(f"{value:.6g}") for value in row] for row in data],
    }
    return {key: to_json_floats(value) for key, value in values.items()}


def write_tables(rows: Sequence[dict[str, Any]], out: str | Path) -> list[Path]:
    """Write ``table.md`` and ``summary.json``.

    Args:
        rows: `summarize` of each variant.
        out: Folder to write to.
    """
    text = "\n".join(_markdown(rows)) + "\n"
    table = write_atomically(Path(out) / "table.md", lambda file: file.write(text.encode()))
    return [table, write_json(Path(out) / "summary.json", rows)]


_HEAD = (
    "variant",
    "decay",
    "epochs",
    "best final test loss",
    "at lr ×, wd ×",
    "coupling",
    "rows",
    f"at {WEAK_RATIO:g}×",
    "diverged",
    "seconds",
)


def _markdown(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [f"| {' | '.join(_HEAD)} |", f"|{'---|' * len(_HEAD)}"]
    for row in rows:
        cells = (
            f"{row['optimizer_id']} {row['optimizer_name']}",
            row["decay"],
            row["schedule"]["epochs"],
            _number(row["best_final_test_loss"], ".5f"),
            f"{_number(row['best_lr_multiplier'], 'g')}, {_number(row['best_wd_multiplier'], 'g')}",
            _coupling_cell(row),
            _rows_cell(row),
            ", ".join(_number(value, "+.2f") for value in row["weak_coupling_by_seed"]),
            f"{row['diverged_cells']}/{row['cells']}",
            f"{row['seconds']:.0f}",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def _coupling_cell(row: dict[str, Any]) -> str:
    """Mean and interval over seeds, and the seeds."""
    seeds = ", ".join(_number(value, "+.2f") for value in row["coupling_by_seed"])
    if row["coupling"] is None:
        return "not reached"
    if row["coupling_half_width"] is None:
        return seeds
    return f"{row['coupling']:+.2f} ± {row['coupling_half_width']:.2f} ({seeds})"


def _rows_cell(row: dict[str, Any]) -> str:
    """Rows that reach the level, by seed, and up to which weight decay they were followed beyond the grid."""
    rows, last = ", ".join(map(str, row["coupling_rows"])), row["coupling_wd_multipliers"][-1]
    return rows if last == row["wd_multipliers"][-1] else f"{rows} (wd to {last:g}×)"


def _number(value: float | None, form: str) -> str:
    """A number, or a dash for None."""
    return "–" if value is None else format(value, form)
