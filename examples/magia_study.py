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
import json
import logging
import platform
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torchvision
from breaching.cases.models.model_preparation import LeNetZhu
from magia_arms import ARMS, INNER, Arm, Run, plan
from magia_report import others, report
from tqdm import tqdm

from breaching_ext.data.sample_photos import PHOTOS, SamplePhotos
from breaching_ext.evaluation import evaluate, to_images
from breaching_ext.evaluation.figures import save_reconstruction
from breaching_ext.files import write_json
from breaching_ext.matching.magia_engine import MagiaEngine, Schedule
from breaching_ext.matching.subset_matching import SubsetMatching, Target
from breaching_ext.regularizers.color_tv import anisotropic_total_variation, color_total_variation

log = logging.getLogger("magia_study")

#: a run ends after that many outer steps, too (a step may need fewer than 20 gradients)
MOST_STEPS = 400
RESULTS = Path(__file__).parent / "results" / "magia"


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
    cost["schedule"] = asdict(engine.schedule)
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
            "schedule_of_the_run": results[0][2]["schedule"],
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
        for seed in run.seeds:  # each by itself: in a stack, one that ends early would leave its budget to the others
            missing = not run.path(args.out, seed).exists()
            if args.list:
                print(f"{run.arm:24} B={run.batch:<3} {run.outer:4} outer  seed {seed}  {'' if missing else 'done'}")
            elif missing and not args.report:
                make(run, (seed,), args.out, args.classes, args.labels)
                if args.minutes and time.perf_counter() - clock > 60 * args.minutes:
                    break
        else:
            continue
        break
    if not args.list and not report(args.out):
        raise SystemExit(f"There is no run in {args.out / 'runs'}, so there is nothing to report.")


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
