"""Breaching's sequential loop against our engines on the same gradients, interleaved in one process.

    python benchmarks/matching.py                                                    # every row that is not there yet
    python benchmarks/matching.py --models lenet_zhu --batch-sizes 1 4 --candidates 8 --again
    python benchmarks/matching.py --models lenet_zhu --batch-sizes 1 --candidates 8 --total 2000   # run to the end
    python benchmarks/matching.py --models lenet_zhu --growth                        # time and memory against N
    python benchmarks/matching.py --minutes 25 --compile-at-most 90                  # what fits into so much time

A row is a model, a batch size B and a number of candidates N. All engines get the same gradient, config and starts and
are timed in turn, round after round; ratios are of medians, Breaching's `_run_trial` being 1, with intervals from the
rounds. A round of an engine has as many iterations as fit into less than a second. Compilation starts with an empty
cache. Rows are added to results.json, so that a long table can be measured in pieces; table.md and the plots are drawn
from it every time. A row that is not measured is listed with the reason.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from machine import OtherProcesses, compute_rates, describe_machine, flops, operation_shares, peak_rss, provenance
from matching_case import Case, Runner, fresh_caches, quiet, seconds_each, timed
from matching_report import KEYS, load_rows, save_report
from matching_runs import measure_growth, measure_total

from breaching_ext.matching.engine_parts import BuiltEngine
from breaching_ext.matching.heap import keeping_freed_memory
from breaching_ext.registration import register

ENGINES = ("list", "vmap", "compile")
SLOW = 4.0  # seconds of all candidates' step from which as little as possible is repeated:
SLOW_SECONDS = 200.0  # rounds as fit into these, two at least


class NotMeasuredError(Exception):
    """Why a row is left out."""


def measure_row(model: str, batch: int, candidates: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return one row: times, memory, agreement and what `auto` does."""
    with fresh_caches():
        case = Case(model, batch, candidates, args.device)
        alone = seconds_each(case.breaching_trial, 2)
        if alone * candidates > args.row_at_most:
            raise NotMeasuredError(f"one iteration of all candidates takes Breaching {alone * candidates:.0f} s")
        case.slow = alone * candidates > SLOW
        row: dict[str, Any] = row_key(model, batch, candidates, args)
        auto, auto_seconds = case.build("auto")
        built, setup, row["left_out"] = build_engines(case, auto, args)
        runners = {"breaching": case.breaching_trial, **{name: case.joint_run(b) for name, b in built.items()}}
        others = OtherProcesses()
        with keeping_freed_memory():  # as an attack does; without a pause after every round, and Breaching's, too
            times, row["peak_rss_bytes"] = interleaved(runners, case, args)
        row["other_processes"], row["measured"] = others.share(), provenance()
        row["gflops"] = args.rates  # of this call: a shared machine's rates are others another day
        row["ms"] = {name: 1000 * statistics.median(values) for name, values in times.items()}
        row["ms_all"] = {name: [round(1000 * v, 4) for v in values] for name, values in times.items()}
        row["setup_seconds"] = setup
        row["bytes_per_candidate"] = auto.memory.per_candidate
        row["gradient_difference"] = {name: case.agreement(engine) for name, engine in built.items()}
        row["breaching_rounding"] = case.sensitivity()
        row["auto"] = describe_auto(auto, auto_seconds)
        if "vmap" in built:
            row["profile"] = profile(case, built, row["ms"], args)
        return row


def describe_auto(auto: BuiltEngine, seconds: float) -> dict[str, Any]:
    """Return what `auto` took, what deciding (and compiling) took, and why."""
    calibration = auto.calibration.as_dict() if auto.calibration else None
    return {"engine": auto.engine.name, "seconds": seconds, "calibration": calibration}


def measure_auto(model: str, batch: int, candidates: int, args: argparse.Namespace) -> dict[str, Any]:
    """Let `auto` decide once more, for a row whose steps are timed."""
    with fresh_caches():
        return describe_auto(*Case(model, batch, candidates, args.device).build("auto"))


def build_engines(
    case: Case, auto: BuiltEngine, args: argparse.Namespace
) -> tuple[dict[str, BuiltEngine], dict[str, float], dict[str, str]]:
    """Return engines, the seconds each took to be ready, and why others are left out."""
    built, setup, left_out = {}, {}, {}
    found = auto.calibration
    compiled_by_auto = found.compile_seconds if found else None
    expected = (found.expected_compile_seconds if found else None) or 0.0
    for name in ENGINES:
        if name not in args.engines:
            left_out[name] = "left out to save time"
            continue
        if name == "compile" and compiled_by_auto is None and expected > args.compile_at_most:
            left_out[name] = f"compiling is expected to take {expected:.0f} s"
            continue
        if case.slow and found and auto.engine.name == name != "list":  # is not built twice for nothing
            engine, seconds = auto, found.compile_seconds if name == "compile" else found.recording_seconds
        else:
            engine, seconds = case.build(name)
        if engine.engine.name != name:
            left_out[name] = f"gives way to {engine.engine.name}"
            continue
        built[name], setup[name] = engine, seconds
    if "compile" in built and built["compile"] is not auto:
        if compiled_by_auto is not None:  # auto compiled first, so this was from the cache on disk
            setup["compile"], setup["compile_again"] = compiled_by_auto, setup["compile"]
        elif args.cached:
            torch._dynamo.reset()
            _, setup["compile_again"] = case.build("compile")
    return built, setup, left_out


def interleaved(
    runners: dict[str, Runner], case: Case, args: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, int | None]]:
    """Return seconds a candidate-iteration, round after round, and the memory that a first short call takes."""
    memory, iterations, expected = {}, {}, {}
    for name, runner in runners.items():
        least = 1 if case.slow and name != "breaching" else 2
        spent: list[float] = []
        memory[name] = peak_rss(
            lambda runner=runner, spent=spent, least=least: spent.append(seconds_each(runner, least)), args.device
        )
        if least > 1:
            spent.append(seconds_each(runner, least))
        step = spent[-1] * (1 if name == "breaching" else case.candidates)
        iterations[name] = int(min(max(args.round_seconds / step, least), 200))
        expected[name] = step * iterations[name]
    times = defaultdict(list)
    held = max(2, int(SLOW_SECONDS / sum(expected.values())))
    for _ in range(min(args.rounds, held) if case.slow else args.rounds):
        for name, runner in runners.items():
            times[name].append(seconds_each(runner, iterations[name]))
    return times, memory


def profile(
    case: Case, built: dict[str, BuiltEngine], ms: dict[str, float], args: argparse.Namespace
) -> dict[str, Any]:
    """Say where a step's time goes: arithmetic at the machine's rate, the evaluation, and the rest of the step."""
    stacks = case.parts().starts
    found: dict[str, Any] = {"gflop_per_step": flops(lambda: built["vmap"].engine.evaluation(*stacks)) / 1e9}
    for name in ("vmap", "compile"):
        if name in built:
            engine = built[name].engine
            step = ms[name] * case.candidates / 1000
            if not case.slow:
                with keeping_freed_memory():
                    spent = [timed(lambda e=engine: e.evaluation(*stacks)) for _ in range(7)]
                    found[f"operation_shares_{name}"] = operation_shares(lambda e=engine: e.evaluation(*stacks))
                found[f"evaluation_share_{name}"] = statistics.median(spent) / step
            found[f"share_of_rate_{name}"] = found["gflop_per_step"] / step / max(args.rates.values())
    found["operations"] = built["vmap"].engine.evaluation.operations
    return found


def row_key(model: str, batch: int, candidates: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return what names a row."""
    return dict(zip(KEYS, (model, batch, candidates, str(args.device), args.threads), strict=True))


def one_row(content: dict[str, Any], model: str, batch: int, candidates: int, args: argparse.Namespace) -> None:
    """Measure a row, or its run to the end, into the results; a row that cannot be measured leaves its reason."""
    key = row_key(model, batch, candidates, args)

    def others(name: str) -> list[dict[str, Any]]:
        return [entry for entry in content[name] if {k: entry[k] for k in KEYS} != key]

    if args.total:
        content["totals"] = [
            *others("totals"),
            {**key, **measure_total(model, batch, candidates, args.device, args.total)},
        ]
    elif args.auto:
        for row in (row for row in content["rows"] if {k: row[k] for k in KEYS} == key):
            row["auto"] = measure_auto(model, batch, candidates, args)
    elif args.again or len(others("rows")) == len(content["rows"]):
        content["missing"] = others("missing")
        if time.perf_counter() > args.deadline:
            if len(others("rows")) == len(content["rows"]):  # a row that is there stays as it is
                content["missing"].append({**key, "reason": "the time set aside for the table was over"})
            return
        try:
            content["rows"] = [*others("rows"), measure_row(model, batch, candidates, args)]
        except NotMeasuredError as reason:
            content["missing"].append({**key, "reason": str(reason)})


def main() -> None:
    """Measure the rows that are asked for and not there, and draw the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["lenet_zhu", "cnn6", "ConvNet", "ResNet20", "ResNet18"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--candidates", type=int, nargs="+", default=[8, 1, 32])
    parser.add_argument("--engines", nargs="+", default=list(ENGINES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--round-seconds", type=float, default=0.7, help="about how long an engine's round takes")
    parser.add_argument("--row-at-most", type=float, default=20.0, help="leave out rows whose iteration is longer [s]")
    parser.add_argument("--compile-at-most", type=float, default=600.0, help="leave out longer compilations [s]")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no row after so many minutes")
    parser.add_argument("--cached", action=argparse.BooleanOptionalAction, default=True, help="compile again, cached")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--total", type=int, help="instead: run to the end with that many iterations")
    parser.add_argument("--growth", action="store_true", help="instead: time and memory against N")
    parser.add_argument("--auto", action="store_true", help="instead: let `auto` decide again in rows that are there")
    parser.add_argument("--again", action="store_true", help="measure rows that are there, too")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "matching")
    args = parser.parse_args()
    args.deadline = time.perf_counter() + 60 * args.minutes
    warnings.filterwarnings("ignore")
    quiet()
    torch.set_num_threads(args.threads)
    register()
    content = load_rows(args.out)
    args.rates = compute_rates(args.device)
    content["machine"] = {**describe_machine(args.device, args.threads), "gflops": args.rates}
    rows = [(m, b, n) for n in args.candidates for m in args.models for b in args.batch_sizes]
    if args.growth:
        for model in args.models:
            points = [p for p in content["growth"] if p["model"] != model]
            content["growth"] = points + measure_growth(model, args.device, args.rounds)
        rows = []
    for model, batch, candidates in rows:
        one_row(content, model, batch, candidates, args)
        save_report(content, args.out)
        print(f"{model} B={batch} N={candidates}: {time.strftime('%H:%M:%S')}", flush=True)
    print(save_report(content, args.out))


if __name__ == "__main__":
    main()
