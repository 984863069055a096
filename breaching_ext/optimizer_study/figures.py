"""Heat maps in the manner of Figure 2 of the AdamW paper: one variant, or a sheet of all."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from .coupling import coupling
from .records import OptimizerExperiment
from .storage import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

BEST = 10
_DIVERGED_COLOUR = "0.75"


def draw_heatmap(
    experiment: OptimizerExperiment,
    ax: Axes | None = None,
    title: str | None = None,
    norm: LogNorm | None = None,
) -> Axes:
    """Draw the final test loss: weight decay on x (0 has a place of its own), learning rate on y, a
    step of each axis from one multiplier to the next.

    The ten best cells are circled; cells that diverged or are missing are grey.

    Args:
        experiment: The grid.
        ax: Where to draw; default: a new figure.
        title: Default: id and name of the variant.
        norm: Colour scale, to share one between panels; default: from the panel's own range.

    Returns:
        The axes.
    """
    data, lrs, wds = experiment.get_heatmap_data()
    if ax is None:
        ax = _new_figure(5.0, 4.2).add_subplot()
    image = ax.imshow(data, origin="lower", aspect="auto", cmap="viridis_r", norm=norm or _norm([data]))
    ax.set_facecolor(_DIVERGED_COLOUR)
    ax.set_xticks(range(len(wds)), [_label(wd) for wd in wds], rotation=90, fontsize=7)
    ax.set_yticks(range(len(lrs)), [_label(lr) for lr in lrs], fontsize=7)
    ax.set_xlabel(f"weight decay × {_base(experiment, 'weight_decay')}", fontsize=8)
    ax.set_ylabel(f"learning rate × {_base(experiment, 'lr')}", fontsize=8)
    ax.set_title(title if title is not None else f"{experiment.optimizer_id} {experiment.optimizer_name}", fontsize=9)
    rows, columns = best_cells(data)
    ax.scatter(columns, rows, s=42, facecolors="none", edgecolors="tab:red", linewidths=1.2)
    if norm is None:
        _colour_bar(ax, image)
    return ax


def best_cells(data: np.ndarray, count: int = BEST) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the ``count`` lowest finite entries."""
    order = np.argsort(np.where(np.isfinite(data), data, np.inf), axis=None, kind="stable")
    order = order[: min(count, int(np.isfinite(data).sum()))]
    rows, columns = np.unravel_index(order, data.shape)
    return rows, columns


def save_sheet(
    experiments: Sequence[OptimizerExperiment],
    path: str | Path,
    columns: int = 5,
    titles: Sequence[str] | None = None,
) -> Path:
    """Draw all variants on one sheet, with one colour scale and the coupling number in each title.

    Args:
        experiments: One a panel.
        path: A PNG, PDF or SVG file.
        columns: Panels in a row.
        titles: Of the panels; default: `panel_title` with the coupling of the grid that is drawn.

    Returns:
        The path.
    """
    titles = titles or [_own_title(experiment) for experiment in experiments]
    columns = min(columns, len(experiments))
    rows = math.ceil(len(experiments) / columns)
    figure = _new_figure(3.5 * columns, 3.6 * rows)
    norm = _norm([e.get_heatmap_data()[0] for e in experiments])
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax, experiment, title in zip(axes, experiments, titles, strict=False):
        draw_heatmap(experiment, ax, title, norm)
    for ax in axes[len(experiments) :]:
        ax.set_axis_off()
    used = list(axes[: len(experiments)])
    figure.colorbar(used[0].images[0], ax=list(axes), shrink=0.6, pad=0.01, label="final test loss (MSE)")
    suffix = Path(path).suffix.lstrip(".") or "png"
    return write_atomically(path, lambda file: figure.savefig(file, format=suffix, dpi=110))


def panel_title(experiment: OptimizerExperiment, slope: float | None, rows: Sequence[int]) -> str:
    """Id and name, and in a second line the coupling number, where the grid has one.

    Args:
        experiment: The grid.
        slope: The coupling number, of one seed or the mean of many; None or not a number: it is not reached.
        rows: From how many rows it is, by seed; none where the grid has no column without weight decay.
    """
    first = textwrap.fill(f"{experiment.optimizer_id} {experiment.optimizer_name}", 36)
    if not rows:
        return first
    reached = slope is not None and math.isfinite(slope)
    number = f"{slope:+.2f} ({', '.join(map(str, rows))} rows)" if reached else "not reached"
    return f"{first}\ncoupling {number}"


def _own_title(experiment: OptimizerExperiment) -> str:
    """The title with the coupling of the grid that is drawn."""
    if experiment.wd_multipliers[:1] != [0.0]:
        return panel_title(experiment, None, [])
    found = coupling(experiment)
    return panel_title(experiment, found.slope, [len(found.lr_multipliers)])


def _new_figure(width: float, height: float) -> Figure:
    """A figure that needs no display and leaves pyplot's state alone."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _colour_bar(ax: Axes, image: AxesImage) -> None:
    """A colour bar for a panel of its own."""
    if ax.figure is not None:
        ax.figure.colorbar(image, ax=ax, label="final test loss (MSE)")


def _norm(grids: Sequence[np.ndarray]) -> LogNorm:
    """A logarithmic colour scale over all finite, positive losses."""
    values = np.concatenate([grid[np.isfinite(grid) & (grid > 0)] for grid in grids])
    if not values.size:
        return LogNorm(1e-3, 1.0)
    low, high = float(values.min()), float(values.max())
    return LogNorm(low, high if high > low else low * 1.1)


def _label(value: float) -> str:
    """A multiplier as a whole number or a fraction."""
    if value == 0 or value >= 1:
        return f"{value:g}"
    inverse = 1 / value
    return f"1/{inverse:g}" if inverse == round(inverse) else f"{value:g}"


def _base(experiment: OptimizerExperiment, key: str) -> str:
    """A base rate, from the record."""
    value = experiment.config.get("optimizer", {}).get(key)
    return "base" if value is None else f"{value:g}"
