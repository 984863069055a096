"""The pictures of a run: true images above their reconstructions, and all candidates with their consensus."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..files import write_atomically

_MOST_COLUMNS = 8


def save_reconstruction(
    path: str | Path, true: torch.Tensor, matched: torch.Tensor, psnrs: Sequence[float], title: str = ""
) -> Path:
    """Draw true images above their assigned reconstructions, each with its PSNR.

    Args:
        path: where to, for example "reconstruction.png".
        true: images (B, C, H, W) in [0, 1].
        matched: reconstructions in the same order.
        psnrs: (B,) dB.
        title: one line above the picture.
    """
    return save_captioned(path, true, matched, [f"{value:.1f} dB" for value in psnrs], title)


def save_captioned(
    path: str | Path,
    true: torch.Tensor,
    matched: torch.Tensor,
    captions: Sequence[str],
    title: str = "",
    row_name: str = "reconstructed",
) -> Path:
    """Draw true images above other images, each with its caption; arguments as :func:`save_reconstruction`."""
    columns = min(len(true), _MOST_COLUMNS)
    blocks = math.ceil(len(true) / columns)
    figure, axes = _grid(2 * blocks, columns, title)
    for index in range(len(true)):
        row, column = 2 * (index // columns), index % columns
        _show(axes[row][column], true[index])
        _show(axes[row + 1][column], matched[index], captions[index], below=True)
        if column == 0:
            _row_name(axes[row][column], "true")
            _row_name(axes[row + 1][column], row_name)
    return _save(figure, path)


def save_candidates(
    path: str | Path,
    true: torch.Tensor,
    candidates: torch.Tensor,
    consensus: torch.Tensor,
    names: Sequence[str],
    title: str = "",
    consensus_name: str = "consensus",
) -> Path:
    """Draw the true images, every candidate and the consensus, a row each (the first eight images).

    Args:
        path: where to.
        true: images (B, C, H, W) in [0, 1].
        candidates: (N, B, C, H, W), in the order of `true`.
        consensus: (B, C, H, W).
        names: N row names, for example "candidate 0, score 0.01".
        title: one line above the picture.
        consensus_name: what to call the last row.
    """
    rows = [("true", true), *zip(names, candidates, strict=True), (consensus_name, consensus)]
    columns = min(len(true), _MOST_COLUMNS)
    figure, axes = _grid(len(rows), columns, title)
    for row, (name, images) in enumerate(rows):
        for column in range(columns):
            _show(axes[row][column], images[column])
        _row_name(axes[row][0], name)
    return _save(figure, path)


def save_sheet(
    path: str | Path, rows: Sequence[tuple[str, Sequence[torch.Tensor | None]]], columns: Sequence[str], title: str = ""
) -> Path:
    """Draw a table of images, for example methods by ranks.

    Args:
        path: where to.
        rows: (name, one image (C, H, W) in [0, 1] a column, or None for an empty place).
        columns: names of the columns.
        title: one line above the picture.
    """
    figure, axes = _grid(len(rows), len(columns), title)
    for row, (name, images) in enumerate(rows):
        _row_name(axes[row][0], name)
        for column, image in enumerate(images):
            if image is not None:
                _show(axes[row][column], image)
    for axis, text in zip(axes[0], columns, strict=True):
        axis.set_title(text, fontsize=8)
    return _save(figure, path)


def _grid(rows: int, columns: int, title: str) -> tuple[Figure, list[list[Axes]]]:
    figure = Figure(figsize=(1.35 * columns + 1.3, 1.45 * rows + (0.4 if title else 0.1)), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    if title:
        figure.suptitle(title, fontsize=9)
    return figure, axes.tolist()


def _show(axis: Axes, image: torch.Tensor, text: str = "", below: bool = False) -> None:
    picture = image.permute(1, 2, 0).float().clamp(0, 1).numpy()
    axis.imshow(picture[..., 0] if picture.shape[-1] < 3 else picture[..., :3], cmap="gray", vmin=0, vmax=1)
    if text:
        axis.set_title(text, fontsize=8, y=-0.22 if below else 1.0)


def _row_name(axis: Axes, name: str) -> None:
    axis.text(-0.08, 0.5, name, transform=axis.transAxes, ha="right", va="center", fontsize=8)


def _save(figure: Figure, path: str | Path) -> Path:
    return write_atomically(path, lambda target: figure.savefig(target, dpi=150))
