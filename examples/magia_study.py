"""What each ingredient of random-subset gradient matching buys, at equal numbers of gradient evaluations.

LeNet of DLG (sigmoid, uniform ±0.5, untrained), 32×32 sample photos, labels unknown, plain averaged gradients. The
network has DLG's 100 outputs, and every image's label is drawn uniformly from them, as in CIFAR-100, where images of
one batch seldom share a class. With --labels photo there are eight classes, the photos that crops come from: labels
repeat from B = 9 on, and the last layer then tells fewer images apart, which makes large batches much harder. Every
seed is another model, another client (another batch of photos) and another start; all methods get the same ones.
The budget is counted in full-batch gradients: evaluating a subset of S images costs S/B on top.

    python examples/magia_study.py --list                    # the runs, in the order in which they are made
    python examples/magia_study.py --out examples/results/magia
    python examples/magia_study.py --only default,baseline --batch 8,16
    python examples/magia_study.py --report                  # table and figures from the runs that are there

A run that is there is not made again, so that a stopped study goes on where it stopped.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import math
import platform
import statistics
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torchvision
from breaching.cases.models.model_preparation import LeNetZhu
from matplotlib.figure import Figure
from scipy.stats import t as student_t
from tqdm import tqdm

from breaching_ext.collect import flattened
from breaching_ext.data.sample_photos import PHOTOS, SamplePhotos
from breaching_ext.evaluation import evaluate, to_images
from breaching_ext.evaluation.figures import save_reconstruction
from breaching_ext.evaluation.schedules import save_schedules
from breaching_ext.files import write_atomically, write_json
from breaching_ext.matching.magia_engine import Annealing, MagiaEngine, OptimizerOptions, Pyramid, Schedule
from breaching_ext.matching.subset_matching import SubsetMatching, SubsetTerm, Target
from breaching_ext.regularizers.color_tv import anisotropic_total_variation, color_total_variation
from breaching_ext.selection import MODES

log = logging.getLogger("magia_study")

#: budgets in outer steps of 20 full-batch gradients: of the runs at full length, and of the comparison of all methods
FULL = 300
SHORT = {4: 60, 8: 60, 16: 60, 32: 40, 64: 30}
INNER = 20
#: a run ends after that many outer steps, too (a step may need fewer than 20 gradients)
MOST_STEPS = 400
RESULTS = Path("examples/results/magia")
#: an image counts as recovered from this SSIM on
RECOVERED = 0.6


@dataclass(frozen=True)
class Arm:
    """One method. The defaults of the fields are the shipped default of `config/attack/magia.yaml`."""

    text: str
    start: str = "grey"  # grey: uniform in 0.4 … 0.6; randn: DLG's standard normal
    prior: str = "color"  # color | anisotropic
    chroma: float = 5.0
    annealing: Annealing = field(default_factory=lambda: Annealing(0.001, 3.0))
    term: SubsetTerm = field(default_factory=SubsetTerm)
    schedule: Schedule = field(default_factory=Schedule)
    options: OptimizerOptions = field(default_factory=lambda: OptimizerOptions(line_search="strong_wolfe"))
    pyramid: Pyramid = field(default_factory=Pyramid)
    candidates: int = 1  # more: each gets its share of the budget, and their pixel mean is the result


PLAIN = Pyramid((1,), ())
WOLFE = functools.partial(OptimizerOptions, line_search="strong_wolfe")
DEFAULT = Arm("shipped default: grey start, coarse to fine, annealed colour TV, strong-Wolfe L-BFGS, no subset term")
BASELINE = Arm(
    "DLG + annealed TV from grey",
    prior="anisotropic",
    annealing=Annealing(0.002, 0.1),
    options=OptimizerOptions(label_scale=1.0),
    pyramid=PLAIN,
)


def subset(kind: str, mode: str = "constk", alpha: float = 0.999) -> dict[str, Any]:
    return {"term": SubsetTerm(kind, alpha), "schedule": Schedule(mode)}


ARMS: dict[str, Arm] = {
    "default": DEFAULT,
    "baseline": BASELINE,
    "dlg": replace(BASELINE, text="DLG: randn start, no prior", start="randn", annealing=Annealing(0.0)),
    "dlg-tv": replace(BASELINE, text="DLG + constant TV from grey", annealing=Annealing(0.005)),
    "baseline-randn": replace(BASELINE, text="baseline from randn", start="randn"),
    "baseline-adam": replace(
        BASELINE, text="baseline with Adam", options=OptimizerOptions("adam", 0.05, label_scale=1.0)
    ),
    "released": replace(BASELINE, text="baseline + released subset term, S = 2", **subset("released")),
    "mean": replace(BASELINE, text="baseline + subset mean term, S = 2", **subset("mean")),
    "residual": replace(BASELINE, text="baseline + residual subset term, S = 2", **subset("residual")),
    "default-residual": replace(DEFAULT, text="default + residual subset term, S = 2", **subset("residual")),
    "default-residual-half": replace(DEFAULT, text="same, α = 0.5", **subset("residual", alpha=0.5)),
    "default-randn": replace(DEFAULT, text="default from randn", start="randn"),
    "default-coarse": replace(DEFAULT, text="default, prior down to 0.02 only", annealing=Annealing(0.02, 3.0)),
    "default-one-grid": replace(DEFAULT, text="default on one grid", pyramid=PLAIN),
    "default-label1": replace(DEFAULT, text="default, logits not scaled", options=WOLFE(label_scale=1.0)),
    "default-aniso": replace(
        DEFAULT, text="default, per-channel TV", prior="anisotropic", annealing=BASELINE.annealing
    ),
    "default-constant": replace(DEFAULT, text="default, prior not annealed", annealing=Annealing(0.001)),
    "default-chroma1": replace(DEFAULT, text="default, colours weighted like brightness", chroma=1.0),
    "default-history10": replace(DEFAULT, text="default, history 10", options=WOLFE(history_size=10)),
    "default-fixed-step": replace(DEFAULT, text="default without line search", options=OptimizerOptions()),
    "default-adam": replace(DEFAULT, text="default with Adam", options=OptimizerOptions("adam", 0.05)),
    "default-consensus3": replace(DEFAULT, text="default, mean of 3 candidates at a third of the budget", candidates=3),
    **{
        f"schedule-{mode}": replace(DEFAULT, text=f"default + residual term, {mode}", **subset("residual", mode))
        for mode in MODES
    },
}


@dataclass(frozen=True)
class Run:
    """One entry of the study: an arm at a batch size and a length (outer steps of 20 full gradients)."""

    arm: str
    batch: int
    outer: int
    seeds: tuple[int, ...]

    def path(self, out: Path, seed: int) -> Path:
        return out / "runs" / f"{self.arm}_B{self.batch}_{self.outer}x{INNER}_seed{seed}.json"

    def groups(self) -> list[tuple[int, ...]]:
        """Seeds that are optimised as one stack: all of them where stacking is faster."""
        return [self.seeds] if self.batch <= 4 else [(seed,) for seed in self.seeds]


def plan() -> list[Run]:
    """All runs, the most telling ones first."""

    def runs(arms: list[str], batches: list[int], length: dict[int, int] | int) -> list[Run]:
        at = length if isinstance(length, dict) else dict.fromkeys(batches, length)
        return [Run(a, b, at[b], tuple(range(3 if b == 64 else 5))) for b in batches for a in arms]

    every = [8, 16, 64, 32, 4]
    schedules = [name for name in ARMS if name.startswith("schedule")]
    methods = ["default", "baseline", "dlg", "dlg-tv", "released", "mean", "residual"]
    ablation = [name for name in ARMS if name.startswith(("default-", "baseline-"))]
    return [
        *runs(["default"], every, FULL),
        *runs(methods, every, SHORT),
        *runs([*schedules, "default-adam", "baseline-adam"], [16], SHORT),
        *runs(["baseline"], every, FULL),
        *runs(ablation, [8], SHORT),
        *runs(methods, [8, 4], FULL),
    ]


# ---------------------------------------------------------------------- one run


def problem(
    batch: int, seeds: tuple[int, ...], classes: int, labels_of: str = "uniform"
) -> tuple[Target, torch.Tensor, torch.Tensor]:
    """One model, one batch of photos and one shared gradient per seed, stacked.

    Args:
        batch: images in each batch.
        seeds: one for each problem.
        classes: outputs of the network.
        labels_of: 'uniform' (see the head of this file) or 'photo' (the photo that a crop comes from).

    Returns:
        The target, the true images (N, B, 3, 32, 32) and labels (N, B).
    """
    photos = SamplePhotos(transform=torchvision.transforms.ToTensor())
    loss_fn = torch.nn.CrossEntropyLoss()
    parameters, gradients, images, labels = [], [], [], []
    for seed in seeds:
        torch.manual_seed(seed)
        model = LeNetZhu(num_classes=classes)
        points = [photos[i % len(photos)] for i in range(seed * batch, (seed + 1) * batch)]
        x, y = torch.stack([p[0] for p in points]), torch.tensor([p[1] for p in points])
        if labels_of == "uniform":
            y = torch.randint(classes, (batch,), generator=torch.Generator().manual_seed(seed))
        gradients.append(torch.autograd.grad(loss_fn(model(x), y), list(model.parameters())))
        parameters.append({name: p.detach() for name, p in model.named_parameters()})
        images.append(x)
        labels.append(y)
    target = Target(
        model=LeNetZhu(num_classes=classes),
        loss_fn=loss_fn,
        parameters={name: torch.stack([p[name] for p in parameters]) for name in parameters[0]},
        gradients=[torch.stack(column) for column in zip(*gradients, strict=True)],
        per_candidate=True,
    )
    return target, torch.stack(images), torch.stack(labels)


def start(arm: Arm, seeds: tuple[int, ...], shape: tuple[int, ...], classes: int, candidate: int) -> list[torch.Tensor]:
    """Pixels and label logits of every seed; the same for all arms with the same kind of start."""
    pixels, logits = [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(1000 + 100 * candidate + seed)
        x = torch.randn(shape, generator=generator)
        if arm.start == "grey":
            x = 0.4 + 0.2 * torch.rand(shape, generator=generator)
        pixels.append(x)
        logits.append(torch.randn(shape[0], classes, generator=generator))
    return [torch.stack(pixels), torch.stack(logits)]


def outer_steps(arm: Arm, batch: int, budget: float) -> int:
    """Outer steps that `budget` full gradients pay for, given the schedule (which itself depends on their number)."""
    if arm.term.kind == "none":
        return max(1, round(budget / INNER))

    def cost(steps: int) -> float:
        sizes = [arm.schedule.size(i, batch, steps) for i in range(steps)]
        return sum(INNER * (1 + size / batch) for size in sizes)

    steps = 1
    while cost(steps + 1) <= budget:
        steps += 1
    return steps


def scaled(schedule: Schedule, steps: int) -> Schedule:
    """The paper's l_iter = 100 and b = 200 of 300 steps, as shares of this run."""
    return replace(schedule, l_iter=max(1, round(steps / 3)), b=steps * 2 / 3, a=-0.1 * 300 / steps)


def optimise(
    arm: Arm, target: Target, seeds: tuple[int, ...], shape: tuple[int, ...], classes: int, outer: int, candidate: int
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Run one stack to the end of its budget.

    Returns:
        Pixels (N, B, C, H, W), logits (N, B, K), and the curve and the cost per seed.
    """
    budget = outer * INNER / arm.candidates
    steps = outer_steps(replace(arm, schedule=scaled(arm.schedule, outer)), shape[0], budget)

    def prior(x: torch.Tensor) -> torch.Tensor:
        if arm.prior == "color":
            return color_total_variation(x, arm.chroma)
        return anisotropic_total_variation(x)

    engine = MagiaEngine(
        SubsetMatching(target, arm.term, prior),
        start(arm, seeds, shape, classes, candidate),
        seeds=[7 * seed + candidate for seed in seeds],
        iterations=steps,
        schedule=scaled(arm.schedule, steps),
        annealing=arm.annealing,
        options=replace(arm.options, inner_iterations=INNER),
        pyramid=arm.pyramid,
    )
    alive = torch.ones(len(seeds), dtype=torch.bool)
    iteration, losses = 0, []
    bar = tqdm(total=int(budget), desc=f"{arm.text[:40]} B={shape[0]}", unit="grad", leave=False, disable=None)
    while engine.full_gradients < budget * len(seeds) * 0.999 and iteration < MOST_STEPS and bool(alive.any()):
        before = engine.full_gradients
        progress = max(before / (budget * len(seeds)), iteration / MOST_STEPS)
        values = engine.step(iteration, alive, progress).values
        alive = alive & values.isfinite()
        losses.append(values.tolist())
        if engine.full_gradients == before:  # all candidates have converged
            break
        iteration += 1
        bar.update(int((engine.full_gradients - before) / len(seeds)))
    bar.close()
    pixels, logits = engine.parameters
    cost = {"full_gradients_per_seed": engine.full_gradients / len(seeds), "outer_steps": iteration}
    return pixels, logits, {**cost, "failed": (~alive).tolist(), "losses": [list(c) for c in zip(*losses, strict=True)]}


def make(run: Run, seeds: tuple[int, ...], out: Path, classes: int, labels_of: str) -> None:
    """Make the run for some seeds, and write one JSON file each (and the pictures of seed 0)."""
    arm, clock = ARMS[run.arm], time.process_time()
    target, images, labels = problem(run.batch, seeds, classes, labels_of)
    results = [
        optimise(arm, target, seeds, tuple(images.shape[1:]), classes, run.outer, candidate)
        for candidate in range(arm.candidates)
    ]
    pixels, logits = combine(results)
    seconds = time.process_time() - clock
    for n, seed in enumerate(seeds):
        scores = evaluate(to_images(pixels[n]), to_images(images[n]), logits[n].argmax(dim=-1), labels[n])
        record = {
            "arm": run.arm, "text": arm.text, "batch": run.batch, "seed": seed, "classes": classes, "labels": labels_of,
            "outer": run.outer, "budget": run.outer * INNER,
            "full_gradients": sum(r[2]["full_gradients_per_seed"] for r in results),
            "outer_steps": sum(r[2]["outer_steps"] for r in results),
            "failed": any(r[2]["failed"][n] for r in results),
            "cpu_seconds_of_stack": seconds, "stack": len(seeds),
            "method": json.loads(json.dumps(asdict(arm))),
            "metrics": scores.as_dict(), "losses": [r[2]["losses"][n] for r in results],
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
        }  # fmt: skip
        write_json(run.path(out, seed), record)
        if seed == 0 and run.arm in ("default", "baseline"):
            picture = out / f"{run.arm}_B{run.batch}_{run.outer}x{INNER}.png"
            order, psnrs = scores.order, scores.per_image["psnr"]
            save_reconstruction(picture, to_images(images[n]), to_images(pixels[n])[order], psnrs, arm.text)
        log.info("%s B=%d seed %d: %.2f dB", run.arm, run.batch, seed, scores.means["psnr"])


def combine(results: list[tuple[torch.Tensor, torch.Tensor, dict[str, Any]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean over candidates after matching each one's images to the first candidate's (no ground truth)."""
    from breaching_ext.evaluation import assign

    pixels, logits = results[0][0].clone(), results[0][1].softmax(dim=-1)
    for other_pixels, other_logits, _ in results[1:]:
        for n in range(len(pixels)):
            order = assign(other_pixels[n].double(), results[0][0][n].double())
            pixels[n] += other_pixels[n][order]
            logits[n] += other_logits[n].softmax(dim=-1)[order]
    return pixels / len(results), logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, help="default: examples/results/magia, with --labels photo its photo_labels"
    )
    parser.add_argument("--only", help="arms, separated by commas (default: all)")
    parser.add_argument("--batch", help="batch sizes, separated by commas (default: all)")
    parser.add_argument("--outer", type=int, help="only runs of that length; with --only and --batch: that length")
    parser.add_argument("--seeds", type=int, help="number of seeds (default: 5, at B = 64 3)")
    parser.add_argument("--labels", choices=("uniform", "photo"), default="uniform", help="default: %(default)s")
    parser.add_argument("--classes", type=int, help="outputs of the network (default: 100; for --labels photo 8)")
    parser.add_argument("--list", action="store_true", help="print the runs and whether they are there")
    parser.add_argument("--minutes", type=float, help="begin no further run after that time (for sharing a machine)")
    parser.add_argument("--report", action="store_true", help="only write table and figures")
    args = parser.parse_args()
    usual = {"uniform": 100, "photo": len(PHOTOS)}[args.labels]
    args.classes = args.classes or usual
    folder = "" if args.labels == "uniform" else "photo_labels"
    if args.classes != usual:  # another network: its runs are not those that are there
        folder = f"{args.labels}_labels_{args.classes}_classes"
    args.out = args.out or RESULTS / folder
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(1)
    runs = list(dict.fromkeys(chosen(args)))
    clock = time.perf_counter()
    if not args.report:
        refuse_others(parser, [run.path(args.out, seed) for run in runs for seed in run.seeds], args)
    for run in runs:
        for seeds in run.groups():
            missing = tuple(seed for seed in seeds if not run.path(args.out, seed).exists())
            if args.list:
                print(f"{run.arm:24} B={run.batch:<3} {run.outer:4} outer  seeds {seeds}  {'' if missing else 'done'}")
            elif missing and not args.report:
                make(run, missing, args.out, args.classes, args.labels)
                if args.minutes and time.perf_counter() - clock > 60 * args.minutes:
                    break
        else:
            continue
        break
    if not args.list:
        report(args.out)


def refuse_others(parser: argparse.ArgumentParser, paths: list[Path], args: argparse.Namespace) -> None:
    """End where a run that is there was made in another way, and would stand among those of this one."""
    for path in (path for path in paths if path.exists()):
        record = json.loads(path.read_text(encoding="utf-8"))
        other = others(record)
        for key, value in (("labels", args.labels), ("classes", args.classes)):
            if record.get(key, value) != value:
                other.append(f"{key}={record[key]}")
        if other and not args.list:
            parser.error(f"{path} was made with {', '.join(other)}: delete it, or choose another --out")


def others(record: dict[str, Any]) -> list[str]:
    """Settings of a run that are not those that its method has today."""
    known = asdict(ARMS[record["arm"]]) if record["arm"] in ARMS else record["method"]
    now, then = (flattened(json.loads(json.dumps(method))) for method in (known, record["method"]))
    return [f"{key}={then[key]}" for key in sorted(then) if key in now and key != "text" and now[key] != then[key]]


def report(out: Path) -> None:
    """Write summary.json, table.md and two figures from the runs that are there."""
    rows = summarise([json.loads(path.read_text(encoding="utf-8")) for path in sorted((out / "runs").glob("*.json"))])
    if not rows:
        return
    write_json(out / "summary.json", {"rows": rows})
    write_atomically(out / "table.md", lambda target: target.write_text(table(rows), encoding="utf-8"))
    plot_arms(out / "arms.png", rows)
    plot_length(out / "length.png", rows)
    save_schedules(out / "schedules.png", batch_size=16, n_iter=300)


def interval(values: list[float]) -> float:
    """Half of the 95 % confidence interval of the mean (Student's t); NaN for a single value."""
    if len(values) < 2:
        return math.nan
    return float(student_t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values)))


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
        row |= {"psnr": statistics.mean(psnrs), "psnr_ci95": interval(psnrs), "psnr_seeds": psnrs}
        row["seed_numbers"] = [m["seed"] for m in members]
        row["psnr_worst_image"] = min(min(i["psnr"]) for i in images)
        for name in ("ssim", "lpips", "label_acc"):
            values = [m["metrics"][name] for m in members if m["metrics"].get(name) is not None]
            row[name] = statistics.mean(values) if values else None
        row["recovered"] = statistics.mean([statistics.mean([s >= RECOVERED for s in i["ssim"]]) for i in images])
        row["full_gradients"] = statistics.mean([m["full_gradients"] for m in members])
        row["failed"] = sum(m["failed"] for m in members)
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, the best of each batch size and length first."""
    lines = [
        "| B | outer steps | method | seeds | PSNR [dB] (95 %) | worst image | SSIM | LPIPS | labels | SSIM ≥ 0.6 |",
        "|--:|--:|:--|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in sorted(rows, key=lambda r: (r["batch"], -r["outer"], -r["psnr"])):
        lpips = "–" if row["lpips"] is None else f"{row['lpips']:.3f}"
        lines.append(
            f"| {row['batch']} | {row['outer']} | {row['text']} (`{row['arm']}`) | {row['seeds']} "
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
            mean = statistics.mean(differences)
            lines.append(f"| {batch} | {outer} | `{arm}` | `{reference}` | {mean:+.2f} ± {interval(differences):.2f} |")
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


def chosen(args: argparse.Namespace) -> list[Run]:
    runs = plan()
    arms = args.only.split(",") if args.only else None
    unknown = sorted(set(arms or ()) - set(ARMS))
    if unknown:
        raise SystemExit(f"--only {unknown[0]} is unknown; valid: {', '.join(ARMS)}")
    batches = [int(b) for b in args.batch.split(",")] if args.batch else None
    if arms and batches and args.outer:
        count = args.seeds
        return [Run(a, b, args.outer, tuple(range(count or (3 if b == 64 else 5)))) for b in batches for a in arms]
    runs = [r for r in runs if (not arms or r.arm in arms) and (not batches or r.batch in batches)]
    runs = [r for r in runs if not args.outer or r.outer == args.outer]
    return [replace(r, seeds=tuple(range(args.seeds))) for r in runs] if args.seeds else runs


if __name__ == "__main__":
    main()
