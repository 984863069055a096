"""Optimizer study: milliseconds per member-step, against a plain loop with torch's fused optimizers.

    python benchmarks/optimizer_study.py [--device cuda] [--rounds 15] [--cases mlp-adamw ...]

Both sides run in turns in the same process, on the same batches. The baseline is what one would write without
this
package: one model, one `torch.optim` optimizer with ``fused=True`` (Adafactor has no fused form, it runs as
    torch ships
it), 144 times. The other side is whatever the executor's calibration chooses. Ratios are those of the medians
over the rounds, with a 95 % bootstrap interval. Results go to
benchmarks/results/optimizer_study/<device>.{json,md,png}.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from breaching_ext.files import write_atomically
from breaching_ext.optimizer_study import LR_MULTIPLIERS, VARIANTS, WD_MULTIPLIERS, Budget
from breaching_ext.optimizer_study.data import load_fashion_mnist
from breaching_ext.optimizer_study.executor import make_plan
from breaching_ext.optimizer_study.models import create_model
from breaching_ext.optimizer_study.stacked import flushed_denormals
from breaching_ext.optimizer_study.task import TrainingTask
from breaching_ext.optimizer_study.training import SequentialRun, StackedRun

CELLS = [(lr, wd) for lr in LR_MULTIPLIERS for wd in WD_MULTIPLIERS]
RESULTS = Path(__file__).parent / "results" / "optimizer_study"
SECONDS_A_ROUND = 0.5


@dataclass(frozen=True)
class Case:
    """One row of the table: a variant, a model, its data, and the least ratio that is asked for."""

    variant: str
    model: str
    pool: int
    batch_size: int
    target: float


CASES = {
    "mlp-adamw": Case("B3", "mlp", 2, 64, 3.0),
    "mlp-adam-l2": Case("A1", "mlp", 2, 64, 3.0),
    "mlp-sgd": Case("A2", "mlp", 2, 64, 3.0),
    "mlp-adafactor": Case("C1", "mlp", 2, 64, 3.0),
    "small-conv-adamw": Case("B3", "small_conv", 2, 64, 2.0),
    "autoencoder-adamw": Case("B3", "autoencoder", 1, 128, 0.95),
}
CUDA_TARGETS = {"autoencoder-adamw": 10.0}


def make_task(case: Case, device: str) -> TrainingTask:
    """The case as a grid of the study would run it."""
    train, test = load_fashion_mnist(train_size=1024, test_size=128, pool=case.pool)
    variant = VARIANTS[case.variant]
    return TrainingTask(
        variant=variant,
        schedule=variant.create_schedule(100),
        budget=Budget(len(train), case.batch_size, 100),
        model=create_model(case.model, train.shape[-1]).to(device),
        train=train.to(device),
        test=test.to(device),
    )


def baseline(task: TrainingTask) -> Callable[[], None]:
    """A step of a plain training loop."""
    model = copy.deepcopy(task.model)
    params = list(model.parameters())
    optimizers = {
        "A1": lambda: torch.optim.Adam(params, lr=1e-3, weight_decay=1e-3, fused=True),
        "A2": lambda: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-3, fused=True),
        "B3": lambda: torch.optim.AdamW(params, lr=1e-3, weight_decay=1.0, fused=True),
        "C1": lambda: torch.optim.Adafactor(params, lr=1e-2, weight_decay=1e-3),
    }
    optimizer, batch = optimizers[task.variant.id](), next(task.batches(0))

    def step() -> None:
        optimizer.zero_grad()
        F.mse_loss(model(batch), batch).backward()
        optimizer.step()

    return step


def planned(task: TrainingTask, compiled: object) -> tuple[Callable[[], None], int, dict]:
    """A step of what the executor chooses, how many members it advances, and the plan."""
    plan = make_plan(task, CELLS, compiled=compiled)
    members = CELLS[: plan.chunk]
    run = StackedRun(task, members, plan.compiled) if plan.executor == "stacked" else SequentialRun(task, members)
    batch = next(task.batches(0))

    def step() -> None:
        run.step(batch, task.moment(0, 0))

    return step, len(members), plan.to_dict()


def measure(name: str, case: Case, device: str, rounds: int, compiled: object) -> dict:
    """Time both sides of a case in turns."""
    task = make_task(case, device)
    ours, members, plan = planned(task, compiled)
    theirs = baseline(task)
    times: dict[str, list[float]] = {f"{side}_{clock}": [] for side in ("ours", "torch") for clock in ("wall", "cpu")}
    sides = (("torch", theirs, 1), ("ours", ours, members))
    counts = {side: max(1, int(SECONDS_A_ROUND / seconds_of(step, device, 1)[0])) for side, step, _ in sides}
    for turn in range(rounds):
        for side, step, size in sides if turn % 2 else reversed(sides):
            for clock, seconds in zip(("wall", "cpu"), seconds_of(step, device, counts[side]), strict=True):
                times[f"{side}_{clock}"].append(1e3 * seconds / counts[side] / size)
    target = CUDA_TARGETS.get(name, case.target) if device.startswith("cuda") else case.target
    row = {
        "case": name,
        "variant": case.variant,
        "model": case.model,
        "batch_size": case.batch_size,
        "plan": plan,
        "torch_ms": statistics.median(times["torch_wall"]),
        "ours_ms": statistics.median(times["ours_wall"]),
        "ratio": ratio_of(times["torch_wall"], times["ours_wall"]),
        "cpu_ratio": ratio_of(times["torch_cpu"], times["ours_cpu"]),
        "target": target,
        "rounds": times,
    }
    if case.model == "autoencoder":
        row["full_study_hours"] = full_study_steps() * row["ours_ms"] / 3.6e6
    return row


def full_study_steps() -> int:
    """Member-steps of the study as defined: 15 variants × 144 points on 60,000 images, batch 128."""
    budget = Budget()
    epochs = sum(variant.create_schedule(budget.epochs).epochs for variant in VARIANTS.values())
    return epochs * budget.steps_per_epoch * len(CELLS)


def seconds_of(step: Callable[[], None], device: str, count: int) -> tuple[float, float]:
    """Wall time and processor time of ``count`` steps, after one to warm up."""
    step()
    synchronize(device)
    started, cpu_started = time.perf_counter(), time.process_time()
    for _ in range(count):
        step()
    synchronize(device)
    return time.perf_counter() - started, time.process_time() - cpu_started


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def ratio_of(theirs: list[float], ours: list[float], draws: int = 4000) -> list[float]:
    """Ratio of medians and its 95 % interval; rounds are resampled in pairs, since they share the machine's
    mood."""
    rng = np.random.default_rng(0)
    index = rng.integers(len(ours), size=(draws, len(ours)))
    ratios = np.median(np.asarray(theirs)[index], 1) / np.median(np.asarray(ours)[index], 1)
    low, high = np.quantile(ratios, [0.025, 0.975]).tolist()
    return [statistics.median(theirs) / statistics.median(ours), low, high]


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    lines = [
        "| case | torch, ms | ours, ms | ratio (95 %) | in CPU time | asked | chosen | compile, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        plan = row["plan"]
        chosen = plan["executor"] + (f", compiled, {plan['chunk']} at once" if plan["compiled"] else "")
        wall, cpu = (f"{r:#.3g} ({low:#.3g}–{high:#.3g})" for r, low, high in (row["ratio"], row["cpu_ratio"]))
        asked = f"≥ {row['target']:g}" + ("" if row["ratio"][0] >= row["target"] else ", missed")
        seconds = "–" if plan["compile_seconds"] is None else f"{plan['compile_seconds']:.0f}"
        lines.append(
            f"| {row['case']} | {row['torch_ms']:.3f} | {row['ours_ms']:.3f} "
            f"| {wall} | {cpu} | {asked} | {chosen} | {seconds} |"
        )
    for row in rows:
        if "full_study_hours" in row:
            lines += [
                "",
                f"The whole study (2,160 runs, {row['case']}) at this rate: {row['full_study_hours']:.1f} h.",
            ]
    return "\n".join(lines) + "\n"


def draw(rows: list[dict], path: Path) -> None:
    """Ratios with their intervals, and what was asked for."""
    figure = Figure(figsize=(7, 0.6 * len(rows) + 1.2), layout="constrained")
    ax = figure.add_subplot()
    ratios, *limits = np.array([row["ratio"] for row in rows]).T
    spans = np.abs(np.array(limits) - ratios)
    ax.barh(range(len(rows)), ratios, xerr=spans, color="tab:blue", alpha=0.8, label="measured (95 %)")
    ax.plot([row["target"] for row in rows], range(len(rows)), "k|", markersize=18, label="asked for")
    ax.set_yticks(range(len(rows)), [row["case"] for row in rows])
    ax.invert_yaxis()
    ax.axvline(1.0, color="0.5", linewidth=0.8)
    ax.set_xlabel("times faster per member-step than a loop with torch.optim (fused)")
    ax.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run the cases and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cases", nargs="+", choices=sorted(CASES), default=list(CASES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-compile", action="store_true", help="leave compiling out of the choice")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = known_rows(args)
    with flushed_denormals():
        for name in args.cases:
            row = measure(name, CASES[name], args.device, args.rounds, not args.no_compile and "auto")
            rows = sorted([*(r for r in rows if r["case"] != name), row], key=lambda r: list(CASES).index(r["case"]))
            print(table([row]).splitlines()[2], flush=True)
            write(rows, args)  # after every case, so that an interrupted run keeps what it has


def known_rows(args: argparse.Namespace) -> list[dict]:
    """Rows of the file, where torch and the numbers of cores and threads are the same."""
    file = args.out / f"{args.device.split(':')[0]}.json"
    if not file.exists():
        return []
    known = json.loads(file.read_text())
    same = (known["torch"], known["threads"], known["cores"]) == (torch.__version__, args.threads, os.cpu_count())
    return [row for row in known["rows"] if row["case"] in CASES] if same else []


def write(rows: list[dict], args: argparse.Namespace) -> None:
    """Write figures, table and picture of the cases so far."""
    cuda = args.device.startswith("cuda")
    meta = {
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "threads": args.threads,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "torch": torch.__version__,
        "rows": rows,
    }
    stem = args.out / args.device.split(":")[0]
    write_atomically(stem.with_suffix(".json"), lambda target: target.write_text(json.dumps(meta, indent=1) + "\n"))
    write_atomically(stem.with_suffix(".md"), lambda target: target.write_text(table(rows)))
    write_atomically(stem.with_suffix(".png"), lambda target: draw(rows, target))


if __name__ == "__main__":
    main()
