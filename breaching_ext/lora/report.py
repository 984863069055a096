"""The ladder's table and plot, from its rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..evaluation.figures import save_sheet
from ..files import write_atomically
from ..intervals import mean_interval, plus_minus

__all__ = ["pictures", "plot", "table", "write_report"]

Row = Mapping[str, Any]

_NAMES = {
    (0, "full"): "0: full gradient",
    (1, "match"): "1: match (∂A, ∂B)",
    (1, "whiten"): "1: match, whitened",
    (2, "public"): "2: control, mean public gradient",
    (2, "closed"): "2: decode, closed form",
    (2, "learned"): "2: decode, learned",
    (3, "match"): "3: K steps, match",
    (3, "decode"): "3: K steps, decode",
}
_COLOURS = {key: f"C{number if number < 7 else 9}" for number, key in enumerate(_NAMES)}  # C7 is the controls' gray
_STARTS = {"zero": "B = 0", "random": "B ≠ 0"}


def write_report(
    rows: Sequence[Row], folder: str | Path, ceiling: float, images: Mapping[str, torch.Tensor] | None = None
) -> list[Path]:
    """Write table.md, and with adapters ladder.png and, with images, pictures.png; returns the paths.

    Args:
        rows: rows of one model.
        folder: where to.
        ceiling: mean PSNR in dB below which Phase 0 counts as failed.
        images: cell -> reconstructions of one seed as bytes (B, C, H, W), as `Ladder` keeps them.
    """
    text = table(rows, ceiling) + "\n"
    files = [write_atomically(Path(folder) / "table.md", lambda target: target.write_text(text, encoding="utf-8"))]
    if any(row["rank"] != "-" for row in rows):
        files.append(plot(rows, Path(folder) / "ladder.png"))
        if images:
            files.append(pictures(rows, images, Path(folder) / "pictures.png"))
    return files


def table(rows: Sequence[Row], ceiling: float) -> str:
    """Return a markdown table: a row for each phase, method, start and rank, means over seeds with 95 % intervals.

    Cosines after each stage: `seen`, what one step's factors show of the full gradient (the LoRA approximation);
    `decoded`, the estimate that was inverted; `inverted`, the gradient at the reconstruction, each to the true full
    gradient. `matched` is the reconstruction's update to the one the attack was given: near 1, the attack has done its
    part, and what is missing was lost before it.
    """
    base = {row["seed"]: row["psnr"] for row in rows if row["phase"] == 0}
    lines = [
        *_headline(rows, base, ceiling),
        "| phase | start | rank | seeds | PSNR [dB] | against Phase 0 [dB] | SSIM "
        "| cos seen | cos decoded | cos matched | cos inverted |",
        "|:--|:--|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for (phase, method, start, rank), group in _groups(rows).items():
        paired = [row["psnr"] - base[row["seed"]] for row in group if row["seed"] in base]
        cells = [
            _NAMES[phase, method],
            _STARTS.get(start, "–"),
            str(rank),
            str(len(group)),
            _mean(group, "psnr", 2),
            plus_minus(paired, 2, sign=True) if phase > 0 and paired else "–",
            _mean(group, "ssim", 3),
            _mean(group, "cosine_seen", 4),
            _mean(group, "cosine_decoded", 4),
            _mean(group, "cosine_matched", 4),
            _mean(group, "cosine_full", 4),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path) -> Path:
    """Draw PSNR and gradient cosine against rank, a column for each start of B."""
    starts = [start for start in _STARTS if any(row["start"] == start for row in rows)]
    figure = Figure(figsize=(5.2 * len(starts), 7.2), layout="constrained")
    axes = figure.subplots(2, len(starts), squeeze=False, sharey="row")
    for column, start in enumerate(starts):
        mine = [row for row in rows if row["start"] == start]
        ranks = list(dict.fromkeys(str(row["rank"]) for row in sorted(mine, key=_by_rank)))
        _draw_quality(axes[0][column], mine, [row for row in rows if row["rank"] == "-"], ranks)
        _draw_cosines(axes[1][column], mine, ranks)
        axes[0][column].set_title(f"{rows[0]['model']}, {_STARTS[start]}")
    axes[0][0].set_ylabel("PSNR [dB], mean and 95 % interval")
    axes[1][0].set_ylabel("cosine to the true full gradient")
    for axis in axes.flat:
        axis.set_xlabel("rank")
        axis.legend(fontsize=7)
    return write_atomically(path, lambda target: figure.savefig(target, dpi=110))


def pictures(rows: Sequence[Row], images: Mapping[str, torch.Tensor], path: Path) -> Path:
    """Draw the first image's reconstruction for every phase and method (rows) and rank (columns).

    Where there is no rank, the one image stands in the first column.
    """
    ranks = list(dict.fromkeys(row["rank"] for row in sorted(rows, key=_by_rank) if row["rank"] != "-"))
    sheet: list[tuple[str, list[torch.Tensor | None]]] = []
    for phase, method, start in dict.fromkeys(key[:3] for key in _groups(rows)):
        names = ["-"] if start == "-" else ranks
        found = [images.get(f"{phase} {method} {start} {rank}") for rank in names]
        row = [None if image is None else image[0].double() / 255 for image in found]
        text = _NAMES[phase, method].replace(": ", ":\n") + (f"\n{_STARTS[start]}" if start in _STARTS else "")
        sheet.append((text, row))
    return save_sheet(path, sheet, [f"rank {rank}" for rank in ranks], str(rows[0]["model"]))


def _draw_quality(axis: Axes, rows: Sequence[Row], rankless: Sequence[Row], ranks: list[str]) -> None:
    for (phase, method), group in _by(rankless, "phase", "method").items():
        mean, half = mean_interval([row["psnr"] for row in group])
        axis.axhspan(mean - half, mean + half, color="gray", alpha=0.2)
        axis.axhline(mean, color="gray", linestyle=":" if phase else "-", label=_NAMES[phase, method])
    for (phase, method), group in _by(rows, "phase", "method").items():
        _draw_line(axis, group, "psnr", ranks, _NAMES[phase, method], _COLOURS[phase, method])


def _draw_cosines(axis: Axes, rows: Sequence[Row], ranks: list[str]) -> None:
    once = list({(row["rank"], row["seed"]): row for row in rows}.values())  # it is the same for every method
    _draw_line(axis, once, "cosine_seen", ranks, "seen in one step (LoRA approximation)", "black", ":")
    for (phase, method), group in _by(rows, "phase", "method").items():
        if any("cosine_decoded" in row for row in group):
            _draw_line(
                axis, group, "cosine_decoded", ranks, f"decoded, {_NAMES[phase, method]}", _COLOURS[phase, method]
            )
        else:
            _draw_line(
                axis, group, "cosine_full", ranks, f"inverted, {_NAMES[phase, method]}", _COLOURS[phase, method], "--"
            )


def _draw_line(
    axis: Axes, rows: Sequence[Row], key: str, ranks: list[str], label: str, colour: str, style: str = "-"
) -> None:
    points = []
    for position, rank in enumerate(ranks):
        values = [row[key] for row in rows if str(row["rank"]) == rank and row.get(key) is not None]
        if values:
            points.append((position, *mean_interval(values)))
    if points:
        x, mean, half = zip(*points, strict=True)
        axis.errorbar(
            x, mean, yerr=half, color=colour, linestyle=style, marker="o", markersize=3, capsize=2, label=label
        )
        axis.set_xticks(range(len(ranks)), ranks)


def _headline(rows: Sequence[Row], base: Mapping[int, float], ceiling: float) -> list[str]:
    if not base:
        return []
    values = list(base.values())
    verdict = "holds" if mean_interval(values)[0] >= ceiling else "fails: what later phases lose is not the adapter's"
    return [f"Model `{rows[0]['model']}`. Phase 0 {verdict} ({plus_minus(values)} dB, ceiling {ceiling:g} dB).", ""]


def _groups(rows: Iterable[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by (phase, method, start, rank), in the order of the table."""

    def position(key: tuple[Any, ...]) -> tuple[Any, ...]:
        phase, method, start, rank = key
        return list(_NAMES).index((phase, method)), start != "zero", _rank_position(rank)

    groups = _by(rows, "phase", "method", "start", "rank")
    return {key: groups[key] for key in sorted(groups, key=position)}


def _by(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def _by_rank(row: Row) -> float:
    return _rank_position(row["rank"])


def _rank_position(rank: int | str) -> float:
    return float(rank) if isinstance(rank, int) else float("inf")


def _mean(rows: Sequence[Row], key: str, digits: int) -> str:
    values = [row[key] for row in rows if row.get(key) is not None]
    return plus_minus(values, digits) if values else "–"
