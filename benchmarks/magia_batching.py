"""MAGIA: N candidates as one stack against the same candidates one after another, in one process, interleaved.

    python benchmarks/magia_batching.py --batch 1,4,8,16

Both ways make the same iterations from the same starts (LeNet, 32×32 photos, one shared gradient). Prints medians
and their ratio for each batch size, with and without line search, and writes JSON and a plot to --out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
import torchvision
from breaching.cases.models.model_preparation import LeNetZhu
from matplotlib.figure import Figure

from breaching_ext.data import SamplePhotos
from breaching_ext.environment import describe_device, versions
from breaching_ext.files import write_atomically, write_json
from breaching_ext.matching.magia_engine import MagiaEngine, OptimizerOptions
from breaching_ext.matching.subset_matching import SubsetMatching, SubsetTerm, Target
from breaching_ext.regularizers.color_tv import color_total_variation


def target(batch: int) -> tuple[Target, int]:
    torch.manual_seed(0)
    data = SamplePhotos(transform=torchvision.transforms.ToTensor(), labels="uniform", classes=100)
    points = [data[i] for i in range(batch)]
    model, loss_fn = LeNetZhu(num_classes=len(data.classes)), torch.nn.CrossEntropyLoss()
    loss = loss_fn(model(torch.stack([p[0] for p in points])), torch.tensor([p[1] for p in points]))
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return Target(model, loss_fn, {k: p.detach() for k, p in model.named_parameters()}, gradients), len(data.classes)


def seconds(matching: SubsetMatching, starts: list[torch.Tensor], steps: int, search: str | None) -> float:
    """Time of `steps` outer steps of all candidates: as one stack, or one after another where the method is 'list'."""
    count = len(starts[0])
    blocks = [slice(n, n + 1) for n in range(count)] if matching.method == "list" else [slice(None)]
    clock = time.perf_counter()
    for block in blocks:
        part = [start[block] for start in starts]
        engine = MagiaEngine(
            matching,
            part,
            seeds=list(range(len(part[0]))),
            iterations=steps,
            options=OptimizerOptions(line_search=search),
        )
        for iteration in range(steps):
            engine.step(iteration, torch.ones(len(part[0]), dtype=torch.bool))
    return time.perf_counter() - clock


def measure(batch: int, methods: list[str], args: argparse.Namespace) -> list[dict]:
    """One row a line search; the methods take turns."""
    what, classes = target(batch)
    torch.manual_seed(1)
    starts = [
        0.4 + 0.2 * torch.rand(args.candidates, batch, 3, 32, 32),
        torch.randn(args.candidates, batch, classes),
    ]
    made = {m: SubsetMatching(what, SubsetTerm(), color_total_variation, method=m) for m in ("list", *methods)}
    set_up = {}
    for method, matching in made.items():  # recording and compiling happen at the first call
        clock = time.perf_counter()
        matching(*starts, None, 0.1)
        set_up[method] = time.perf_counter() - clock
    rows = []
    for search in (None, "strong_wolfe"):
        times: dict[str, list[float]] = {method: [] for method in made}
        for _ in range(args.rounds):
            for method, matching in made.items():
                times[method].append(seconds(matching, starts, args.steps, search))
        medians = {method: statistics.median(values) for method, values in times.items()}
        row = {"batch": batch, "line_search": search, "seconds": times, "set_up_seconds": set_up}
        row["ratio"] = {method: medians["list"] / medians[method] for method in methods}
        rows.append(row)
        shown = ", ".join(f"{method} {medians[method]:.2f} s ({row['ratio'][method]:.2f}x)" for method in methods)
        print(
            f"B={batch:<3} {search or 'fixed step':13} one after another {medians['list']:6.2f} s, {shown}", flush=True
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", default="1,4,8,16", help="batch sizes (default: %(default)s)")
    parser.add_argument("--methods", default="vmap,compile", help="ways to stack (default: %(default)s)")
    parser.add_argument("--candidates", type=int, default=8, help="N (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="outer steps of 20 iterations (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved repetitions (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    methods = args.methods.split(",")
    rows = [row for batch in args.batch.split(",") for row in measure(int(batch), methods, args)]
    record = {"candidates": args.candidates, "outer_steps": args.steps, "threads": args.threads, "rows": rows}
    record |= {"device": describe_device(torch.device("cpu")), "versions": versions()}
    write_json(args.out / "magia_batching.json", record)
    plot(args.out / "magia_batching.png", rows, methods, args.candidates)


def plot(path: Path, rows: list[dict], methods: list[str], candidates: int) -> None:
    figure = Figure(figsize=(5, 3), layout="constrained")
    axis = figure.subplots()
    for method in methods:
        for search, style in ((None, "o-"), ("strong_wolfe", "s--")):
            mine = [row for row in rows if row["line_search"] == search]
            ratios = [row["ratio"][method] for row in mine]
            axis.plot([str(r["batch"]) for r in mine], ratios, style, label=f"{method}, {search or 'fixed step'}")
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.set(xlabel="images in the batch", ylabel="times faster", title=f"{candidates} candidates stacked")
    axis.legend()
    write_atomically(path, lambda where: figure.savefig(where, dpi=120))


if __name__ == "__main__":
    main()
