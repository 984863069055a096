"""Table and plots of benchmarks/matching.py, drawn from its results.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from breaching_ext.files import write_atomically, write_json

KEYS = ("model", "batch", "candidates", "device", "threads")
ENGINES = ("list", "vmap", "compile")
RUN = 2000


def load_rows(folder: Path) -> dict[str, Any]:
    """Return what is there: rows, totals and growth."""
    file = folder / "results.json"
    empty: dict[str, Any] = {"machine": {}, "rows": [], "totals": [], "growth": []}
    return {**empty, **json.loads(file.read_text(encoding="utf-8"))} if file.exists() else empty


def totals(row: dict[str, Any]) -> dict[str, float]:
    """Return the seconds of a run of `RUN` iterations, from the row's step times and set-up times."""
    steps = {name: RUN * row["candidates"] * ms / 1000 for name, ms in row["ms"].items()}
    return {name: row["setup_seconds"].get(name, 0.0) + seconds for name, seconds in steps.items()}


def auto_share(row: dict[str, Any]) -> float:
    """Return how `auto` does against the best engine over such a run, its calibration included; 1 is as good."""
    whole, chosen = totals(row), row["auto"]["engine"]
    ours = {name: seconds for name, seconds in whole.items() if name != "breaching"}
    seconds = row["auto"]["seconds"] + RUN * row["candidates"] * row["ms"][chosen] / 1000
    return min(ours.values()) / seconds


def table(content: dict[str, Any]) -> str:
    """Return the markdown tables."""
    lines = [
        f"Breaching's time over ours a candidate-iteration (steady state), and over {RUN} iterations with set-up.",
        "",
        "| model | B | N | Breaching [ms] | list | vmap | compile | total: vmap | total: compile | auto takes | auto "
        "against best | compiling [s] | again [s] | gradient differs by | Breaching's by one rounding | memory vmap "
        "[MiB] |",
        "|" + "---|" * 16,
    ]
    for row in sorted(content["rows"], key=lambda r: (r["model"], r["batch"], r["candidates"])):
        ms, whole, setup = row["ms"], totals(row), row["setup_seconds"]
        ratios = [f"{ms['breaching'] / ms[e]:.2f}" if e in ms else "-" for e in ENGINES]
        ends = [f"{whole['breaching'] / whole[e]:.2f}" if e in whole else "-" for e in ("vmap", "compile")]
        seconds = [f"{setup[k]:.0f}" if k in setup and "compile" in ms else "-" for k in ("compile", "compile_again")]
        worst = max((d for d in row["gradient_difference"].values() if d is not None), default=float("nan"))
        rounding = f"{row['breaching_rounding']:.0e}" if "breaching_rounding" in row else "-"
        memory = (row["peak_rss_bytes"].get("vmap") or 0) / 2**20
        cells = [
            *(row["model"], row["batch"], row["candidates"], f"{ms['breaching']:.2f}", *ratios, *ends),
            *(row["auto"]["engine"], f"{auto_share(row):.2f}", *seconds, f"{worst:.0e}", rounding, f"{memory:.1f}"),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    if content["totals"]:
        lines += ["", "Measured to the end, from an empty compile cache [s]:", ""]
        lines += ["| model | B | N | iterations | Breaching | vmap | compile | auto (engine) |", "|" + "---|" * 8]
        for t in content["totals"]:
            times = " | ".join(f"{t[k]:.1f}" for k in ("breaching", "vmap", "compile"))
            head = f"| {t['model']} | {t['batch']} | {t['candidates']} | {t['iterations']} |"
            lines.append(f"{head} {times} | {t['auto']:.1f} ({t['auto_engine']}) |")
    return "\n".join(lines)


def save_report(content: dict[str, Any], folder: Path) -> str:
    """Write results.json, table.md and the plots; returns the table."""
    write_json(folder / "results.json", content)
    text = table(content)
    write_atomically(folder / "table.md", lambda target: target.write_text(text + "\n", encoding="utf-8"))
    if content["rows"]:
        _speedup(content["rows"], folder / "speedup.png")
    if content["growth"]:
        _growth(content, folder / "growth.png")
    return text


def _speedup(rows: list[dict[str, Any]], path: Path) -> None:
    rows = sorted(rows, key=lambda r: (r["model"], r["batch"], r["candidates"]))
    figure = Figure(figsize=(1.5 + 0.6 * len(rows), 3.4), layout="constrained")
    axis = figure.subplots()
    for shift, engine in enumerate(ENGINES):
        ratios = [row["ms"]["breaching"] / row["ms"].get(engine, float("nan")) for row in rows]
        axis.bar([i + shift * 0.27 for i in range(len(rows))], ratios, 0.27, label=engine)
    axis.axhline(1, color="gray", linewidth=0.8)
    names = [f"{row['model']}\nB={row['batch']}\nN={row['candidates']}" for row in rows]
    axis.set_xticks([i + 0.27 for i in range(len(rows))], names, fontsize=6)
    axis.set_ylabel("times faster than Breaching's loop")
    axis.legend(fontsize=7)
    write_atomically(path, lambda target: figure.savefig(target, dpi=150))


def _growth(content: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    time_n, memory, time_b = figure.subplots(1, 3)
    for model in sorted({point["model"] for point in content["growth"]}):
        for chunk in (None, 8):
            points = [p for p in content["growth"] if p["model"] == model and p["chunk"] == chunk]
            label = f"{model}, {'one stack' if chunk is None else f'chunks of {chunk}'}"
            count = [p["candidates"] for p in points]
            time_n.loglog(count, [p["ms"] * p["candidates"] for p in points], "o-", label=label)
            memory.loglog(count, [(p["peak_rss_bytes"] or 0) / 2**20 for p in points], "o-", label=label)
    for model in sorted({row["model"] for row in content["rows"]}):
        rows = sorted((r for r in content["rows"] if r["model"] == model and r["candidates"] == 8), key=_batch)
        rows = [r for r in rows if "vmap" in r["ms"]]
        time_b.loglog([r["batch"] for r in rows], [8 * r["ms"]["vmap"] for r in rows], "o-", label=f"{model}, vmap")
    for axis, x, y in (
        (time_n, "candidates N", "ms a step, B = 1"),
        (memory, "candidates N", "peak memory of a step [MiB]"),
        (time_b, "batch size B", "ms a step, N = 8"),
    ):
        axis.set_xlabel(x)
        axis.set_ylabel(y)
        axis.legend(fontsize=6)
    write_atomically(path, lambda target: figure.savefig(target, dpi=150))


def _batch(row: dict[str, Any]) -> int:
    return row["batch"]
