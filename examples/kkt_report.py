"""The report of `kkt_study.py`: table.md and two figures from the runs that are there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from breaching_ext.files import write_atomically
from breaching_ext.intervals import mean_interval, plus_minus

#: the records of `kkt_study.make`, by arm
Runs = dict[str, list[dict[str, Any]]]


def write_report(runs: Runs, out: Path) -> str:
    """Write table.md, shares.png and margins.png; returns the table."""
    text = table(runs)
    write_atomically(out / "table.md", lambda target: target.write_text(text + "\n", encoding="utf-8"))
    plot(runs, out / "shares.png")
    margins_plot(runs, out / "margins.png")
    return text


def table(runs: Runs) -> str:
    """Return a markdown table: means over seeds with 95 % intervals."""
    head = [
        "arm",
        "seeds",
        "KKT loss",
        "‖·‖² absolute",
        "residual at the truth",
        "NCC > 0.8",
        "test images",
        "SV",
        "SSIM > 0.4",
        "test images",
        "SV",
        "mean NCC",
        "s",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, rows in runs.items():

        def cell(*path: str, digits: int = 2, rows: list = rows) -> str:
            values = []
            for row in rows:
                value: Any = row
                for key in path:
                    value = value.get(key) if value else None
                if value is not None:
                    values.append(value)
            return plus_minus(values, digits) if values else "-"

        cells = [
            f"{name}: {rows[0]['text']}", str(len(rows)), cell("kkt_loss", digits=4),
            cell("kkt_loss_absolute", digits=2), cell("training", "residual", digits=4),
            *(cell(pool, "ncc_share") for pool in ("training_images", "unseen_images", "singular_vectors")),
            *(cell(pool, "ssim_share") for pool in ("training_images", "unseen_images", "singular_vectors")),
            cell("training_images", "ncc_mean"), cell("attack_seconds", digits=0),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(runs: Runs, path: Path) -> None:
    """Draw the share of images recovered by every arm, with its control."""
    figure = Figure(figsize=(7, 1 + 0.35 * len(runs)), layout="constrained")
    axis = figure.subplots()
    for position, rows in enumerate(runs.values()):
        for pool, color, shift in (("training_images", "tab:blue", -0.12), ("unseen_images", "tab:orange", 0.12)):
            values = [row[pool]["ncc_share"] for row in rows]
            mean, half = mean_interval(values)
            axis.plot(values, [position + shift] * len(values), "o", color=color, alpha=0.35, markersize=4)
            label = pool.replace("_", " ") if position == 0 else None
            axis.errorbar(mean, position + shift, xerr=half, fmt="s", color=color, capsize=3, markersize=4, label=label)
    axis.set_yticks(range(len(runs)), [f"{name}: {rows[0]['text']}"[:48] for name, rows in runs.items()], fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel("share of images with NCC > 0.8, mean and 95 % interval")
    axis.legend(fontsize=7, loc="lower right")
    write_atomically(path, lambda target: figure.savefig(target, dpi=130))


def margins_plot(runs: Runs, path: Path) -> None:
    """Draw every training image of the default: its margin against how well it came back, as the paper does."""
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axis = figure.subplots()
    for row in runs.get("default", []):
        smallest = min(row["margins"])
        axis.plot(
            [m / smallest for m in row["margins"]],
            row["training_images"]["ncc"],
            "o",
            markersize=4,
            alpha=0.7,
            label=f"seed {row['seed']}",
        )
    axis.set_xlabel("margin of the training image / smallest margin")
    axis.set_ylabel("NCC of its nearest candidate")
    axis.axhline(0.8, color="gray", linewidth=0.8)
    axis.legend(fontsize=7)
    write_atomically(path, lambda target: figure.savefig(target, dpi=130))
