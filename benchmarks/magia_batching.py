"""MAGIA: N candidates as one stack against the same candidates one after another, in one process, interleaved.

    python benchmarks/magia_batching.py --batch 1,4,8

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
from breaching_ext.files import write_atomically, write_json
from breaching_ext.matching.magia_engine import MagiaEngine, OptimizerOptions
from breaching_ext.matching.subset_matching import SubsetMatching, SubsetTerm, Target
from breaching_ext.regularizers.color_tv import color_total_variation
from breaching_ext.run import describe_device, versions


def target(batch: int) -> tuple[Target, int]:
    torch.manual_seed(0)
    data = SamplePhotos(transform=torchvision.transforms.ToTensor())
    points = [data[i] for i in range(batch)]
    model, loss_fn = LeNetZhu(num_classes=len(data.classes)), torch.nn.CrossEntropyLoss()
    loss = loss_fn(model(torch.stack([p[0] for p in points])), torch.tensor([p[1] for p in points]))
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return Target(model, loss_fn, {k: p.detach() for k, p in model.named_parameters()}, gradients), len(data.classes)


def seconds(what: Target, starts: list[torch.Tensor], steps: int, search: str | None, stacked: bool) -> float:
    """Time of `steps` outer steps of all candidates, made together or one after another."""
    count = len(starts[0])
    blocks = [slice(None)] if stacked else [slice(n, n + 1) for n in range(count)]
    method = "vmap" if stacked else "list"
    clock = time.perf_counter()
    for block in blocks:
        part = [start[block] for start in starts]
        engine = MagiaEngine(
            SubsetMatching(what, SubsetTerm(), color_total_variation, method=method),
            part,
            seeds=list(range(len(part[0]))),
            iterations=steps,
            options=OptimizerOptions(line_search=search),
        )
        for iteration in range(steps):
            engine.step(iteration, torch.ones(len(part[0]), dtype=torch.bool))
    return time.perf_counter() - clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", default="1,4,8", help="batch sizes (default: %(default)s)")
    parser.add_argument("--candidates", type=int, default=8, help="N (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="outer steps of 20 iterations (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved repetitions (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for batch in (int(b) for b in args.batch.split(",")):
        what, classes = target(batch)
        torch.manual_seed(1)
        starts = [
            0.4 + 0.2 * torch.rand(args.candidates, batch, 3, 32, 32),
            torch.randn(args.candidates, batch, classes),
        ]
        for search in (None, "strong_wolfe"):
            times: dict[bool, list[float]] = {True: [], False: []}
            seconds(what, starts, 1, search, True)  # warm-up
            for _ in range(args.rounds):
                for stacked in (True, False):
                    times[stacked].append(seconds(what, starts, args.steps, search, stacked))
            medians = {stacked: statistics.median(values) for stacked, values in times.items()}
            row = {"batch": batch, "line_search": search, "stacked": times[True], "one_by_one": times[False]}
            row["ratio"] = medians[False] / medians[True]
            rows.append(row)
            print(
                f"B={batch:<3} {search or 'fixed step':13} stack {medians[True]:6.2f} s, one after another "
                f"{medians[False]:6.2f} s: {row['ratio']:.2f}x",
                flush=True,
            )
    record = {"candidates": args.candidates, "outer_steps": args.steps, "rows": rows}
    record |= {"device": describe_device(torch.device("cpu")), "versions": versions()}
    write_json(args.out / "magia_batching.json", record)
    plot(args.out / "magia_batching.png", rows, args.candidates)


def plot(path: Path, rows: list[dict], candidates: int) -> None:
    figure = Figure(figsize=(5, 3), layout="constrained")
    axis = figure.subplots()
    for search in (None, "strong_wolfe"):
        mine = [row for row in rows if row["line_search"] == search]
        axis.plot([str(r["batch"]) for r in mine], [r["ratio"] for r in mine], "o-", label=search or "fixed step")
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.set(xlabel="images in the batch", ylabel="times faster", title=f"{candidates} candidates stacked")
    axis.legend()
    write_atomically(path, lambda where: figure.savefig(where, dpi=120))


if __name__ == "__main__":
    main()
