"""MAGIA on one batch, with a selectable schedule of subset sizes.

    python examples/main_magia_sel.py
    python examples/main_magia_sel.py --sel_mode linear_inc_l --sel_l_iter 50 --n_iter 150 --batch_size 16
    python examples/main_magia_sel.py --sel_mode sigmoid --sig_a -0.1 --sig_b 66 --optimizer adam
    python examples/main_magia_sel.py --dataset cifar100 --indices 25,40,3,11 --tv_weight 0.005
    python examples/main_magia_sel.py --sel_mode linear_warmup --l_iter 150 --n_iter 300   # as the published script's

DLG's LeNet (untrained) computes the gradient of the batch; images and labels are recovered from it together. Written
to --out: metrics.json (with the command, the git commit and every option), final.png, history.png (images ×
iterations), schedules.png (all seven), final.pt and checkpoints/. Ctrl-C ends the run early and keeps all of that.
The published script's names of schedules (constant, linear_warmup, linear_increase, linear_decrease) and options
(--sel_const, --l_iter, --a, --b) are taken, too; its fixed_list is not.
"""

from __future__ import annotations

import argparse
import math
import shlex
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from breaching.cases.models.model_preparation import LeNetZhu
from matplotlib.figure import Figure
from tqdm import tqdm

from breaching_ext.data import SamplePhotos
from breaching_ext.environment import versions
from breaching_ext.evaluation import evaluate, psnr, ssim, to_images
from breaching_ext.evaluation.figures import save_reconstruction
from breaching_ext.evaluation.schedules import save_schedules
from breaching_ext.files import write_atomically, write_json
from breaching_ext.matching.magia_engine import Annealing, MagiaEngine, OptimizerOptions, Schedule
from breaching_ext.matching.magia_optimizer import STEP_SIZES
from breaching_ext.matching.subset_matching import SubsetMatching, SubsetTerm, Target
from breaching_ext.regularizers.color_tv import color_total_variation
from breaching_ext.selection import MODES

#: The image prior falls to --tv_weight from this weight, as in config/attack/magia.yaml.
ANNEAL_FROM = 3.0
#: A pixel value counts as reconstructed within this distance (our guess: the paper's helper is not published).
CLOSE = 0.1


#: The published script's names of the same schedules.
PUBLISHED_MODES = {
    **dict.fromkeys(("constant", "manual", "fixed_value", "explicit"), "constk"),
    "linear_warmup": "linear_inc_l",
    "linear_increase": "linear_inc_total",
    "linear_decrease": "linear_dec_l",
}


#: Most columns and rows of history.png: a picture must not have more than 65,536 pixels a side.
COLUMNS, ROWS = 40, 600


def schedule_name(text: str) -> str:
    """One of the seven schedules, by our name or the published script's."""
    name = PUBLISHED_MODES.get(text, text)
    if name not in MODES:
        raise argparse.ArgumentTypeError(f"{text!r} is unknown; valid: {', '.join(MODES)}")
    return name


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """States defaults; of options without one, the help itself says what happens."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=Help)
    add = parser.add_argument
    modes = "schedule of subset sizes: " + ", ".join(MODES)
    add("--sel_mode", type=schedule_name, default="constk", metavar="MODE", help=modes)
    add(
        "--sel_k", "--sel_const", type=int, default=2, help="images in the subset (constk); clamped to 1 ... batch size"
    )
    add(
        "--sel_l_iter",
        "--l_iter",
        type=int,
        default=100,
        help="outer steps over which linear_inc_l and linear_dec_l run",
    )
    add("--sig_a", "--a", type=float, default=-0.1, help="slope of sigmoid per outer step; negative falls")
    add("--sig_b", "--b", type=float, default=200.0, help="outer step at which sigmoid stands at half the batch")
    add("--subset_term", default="released", choices=["none", "released", "mean", "residual"], help="subset term")
    add("--alpha", type=float, default=0.999, help="share of the full-batch term, 0 to 1")
    add("--rescaling", default="none", help="factor c: none, ratio, variance or a number")
    add("--n_iter", type=int, default=300, help="outer steps, each of 20 optimizer iterations")
    add("--batch_size", type=int, default=8, help="images in the batch (the number of --indices wins)")
    add(
        "--tv_weight",
        type=float,
        default=0.001,
        help=f"prior at the end, to which it falls from {ANNEAL_FROM}; 0: off",
    )
    add("--optimizer", default="l-bfgs", choices=["l-bfgs", "adam"], help="optimizer")
    searches = ["strong_wolfe", "none"]
    add("--line_search", default="strong_wolfe", choices=searches, help="of l-bfgs; without one many runs diverge")
    add("--step_size", type=float, help="step; default 1 for l-bfgs, 0.05 for adam")
    add("--seed", type=int, default=0, help="of the model, the start, the subsets and the choice of images")
    add("--indices", help="images of the data set, separated by commas; default: drawn with --seed")
    add("--dataset", default="sample_photos", choices=["sample_photos", "cifar100"], help="source of the images")
    add(
        "--labels",
        default="uniform",
        choices=["uniform", "photo"],
        help="of the sample photos: drawn from 100 classes, or the photo that a crop comes from (8 classes)",
    )
    add("--data_path", default="~/data", help="where cifar100 is, or is downloaded to")
    add("--double", action="store_true", help="float64 instead of float32")
    add("--checkpoint_every", type=int, default=10, help="outer steps between checkpoints and history columns")
    add("--out", type=Path, default=Path("outputs/magia_sel"), help="folder for the results")
    args = parser.parse_args()
    check(parser, args)
    return args


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End in one line for a value that cannot work."""
    for name, least in (("batch_size", 1), ("n_iter", 1), ("sel_l_iter", 1), ("checkpoint_every", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name}={getattr(args, name)} is out of range; valid: {least} or more")
    if not 0 <= args.alpha <= 1:
        parser.error(f"--alpha={args.alpha} is out of range; valid: 0 to 1")
    if not 0 <= args.tv_weight < math.inf:
        parser.error(f"--tv_weight={args.tv_weight} is out of range; valid: a number from 0")
    if args.step_size is not None and not 0 < args.step_size < math.inf:
        parser.error(f"--step_size={args.step_size} is out of range; valid: a number above 0")
    if not -(2**63) <= args.seed < 2**63:
        parser.error(f"--seed={args.seed} is out of range; valid: whole numbers of 64 bits")
    if any(place.exists() and not place.is_dir() for place in (args.out, *args.out.parents)):
        parser.error(f"--out={args.out} is not a folder, nor can it become one")


def load(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, list[int], int]:
    """Images (B, 3, 32, 32) in [0, 1], labels (B,), their indices, and the number of classes."""
    to_tensor = torchvision.transforms.ToTensor()
    if args.dataset == "sample_photos":
        options = {"labels": "uniform", "classes": 100} if args.labels == "uniform" else {}
        data: Any = SamplePhotos(transform=to_tensor, **options)
        classes = len(data.classes)
    else:
        try:
            data = torchvision.datasets.CIFAR100(Path(args.data_path).expanduser(), download=True, transform=to_tensor)
        except (OSError, RuntimeError) as error:
            sys.exit(f"cifar100 is not in {args.data_path} and cannot be downloaded ({error}).")
        classes = 100
    if args.indices:
        try:
            indices = [int(text) for text in args.indices.split(",")]
        except ValueError:
            sys.exit(f"--indices={args.indices} is not a list of numbers; valid: such as 25,40,3")
        if not all(0 <= index < len(data) for index in indices):
            sys.exit(f"--indices={args.indices} is out of range; valid: 0 to {len(data) - 1}")
    else:
        generator = torch.Generator().manual_seed(args.seed)
        indices = torch.randperm(len(data), generator=generator)[: args.batch_size].tolist()
        if args.batch_size > len(data):
            sys.exit(f"--batch_size={args.batch_size} is more than there are images; valid: 1 to {len(data)}")
    points = [data[i] for i in indices]
    return torch.stack([p[0] for p in points]), torch.tensor([p[1] for p in points]), indices, classes


def factor(text: str) -> str | float:
    """--rescaling: a number where it is one; names are checked by SubsetTerm."""
    try:
        return float(text)
    except ValueError:
        return text


def build(args: argparse.Namespace, images: torch.Tensor, labels: torch.Tensor, classes: int) -> MagiaEngine:
    """The engine for the gradient of these images."""
    dtype = torch.float64 if args.double else torch.float32
    torch.manual_seed(args.seed)
    model, loss_fn = LeNetZhu(num_classes=classes).to(dtype), torch.nn.CrossEntropyLoss()
    gradients = torch.autograd.grad(loss_fn(model(images.to(dtype)), labels), list(model.parameters()))
    target = Target(model, loss_fn, {k: p.detach() for k, p in model.named_parameters()}, gradients)
    start = [0.4 + 0.2 * torch.rand(1, *images.shape, dtype=dtype), torch.randn(1, len(labels), classes, dtype=dtype)]
    search = None if args.line_search == "none" else args.line_search
    step = STEP_SIZES[args.optimizer] if args.step_size is None else args.step_size
    return MagiaEngine(
        SubsetMatching(target, SubsetTerm(args.subset_term, args.alpha, factor(args.rescaling)), color_total_variation),
        start,
        seeds=[args.seed],
        iterations=args.n_iter,
        schedule=Schedule(args.sel_mode, args.sel_k, args.sel_l_iter, args.sig_a, args.sig_b),
        annealing=Annealing(args.tv_weight, max(ANNEAL_FROM, args.tv_weight) if args.tv_weight else None),
        options=OptimizerOptions(args.optimizer, step, line_search=search),
    )


class Optimised(NamedTuple):
    """What the loop leaves: pixels and label logits, snapshots (outer step, images (B, C, H, W)), losses, how it ended.

    After Ctrl-C the point is that of the last whole step, at full size.
    """

    parameters: list[torch.Tensor]
    history: list[tuple[int, torch.Tensor]]
    losses: list[float]
    interrupted: bool


def optimise(engine: MagiaEngine, args: argparse.Namespace) -> Optimised:
    """Run to the end or to Ctrl-C."""
    alive, history, losses = torch.ones(1, dtype=torch.bool), [], []
    for left in (args.out / "checkpoints").glob("step_*.pt"):
        left.unlink()  # of an earlier run in this folder, perhaps of other images
    finished = engine.parameters  # of the last whole step: within one, a line search stands at points that it tries
    try:
        with tqdm(range(args.n_iter), desc=f"magia {args.sel_mode}", unit="step", disable=None) as bar:
            for iteration in bar:
                losses.append(engine.step(iteration, alive).values.item())
                reached = engine.parameters
                if not all(bool(value.isfinite().all()) for value in (torch.tensor(losses[-1]), *reached)):
                    print(f"Not finite in outer step {iteration}: stopped at the end of the last finite one.")
                    break
                finished = reached
                bar.set_postfix_str(f"loss {losses[-1]:.4g}", refresh=False)
                if iteration % args.checkpoint_every == 0 or iteration == args.n_iter - 1:
                    history.append((iteration, finished[0][0]))
                    save_point(args.out / "checkpoints" / f"step_{iteration:05d}.pt", finished, iteration)
        interrupted = False
    except KeyboardInterrupt:
        print(f"Interrupted after {len(losses)} outer steps; keeping what there is.")
        interrupted = True
    return Optimised(finished, history or [(0, finished[0][0])], losses, interrupted)


def method(engine: MagiaEngine) -> dict[str, Any]:
    """What the engine runs, with what no option says: the prior's start, the grids, the history."""
    parts = {"subset": engine.matching.term, "schedule": engine.schedule, "image_prior": engine.annealing}
    parts |= {"optimizer": engine.options, "pyramid": engine.pyramid}
    dtype = str(engine.starts[0].dtype).removeprefix("torch.")
    return {**{name: asdict(part) for name, part in parts.items()}, "dtype": dtype}


def save_point(path: Path, parameters: list[torch.Tensor], iteration: int) -> None:
    pixels, logits = parameters
    content = {"iteration": iteration, "pixels": pixels[0], "label_logits": logits[0]}
    write_atomically(path, lambda target: torch.save(content, target))


def reference_metrics(reconstructed: torch.Tensor, true: torch.Tensor, order: list[int]) -> dict[str, Any]:
    """The reference script's metrics; `order[i]` is the reconstruction compared with true image `i`."""
    matched = reconstructed[order]
    mse = (matched - true).square().flatten(1).mean(dim=1)
    per_image = {
        "mse": mse,
        "rmse": mse.sqrt(),
        "psnr": psnr(matched, true),
        "ssim": ssim(matched, true),
        "reconstruction_rate": ((matched - true).abs() < CLOSE).double().flatten(1).mean(dim=1),
    }
    overall = {k: {"mean": v.mean().item(), "std": v.std(unbiased=False).item()} for k, v in per_image.items()}
    return {"overall": overall, "per_image": {k: v.tolist() for k, v in per_image.items()}, "order": order}


def best_match(reconstructed: torch.Tensor, true: torch.Tensor) -> dict[str, Any]:
    """As the reference script: each reconstruction against the true image of the highest SSIM (repeats allowed)."""
    table = torch.stack([ssim(reconstructed, t.expand_as(reconstructed)) for t in true])  # (true, reconstructed)
    nearest = table.argmax(dim=0)
    metrics = reference_metrics(reconstructed, true[nearest], list(range(len(reconstructed))))
    return {**metrics, "order": nearest.tolist()}


def save_history(path: Path, history: list[tuple[int, torch.Tensor]], order: list[int]) -> None:
    """One row an image, one column a checkpoint; of many, the first ROWS and COLUMNS spread evenly, with the last."""
    order, step = order[:ROWS], -(-len(history) // COLUMNS)
    history = history[::-1][::step][::-1]
    figure = Figure(figsize=(0.9 * len(history) + 0.3, 0.9 * len(order) + 0.4), layout="constrained")
    axes = figure.subplots(len(order), len(history), squeeze=False)
    for column, (iteration, pixels) in enumerate(history):
        axes[0][column].set_title(f"{iteration}", fontsize=7)
        for row, index in enumerate(order):
            axes[row][column].imshow(pixels[index].permute(1, 2, 0).float().clamp(0, 1).numpy())
            axes[row][column].set_axis_off()
    write_atomically(path, lambda target: figure.savefig(target, dpi=110))


def git_commit() -> str | None:
    try:
        where = Path(__file__).resolve().parent
        done = subprocess.run(["git", "-C", where, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def main() -> None:
    args = parse()
    torch.set_num_threads(1)  # at these sizes a second thread costs more than it gives
    images, labels, indices, classes = load(args)
    try:
        engine = build(args, images, labels, classes)
    except ValueError as error:
        sys.exit(str(error))
    if args.sel_mode == "constk" and not 1 <= args.sel_k <= len(images):
        print(f"--sel_k={args.sel_k} is outside 1 ... {len(images)}: clamped.")
    clock = time.perf_counter()
    found = optimise(engine, args)
    seconds = time.perf_counter() - clock
    pixels, logits = found.parameters
    reconstructed, true = to_images(pixels[0]), to_images(images)
    scores = evaluate(reconstructed, true, logits[0].argmax(dim=-1), labels)
    order = scores.order.tolist()
    record = {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "git_commit": git_commit(),
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "method": method(engine),
        "indices": indices,
        "labels": {"true": labels.tolist(), "recovered": logits[0].argmax(dim=-1)[scores.order].tolist()},
        "one_to_one": reference_metrics(reconstructed, true, order),
        "best_match": best_match(reconstructed, true),
        **scores.as_dict(),
        "losses": found.losses,
        "interrupted": found.interrupted,
        "gradient_evaluations": engine.gradient_evaluations,
        "full_gradients": engine.full_gradients,
        "seconds": seconds,
        "versions": versions(),
    }
    write_json(args.out / "metrics.json", record)
    save_point(args.out / "final.pt", found.parameters, len(found.losses) - 1)
    save_reconstruction(args.out / "final.png", true, reconstructed[scores.order], scores.per_image["psnr"])
    save_history(args.out / "history.png", found.history, order)
    options = (args.sel_k, args.sel_l_iter, args.sig_a, args.sig_b, args.sel_mode)
    save_schedules(args.out / "schedules.png", len(images), args.n_iter, *options)
    report(record, args.out)


def report(record: dict[str, Any], out: Path) -> None:
    for name in ("one_to_one", "best_match"):
        print(name.replace("_", "-"))
        for metric, value in record[name]["overall"].items():
            print(f"  {metric:20} {value['mean']:9.4f} ± {value['std']:.4f}")
    print(f"labels right: {100 * record['label_acc']:.0f} %, {record['seconds']:.1f} s; saved to {out}")


if __name__ == "__main__":
    main()
