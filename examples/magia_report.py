"""The report of `magia_study.py`: summary.json, table.md and two figures from the runs that are there."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from magia_arms import ARMS, INNER, SHORT
from matplotlib.figure import Figure

from breaching_ext.evaluation.schedules import save_schedules
from breaching_ext.files import write_atomically, write_json
from breaching_ext.intervals import mean_interval
from breaching_ext.run_rows import flattened

#: an image counts as recovered from this SSIM on
RECOVERED = 0.6


def others(record: dict[str, Any]) -> list[str]:
    """Settings of a run that are not those that its method has today."""
    known = asdict(ARMS[record["arm"]]) if record["arm"] in ARMS else record["method"]
    now, then = (flattened(json.loads(json.dumps(method))) for method in (known, record["method"]))
    return [f"{key}={then[key]}" for key in sorted(then) if key in now and key != "text" and now[key] != then[key]]


def report(out: Path) -> bool:
    """Write summary.json, table.md and three figures from the runs that are there; returns whether there are any."""
    rows = summarise([json.loads(path.read_text(encoding="utf-8")) for path in sorted((out / "runs").glob("*.json"))])
    if not rows:
        return False
    write_json(out / "summary.json", {"rows": rows})
    write_atomically(out / "table.md", lambda target: target.write_text(table(rows), encoding="utf-8"))
    plot_arms(out / "arms.png", rows)
    plot_length(out / "length.png", rows)
    save_schedules(out / "schedules.png", batch_size=16, n_iter=300)
    return True


def diverged(losses: list[list[float | None]]) -> bool:
    """Whether a candidate's last objective is not finite (None), or above its first."""
    return any(values[-1] is None or values[0] is None or values[-1] > values[0] for values in losses)


def summarise(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per arm, batch size and length: means over seeds, worst image, share recovered, interval."""
    groups: dict[tuple[int, int, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["batch"], record["outer"], record["arm"]), []).append(record)
    rows = []
    for (batch, outer, arm), members in sorted(groups.items()):
        members.sort(key=lambda record: record["seed"])
        psnrs = [m["metrics"]["psnr"] for m in members]
        images = [m["metrics"]["per_image"] for m in members]
        other = others(members[0])
        text = f"{members[0]['text']}, made with {', '.join(other)}" if other else members[0]["text"]
        row = {"arm": arm, "text": text, "batch": batch, "outer": outer, "seeds": len(members)}
        row |= {"psnr": statistics.mean(psnrs), "psnr_ci95": mean_interval(psnrs)[1], "psnr_seeds": psnrs}
        row["seed_numbers"] = [m["seed"] for m in members]
        row["psnr_worst_image"] = min(min(i["psnr"]) for i in images)
        for name in ("ssim", "lpips", "label_acc"):
            values = [m["metrics"][name] for m in members if m["metrics"].get(name) is not None]
            row[name] = statistics.mean(values) if values else None
        row["recovered"] = statistics.mean([statistics.mean([s >= RECOVERED for s in i["ssim"]]) for i in images])
        row["full_gradients"] = statistics.mean([m["full_gradients"] for m in members])
        row["failed"] = sum(m["failed"] for m in members)
        row["diverged"] = sum(diverged(m["losses"]) for m in members)
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, the best of each batch size and length first."""
    lines = [
        "| B | outer steps | method | seeds | diverged | PSNR [dB] (95 %) | worst image | SSIM | LPIPS | labels "
        "| SSIM ≥ 0.6 |",
        "|--:|--:|:--|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in sorted(rows, key=lambda r: (r["batch"], -r["outer"], -r["psnr"])):
        lpips = "–" if row["lpips"] is None else f"{row['lpips']:.3f}"
        lines.append(
            f"| {row['batch']} | {row['outer']} | {row['text']} (`{row['arm']}`) | {row['seeds']} "
            f"| {row['diverged'] or ''} "
            f"| {row['psnr']:.2f} ± {row['psnr_ci95']:.2f} | {row['psnr_worst_image']:.1f} | {row['ssim']:.3f} "
            f"| {lpips} | {100 * row['label_acc']:.0f} % | {100 * row['recovered']:.0f} % |"
        )
    lines += ["", "Differences in PSNR [dB] at the same budget, paired over seeds, with 95 % intervals:", ""]
    lines += ["| B | outer steps | method | against | difference |", "|--:|--:|:--|:--|--:|"]
    found = {
        (row["batch"], row["outer"], row["arm"]): dict(zip(row["seed_numbers"], row["psnr_seeds"], strict=True))
        for row in rows
    }
    for (batch, outer, arm), values in found.items():
        for reference in ("default", "baseline"):
            other = found.get((batch, outer, reference))
            both = sorted(set(values) & set(other or ()))
            if other is None or reference == arm or not both:
                continue
            differences = [values[seed] - other[seed] for seed in both]
            mean, half = mean_interval(differences)
            lines.append(f"| {batch} | {outer} | `{arm}` | `{reference}` | {mean:+.2f} ± {half:.2f} |")
    return "\n".join(lines) + "\n"


def plot_arms(path: Path, rows: list[dict[str, Any]]) -> None:
    """PSNR of all arms at the ablation's length, one panel per batch size."""
    short = [row for row in rows if row["outer"] == SHORT.get(row["batch"])]
    batches = sorted({row["batch"] for row in short})
    if not batches:
        return
    most = max(sum(row["batch"] == b for row in short) for b in batches)
    figure = Figure(figsize=(4.6 * len(batches), 1.2 + 0.3 * most), layout="constrained")
    for axis, batch in zip(figure.subplots(1, len(batches), squeeze=False)[0], batches, strict=True):
        mine = sorted((row for row in short if row["batch"] == batch), key=lambda r: r["psnr"])
        errors = [0.0 if math.isnan(row["psnr_ci95"]) else row["psnr_ci95"] for row in mine]
        axis.barh([row["arm"] for row in mine], [row["psnr"] for row in mine], xerr=errors, capsize=2)
        axis.set(title=f"B = {batch}, {SHORT[batch] * INNER} gradients", xlabel="PSNR [dB], 95 %")
        axis.tick_params(labelsize=7)
    write_atomically(path, lambda target: figure.savefig(target, dpi=120))


def plot_length(path: Path, rows: list[dict[str, Any]]) -> None:
    """PSNR of default and baseline against the budget."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    for arm, style in (("default", "o-"), ("baseline", "s--")):
        for batch in sorted({row["batch"] for row in rows}):
            mine = sorted((r["outer"], r["psnr"]) for r in rows if r["arm"] == arm and r["batch"] == batch)
            if mine:
                axis.plot(*zip(*mine, strict=True), style, label=f"{arm}, B = {batch}")
    axis.set(xlabel="outer steps of 20 full gradients", ylabel="PSNR [dB]")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    write_atomically(path, lambda target: figure.savefig(target, dpi=120))
