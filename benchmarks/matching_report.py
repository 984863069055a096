"""Table and plots of benchmarks/matching.py, drawn from its results.json."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from scipy.stats import bootstrap

from breaching_ext.files import write_atomically, write_json

KEYS = ("model", "batch", "candidates", "device", "threads")
ENGINES = ("list", "vmap", "compile")
RUN = 2000
DRAWS, LEAST_ROUNDS = 1000, 5  # of an interval


def load_rows(folder: Path) -> dict[str, Any]:
    """Return what is there: rows, the reasons of rows that are not, totals and growth."""
    file = folder / "results.json"
    empty: dict[str, Any] = {"machine": {}, "rows": [], "missing": [], "totals": [], "growth": []}
    return {**empty, **json.loads(file.read_text(encoding="utf-8"))} if file.exists() else empty


def totals(row: dict[str, Any]) -> dict[str, float]:
    """Return the seconds of a run of `RUN` iterations, from the row's step times and set-up times."""
    steps = {name: RUN * row["candidates"] * ms / 1000 for name, ms in row["ms"].items()}
    return {name: row["setup_seconds"].get(name, 0.0) + seconds for name, seconds in steps.items()}


def auto_share(row: dict[str, Any]) -> float:
    """Return how `auto` does against the best engine over such a run, with what deciding took; 1 is as good.

    Not a number where the engine that it took was not timed.

    A compiled engine that it took counts with the row's seconds of compiling: the same compilation takes longer at
    another moment of a shared machine, for which the decision is not to blame. One that it left again counts whole.
    """
    whole, auto = totals(row), row["auto"]
    ours = {name: seconds for name, seconds in whole.items() if name != "breaching"}
    if auto["engine"] not in row["ms"]:
        return float("nan")
    seconds = auto["seconds"] + RUN * row["candidates"] * row["ms"][auto["engine"]] / 1000
    if auto["engine"] == "compile":
        seconds += row["setup_seconds"]["compile"] - auto["calibration"]["compile_seconds"]
    return np.minimum.reduce(list(ours.values())) / seconds


def speedup(engine: str) -> Callable[[dict[str, Any]], float]:
    """Return what says how many times faster than Breaching an engine is in a row."""
    return lambda row: row["ms"]["breaching"] / row["ms"][engine]


def interval(row: dict[str, Any], figure: Callable[[dict[str, Any]], float]) -> tuple[float, float] | None:
    """Return a figure's 95 % interval: the bootstrap over the rounds, in each of which all engines were timed in turn.

    It says what the clock leaves open, not what another moment of the machine would bring. None for too few rounds.
    """
    names, times = zip(*row["ms_all"].items(), strict=True)
    rounds = min(map(len, times))
    if rounds < LEAST_ROUNDS:
        return None

    def of_medians(*drawn: np.ndarray, axis: int) -> Any:
        return figure({**row, "ms": dict(zip(names, (np.median(t, axis=axis) for t in drawn), strict=True))})

    samples = [t[:rounds] for t in times]
    found = bootstrap(samples, of_medians, paired=True, n_resamples=DRAWS, method="percentile", rng=0)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def _with_interval(row: dict[str, Any], figure: Callable[[dict[str, Any]], float]) -> str:
    if math.isnan(figure(row)):
        return "-"
    found = interval(row, figure)
    return f"{figure(row):.2f}" + (f" ({found[0]:.2f}-{found[1]:.2f})" if found else "")


def table(content: dict[str, Any]) -> str:
    """Return the markdown: the machine, rows, runs to the end, and what is not measured."""
    lines = [*_machine(content["machine"]), *_rows(content["rows"]), *_totals(content["totals"]), *_missing(content)]
    return "\n".join(lines)


def _machine(machine: dict[str, Any]) -> list[str]:
    if not machine:
        return []
    rates = ", ".join(f"{name} {rate:.0f}" for name, rate in machine.get("gflops", {}).items())
    memory = f"{(machine['memory_bytes'] or 0) / 2**30:.0f} GiB"
    wide = ", AVX-512" if machine.get("avx512") else ", no AVX-512"
    torch = machine["versions"]["torch"]
    text = f"{machine['cpu']}, {machine['cores']} cores{wide}, {memory}, {machine['threads']} threads, torch {torch}"
    return [f"Machine: {text}; {machine['device']}; measured Gflop/s: {rates}.", ""]


def _rows(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"Breaching's time over ours a candidate-iteration (steady state), and over {RUN} iterations with set-up;",
        "in brackets 95 % intervals over the rounds.",
        "`gradient differs by`: a candidate's from Breaching's, relative, at most; `beside kinks`: the least of that",
        "at the start and at points where every pixel is moved by one rounding; `Breaching's by one rounding`: how",
        "much its own gradient moves from the start to such a point.",
        "`others`: processors that other processes took meanwhile. `of the rate`: the arithmetic of a compiled (else",
        "replayed) step over what the machine's best rate would do in its time. `measured`: when, and with which",
        "commit; rows without it are of earlier engines.",
        "",
        "| model | B | N | Breaching [ms] | list | vmap | compile | total: vmap | total: compile | auto takes | auto "
        "against best | compiling [s] | again [s] | gradient differs by | beside kinks | Breaching's by one rounding | "
        "MiB a candidate | of the rate | others | measured |",
        "|" + "---|" * 20,
    ]
    for row in sorted(rows, key=_order):
        ms, whole, setup = row["ms"], totals(row), row["setup_seconds"]
        ratios = [_with_interval(row, speedup(e)) if e in ms else "-" for e in ENGINES]
        ends = [f"{whole['breaching'] / whole[e]:.2f}" if e in whole else "-" for e in ("vmap", "compile")]
        seconds = [f"{setup[k]:.0f}" if k in setup and "compile" in ms else "-" for k in ("compile", "compile_again")]
        differences = [d for d in row["gradient_difference"].values() if d is not None]
        at, beside = (max((d[where] for d in differences), default=float("nan")) for where in ("at", "beside"))
        profile = row.get("profile", {})
        rate = profile.get("share_of_rate_compile", profile.get("share_of_rate_vmap"))
        cells = [
            *(row["model"], row["batch"], row["candidates"], f"{ms['breaching']:.2f}", *ratios, *ends),
            *(row["auto"]["engine"], _with_interval(row, auto_share), *seconds, f"{at:.0e}", f"{beside:.0e}"),
            *(f"{row['breaching_rounding']:.0e}", f"{row['bytes_per_candidate'] / 2**20:.1f}"),
            *("-" if rate is None else f"{rate:.2f}", row.get("other_processes"), row.get("measured", "-")),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def _totals(totals_measured: list[dict[str, Any]]) -> list[str]:
    if not totals_measured:
        return []
    lines = ["", "Measured to the end, from an empty compile cache [s]:", ""]
    lines += ["| model | B | N | iterations | Breaching | vmap | compile | auto (engine) |", "|" + "---|" * 8]
    for t in totals_measured:
        times = " | ".join(f"{t[k]:.1f}" for k in ("breaching", "vmap", "compile"))
        head = f"| {t['model']} | {t['batch']} | {t['candidates']} | {t['iterations']} |"
        lines.append(f"{head} {times} | {t['auto']:.1f} ({t['auto_engine']}) |")
    return lines


def _missing(content: dict[str, Any]) -> list[str]:
    named = [f"- {_name(m)}: {m['reason']}." for m in _sorted(content["missing"])]
    for row in _sorted(content["rows"]):
        for engine, reason in row.get("left_out", {}).items():
            named.append(f"- {_name(row)}, `{engine}`: {reason}.")
    return ["", "Not measured:", "", *named] if named else []


def _sorted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=_order)


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
    """One panel for every number of candidates."""
    counts = sorted({row["candidates"] for row in rows})
    widest = max(sum(row["candidates"] == count for row in rows) for count in counts)
    figure = Figure(figsize=(2 + 0.55 * widest, 2.6 * len(counts)), layout="constrained")
    for axis, count in zip(figure.subplots(len(counts), squeeze=False)[:, 0], counts, strict=True):
        shown = _sorted([row for row in rows if row["candidates"] == count])
        for shift, engine in enumerate(ENGINES):
            ratios = [row["ms"]["breaching"] / row["ms"].get(engine, float("nan")) for row in shown]
            axis.bar([i + shift * 0.27 for i in range(len(shown))], ratios, 0.27, label=engine)
        axis.axhline(1, color="gray", linewidth=0.8)
        names = [f"{row['model']}\nB={row['batch']}" for row in shown]
        axis.set_xticks([i + 0.27 for i in range(len(shown))], names, fontsize=6)
        axis.set_xlim(-0.5, widest)
        axis.set_ylabel(f"times faster than\nBreaching, N = {count}", fontsize=8)
    figure.axes[0].legend(fontsize=7)
    write_atomically(path, lambda target: figure.savefig(target, dpi=150))


def _growth(content: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(11.5, 3.2), layout="constrained")
    time_n, memory, time_b = figure.subplots(1, 3)
    for model in sorted({point["model"] for point in content["growth"]}):
        for chunk in (None, 8):
            points = [p for p in content["growth"] if p["model"] == model and p["chunk"] == chunk]
            label = f"{model}, {'one stack' if chunk is None else f'chunks of {chunk}'}"
            count = [p["candidates"] for p in points]
            time_n.loglog(count, [p["ms"] * p["candidates"] for p in points], "o-", label=label)
            grown = [p["peak_rss_bytes"] if (p["peak_rss_bytes"] or 0) > 0 else math.nan for p in points]
            memory.loglog(count, [size / 2**20 for size in grown], "o-", label=label)
    for index, model in enumerate(sorted({row["model"] for row in content["rows"]}, key=str.lower)):
        for engine, style in (("vmap", "o-"), ("compile", "s--")):
            rows = [r for r in content["rows"] if r["model"] == model and r["candidates"] == 8 and engine in r["ms"]]
            rows.sort(key=_order)
            if rows:
                steps = [8 * r["ms"][engine] for r in rows]
                label = f"{model}, {engine}"
                time_b.loglog([r["batch"] for r in rows], steps, style, color=f"C{index}", label=label)
    for axis, x, y in (
        (time_n, "candidates N", "ms a step, B = 1"),
        (memory, "candidates N", "peak memory of a step [MiB]"),
        (time_b, "batch size B", "ms a step, N = 8"),
    ):
        axis.xaxis.set_major_locator(LogLocator(2))
        for ticks in (axis.xaxis, axis.yaxis):
            ticks.set_major_formatter("{x:g}")
            ticks.set_minor_formatter(NullFormatter())
        axis.set_xlabel(x)
        axis.set_ylabel(y)
        beside = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if axis is time_b else {}
        axis.legend(fontsize=6, **beside)
    write_atomically(path, lambda target: figure.savefig(target, dpi=150))


def _name(row: dict[str, Any]) -> str:
    return f"{row['model']}, B = {row['batch']}, N = {row['candidates']}"


def _order(row: dict[str, Any]) -> tuple[str, int, int]:
    return row["model"].lower(), row["batch"], row["candidates"]
