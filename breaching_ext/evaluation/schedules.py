"""A picture of MAGIA's seven schedules of subset sizes."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from ..files import write_atomically
from ..selection import MODES, subset_size

__all__ = ["save_schedules"]


def save_schedules(
    path: str | Path,
    batch_size: int,
    n_iter: int,
    k: int = 2,
    l_iter: int = 100,
    a: float = -0.1,
    b: float = 200.0,
    in_use: str | None = None,
) -> Path:
    """Draw all seven schedules over one run, one panel each, because several of them coincide in places.

    Args:
        path: where to, for example "schedules.png".
        batch_size, n_iter, k, l_iter, a, b: as in :func:`breaching_ext.selection.subset_size`.
        in_use: the schedule that is drawn in another colour.
    """
    figure = Figure(figsize=(2.1 * len(MODES), 2.3), layout="constrained")
    axes = figure.subplots(1, len(MODES), sharey=True)
    for mode, axis in zip(MODES, axes, strict=True):
        sizes = [subset_size(mode, i, batch_size, n_iter, k, l_iter, a, b) for i in range(n_iter)]
        axis.step(range(n_iter), sizes, where="post", color="C1" if mode == in_use else "C0")
        axis.set_title(mode, fontsize=9)
        axis.set_ylim(0, batch_size * 1.08)
        axis.set_xlabel("outer step", fontsize=8)
    axes[0].set_ylabel(f"S (of B = {batch_size})")
    return write_atomically(path, lambda target: figure.savefig(target, dpi=120))
