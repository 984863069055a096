"""Breaching's sequential loop against our engines: seconds per candidate-iteration, side by side in one process.

    python benchmarks/matching.py                                          # the committed table
    python benchmarks/matching.py --models lenet_zhu --batch-sizes 1 4 --candidates 8

All engines get the same gradient, config and starts, and are timed in turn, round after round; the table holds ratios
of medians, Breaching's `_run_trial` being 1. Writes JSON, a table and a plot.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import platform
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import breaching
import torch
from breaching.attacks.optimization_based_attack import OptimizationBasedAttacker
from matplotlib.figure import Figure
from omegaconf import open_dict

from breaching_ext.attacks import JointCandidateAttacker
from breaching_ext.attacks.joint_candidates import Target
from breaching_ext.attacks.joint_loop import JointLoop
from breaching_ext.files import write_atomically, write_json
from breaching_ext.matching import build_engine
from breaching_ext.registration import register
from breaching_ext.run import seed_everything, versions


def case(model: str, batch: int, candidates: int, iterations: int, device: torch.device) -> tuple:
    """Return Breaching's attacker, ours, and what the client shared."""
    overrides = [
        "case=sample_photos",
        "attack=joint_candidates",
        f"case.model={model}",
        f"case.user.num_data_points={batch}",
        f"attack.restarts.num_trials={candidates}",
        f"attack.optim.max_iterations={iterations}",
        "attack.optim.callback=1000000",
        "attack.regularization.group_regularization.scale=0",
        "attack.impl.progress=false",
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        cfg = breaching.get_config(overrides=overrides)
    seed_everything(0)
    setup = {"device": device, "dtype": torch.float}
    user, server, net, loss_fn = breaching.cases.construct_case(cfg.case, setup)
    shared, payload, _ = server.run_protocol(user)
    with open_dict(cfg.attack):
        ours = JointCandidateAttacker(net, loss_fn, cfg.attack, setup)
        plain = cfg.attack.copy()
        del plain.regularization.group_regularization
        theirs = OptimizationBasedAttacker(net, loss_fn, plain, setup)
    return theirs, ours, payload, shared


def runners(model: str, batch: int, candidates: int, args: argparse.Namespace) -> dict[str, Callable[[], int]]:
    """Return engine -> function that runs some iterations and returns how many candidate-iterations they were."""
    theirs, ours, payload, shared = case(model, batch, candidates, args.iterations, args.device)
    models, labels, _ = theirs.prepare_attack(payload, shared)

    def sequential() -> int:
        theirs._run_trial(models, shared, labels, defaultdict(list), 0)
        return args.iterations

    found: dict[str, Callable[[], int]] = {"breaching": sequential}
    models, labels, _ = ours.prepare_attack(payload, shared)
    target = Target(models, shared, labels, [batch, *ours.data_shape])
    ours.objective.initialize(ours.loss_fn, ours.cfg.impl, None)
    for name in args.engines:
        streams = ours._streams()
        parts = ours._engine_parts(target, ours._starts(target, streams, None), streams)
        engine = build_engine(name, parts)
        if engine.name != name:
            print(f"  {name} is not possible here, {engine.name} took its place: left out")
            continue

        def joint(engine=engine) -> int:
            JointLoop(engine, ours.cfg, ours._box()).run()
            return args.iterations * candidates

        found[name] = joint
    return found


def measure(found: dict[str, Callable[[], int]], rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Return median seconds per candidate-iteration, and the seconds of each engine's first round (warm-up)."""
    first, times = {}, defaultdict(list)
    for name, runner in found.items():
        start = time.perf_counter()
        runner()
        first[name] = time.perf_counter() - start
    for _ in range(rounds):
        for name, runner in found.items():
            start = time.perf_counter()
            steps = runner()
            times[name].append((time.perf_counter() - start) / steps)
    return {name: statistics.median(values) for name, values in times.items()}, first


def table(rows: list[dict]) -> str:
    """Return a markdown table of ratios."""
    engines = sorted({name for row in rows for name in row["ms_per_candidate_iteration"]} - {"breaching"})
    lines = ["| model | B | N | Breaching [ms] | " + " | ".join(engines) + " |", "|" + "---|" * (4 + len(engines))]
    for row in rows:
        ms = row["ms_per_candidate_iteration"]
        cells = [f"{ms['breaching'] / ms[e]:.2f}x" if e in ms else "-" for e in engines]
        lines.append(
            f"| {row['model']} | {row['batch']} | {row['candidates']} | {ms['breaching']:.2f} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    """Draw the speed-up over Breaching's loop, a bar for every row and engine."""
    engines = sorted({name for row in rows for name in row["ms_per_candidate_iteration"]} - {"breaching"})
    figure = Figure(figsize=(1.2 + 0.8 * len(rows), 3.2), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / max(1, len(engines))
    for shift, engine in enumerate(engines):
        ratios = [
            row["ms_per_candidate_iteration"]["breaching"] / row["ms_per_candidate_iteration"].get(engine, float("nan"))
            for row in rows
        ]
        axis.bar([i + shift * width for i in range(len(rows))], ratios, width, label=engine)
    axis.axhline(1, color="gray", linewidth=0.8)
    names = [f"{row['model']}\nB={row['batch']}, N={row['candidates']}" for row in rows]
    axis.set_xticks([i + 0.4 - width / 2 for i in range(len(rows))], names, fontsize=7)
    axis.set_ylabel("speed-up over Breaching's loop")
    axis.legend(fontsize=7)
    write_atomically(path, lambda target: figure.savefig(target, dpi=150))


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["lenet_zhu", "cnn6"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--candidates", type=int, nargs="+", default=[8])
    parser.add_argument("--engines", nargs="+", default=["list", "vmap"])
    parser.add_argument("--iterations", type=int, default=20, help="iterations of one timed round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", type=torch.device, default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "matching")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    register()
    rows = []
    for model in args.models:
        for batch in args.batch_sizes:
            for candidates in args.candidates:
                seconds, first = measure(runners(model, batch, candidates, args), args.rounds)
                rows.append(
                    {
                        "model": model,
                        "batch": batch,
                        "candidates": candidates,
                        "ms_per_candidate_iteration": {name: 1000 * value for name, value in seconds.items()},
                        "first_round_seconds": first,
                    }
                )
                print(table(rows[-1:]).splitlines()[-1], flush=True)
    machine = {"cpu": _cpu(), "threads": args.threads, "device": str(args.device), "versions": versions()}
    write_json(args.out / "results.json", {"machine": machine, "rounds": args.rounds, "rows": rows})
    write_atomically(args.out / "table.md", lambda target: target.write_text(table(rows) + "\n"))
    plot(rows, args.out / "speedup.png")
    print("\n" + table(rows))


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    return f"{names[0] if names else platform.processor()} x {len(names) or '?'}"


if __name__ == "__main__":
    main()
