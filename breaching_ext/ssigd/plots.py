"""Figures of runs: the objective, the step size and the margin over the iterations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from breaching_ext.files import write_atomically
from breaching_ext.ssigd.history import BilevelResult


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a PNG so that a reader sees the old file or the whole new one."""
    write_atomically(path, lambda target: figure.savefig(target, dpi=120, metadata={"Software": None}))


def plot_runs(runs: dict[str, BilevelResult], reference: dict[str, float] | None = None, *, title: str = "") -> Figure:
    """Draw F over iterations and over time, the step sizes and the strict-complementarity margins.

    Args:
        runs: results by label.
        reference: optimum to subtract from F, by label; the axis is logarithmic then. Default none.
        title: of the figure.
    """
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    for number, (label, result) in enumerate(runs.items()):
        history = result.history
        values = np.array(history["objective"])
        if reference:
            values = np.maximum(values - reference[label], 1e-16)
        style: dict[str, Any] = {"label": label, "color": f"C{number % 10}", "linewidth": 1.0}
        axes[0, 0].plot(values, **style)
        axes[0, 1].plot(1e3 * np.array(history["seconds"]), values, **style)
        axes[1, 0].plot(history["step"], **style)
        axes[1, 1].plot(np.maximum(history["margin"], 1e-16), **style)
    name, scale = ("F(x) − optimum", "log") if reference else ("F(x)", "symlog")
    for axis, x_label, y_label, y_scale in (
        (axes[0, 0], "iteration", name, scale), (axes[0, 1], "time (ms)", name, scale),
        (axes[1, 0], "iteration", "step size", "log"), (axes[1, 1], "iteration", "margin", "log"),
    ):  # fmt: skip
        axis.set(xlabel=x_label, ylabel=y_label, yscale=y_scale)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize="small")
    figure.suptitle(title)
    return figure


def plot_scaling(dims: list[int], milliseconds: dict[str, list[float | None]], *, title: str = "") -> Figure:
    """Draw the time of a gradient over the dimension, one line a backend.

    Args:
        dims: dimensions.
        milliseconds: medians by backend, None where it was not run.
        title: of the figure.
    """
    figure = Figure(figsize=(7, 5), layout="constrained")
    axis = figure.subplots()
    for label, values in milliseconds.items():
        known = [(dim, value) for dim, value in zip(dims, values, strict=True) if value is not None]
        axis.plot(*zip(*known, strict=True), marker="o", label=label)
    axis.set(xscale="log", yscale="log", xlabel="dimension", ylabel="time of a gradient (ms)")
    axis.set_xticks(dims, [str(dim) for dim in dims])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    axis.set_title(title)
    return figure
