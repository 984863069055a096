"""What the weights of a small trained network reveal of its training images, with controls and ablations.

Fashion-MNIST, one output, labels ±1 dealt out at random within each balanced draw of ten images (unless an arm says
otherwise). Every seed is another draw of images and another start of the network; the KKT loss alone chooses among the
restarts. The images of these seeds (users 0 to 4) were not looked at when the defaults were chosen; users 100 to 103
were.

    python examples/kkt_study.py --list                     # the runs, in the order in which they are made
    python examples/kkt_study.py                            # all that are missing, then the report
    python examples/kkt_study.py --only default,untrained   # some arms
    python examples/kkt_study.py --report                   # table and figures from the runs that are there

A run that is there is not made again, so that a stopped study goes on where it stopped. Trained weights are kept under
--cache, because several arms attack the same networks.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import logging
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import breaching
import torch
from kkt_report import write_report
from tqdm import tqdm

from breaching_ext.attacks import KKTAttacker
from breaching_ext.data import BinaryFashionMNIST
from breaching_ext.environment import describe_device, versions
from breaching_ext.evaluation.figures import save_captioned
from breaching_ext.files import write_json
from breaching_ext.kkt import HomogeneousNetwork, Recipe, build_network, nearest, release, train_or_load
from breaching_ext.kkt.nearest import Nearest
from breaching_ext.kkt.recipe import initialise
from breaching_ext.kkt.span import singular_values_in_span
from breaching_ext.registration import register

log = logging.getLogger("kkt_study")
SEEDS = 5
TUNED_ON = 100  # the first user whose images were looked at when the defaults were chosen
#: images of the dataset that a user owns
OWNED = 60


@dataclass(frozen=True)
class Arm:
    """One victim and one attack; `attack` overrides config/attack/kkt.yaml, `recipe` the case's training."""

    text: str
    n: int = 10
    model: str = "kkt-mlp-300"
    labels: str = "permuted"
    recipe: Recipe = field(default_factory=lambda: Recipe(first_layer_std=1e-3))
    untrained: bool = False
    attack: tuple[str, ...] = ()
    seeds: int = SEEDS


START = Recipe(first_layer_std=1e-3)
DEFAULT = Arm("shipped default")
ARMS: dict[str, Arm] = {
    "default": DEFAULT,
    "untrained": replace(DEFAULT, text="control: untrained network", untrained=True, attack=("extraction.span=10",)),
    "relu": replace(DEFAULT, text="plain ReLU", attack=("extraction.steepness=null", "extraction.slack=0")),
    "no-slack": replace(DEFAULT, text="smooth ReLU without slacks", attack=("extraction.slack=0",)),
    "no-box": replace(DEFAULT, text="no pixel range", attack=("extraction.box_weight=0",)),
    "one-n": replace(DEFAULT, text="n candidates, not 2n", attack=("extraction.multiple=1",)),
    "decay": replace(DEFAULT, text="weight decay 0.01", recipe=replace(START, weight_decay=0.01, max_steps=20_000)),
    "start-1e-4": replace(DEFAULT, text="first layer from 1e-4", recipe=replace(START, first_layer_std=1e-4)),
    "parity": replace(DEFAULT, text="true labels (even against odd classes)", labels="parity"),
    "n20": replace(DEFAULT, text="20 images", n=20),
    "lambda-slow": replace(DEFAULT, text="λ rate / 4", attack=("extraction.lr_lambda=0.0005",)),
    "lambda-fast": replace(DEFAULT, text="λ rate × 5", attack=("extraction.lr_lambda=0.01",)),
    "n20-wide": replace(DEFAULT, text="20 images, 784-1000-1", n=20, model="kkt-mlp-1000"),
    "wide": replace(DEFAULT, text="784-1000-1", model="kkt-mlp-1000"),
    "paper": replace(
        DEFAULT,
        text="as the paper: all pixels, no slacks, SGD",
        attack=(
            *("extraction.span=full", "extraction.slack=0", "extraction.box_weight=0", "optim.optimizer=sgd"),
            *("extraction.lr=1.0", "extraction.lr_lambda=0.02", "extraction.init_scale=0.01"),
        ),
    ),
    "full-span": replace(DEFAULT, text="all pixels instead of the span", attack=("extraction.span=full",)),
    "deep": replace(DEFAULT, text="784-300-300-1", model="kkt-mlp-300-300", seeds=3),
    "conv": replace(
        DEFAULT,
        text="small convolution",
        model="kkt-conv-8-8",
        recipe=replace(START, first_layer_std=0.01, lr=0.02, max_steps=3000),
        attack=("optim.max_iterations=600",),
        seeds=3,
    ),
}


# ---------------------------------------------------------------------- one run


def images_of(arm: Arm, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return training images (n, 1, 28, 28), labels ±1 (n,), as many test images, and the mean image."""
    data, other = BinaryFashionMNIST(labels=arm.labels), BinaryFashionMNIST(training=False, labels=arm.labels)
    own = range(seed * OWNED, seed * OWNED + arm.n)
    images = torch.stack([data[i][0] for i in own])
    labels = torch.tensor([2.0 * data[i][1] - 1 for i in own])
    return images, labels, torch.stack([other[i][0] for i in own]), data.mean_image()


def recipe_of(arm: Arm, seed: int) -> Recipe:
    """Return how the network is trained, or drawn: an untrained first layer of 1e-3 is nothing beside the head."""
    recipe = replace(arm.recipe, seed=seed)
    return replace(recipe, first_layer_std=0.05) if arm.untrained else recipe


def victim(arm: Arm, seed: int, cache: Path) -> tuple[HomogeneousNetwork, dict[str, Any]]:
    """Return the trained network and how its training went, from the cache where it is there."""
    images, labels, _, mean = images_of(arm, seed)
    model = build_network(arm.model, (1, 28, 28))
    model.mean.copy_(mean)
    recipe = recipe_of(arm, seed)
    if arm.untrained:
        initialise(model, recipe)
        return model, {}
    key = hashlib.sha256(repr((arm.n, arm.model, arm.labels, recipe)).encode()).hexdigest()[:16]
    return model, train_or_load(model, images, labels, recipe, cache / f"{key}.pt").as_dict()


def attack_config(arm: Arm, seed: int) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        return breaching.get_attack_config("kkt", overrides=[f"restarts.seed={1000 * seed}", *arm.attack])


def first_layer(model: HomogeneousNetwork) -> torch.Tensor | None:
    """Return the first layer's weights over all pixels, (units, pixels); a convolution's are over a patch: None."""
    weight = next(model.parameters()).detach()
    return weight if weight.ndim == 2 else None


def singular_pool(model: HomogeneousNetwork, weight: torch.Tensor, count: int) -> torch.Tensor:
    """The control that needs no attack: right singular vectors of the first layer with either sign, as images."""
    _, _, right = torch.linalg.svd(weight, full_matrices=False)
    vectors = right[:count].reshape(-1, *model.shape)
    return torch.cat([vectors, -vectors]) + model.mean


def make(name: str, seed: int, out: Path, cache: Path) -> None:
    """Make one run and write its JSON file (and a picture of every seed of the default)."""
    arm = ARMS[name]
    images, labels, unseen, mean = images_of(arm, seed)
    model, training = victim(arm, seed, cache)
    cfg = attack_config(arm, seed)
    clock = time.perf_counter()
    found, stats = KKTAttacker(model, None, cfg).reconstruct(*release(model, arm.n))
    if stats["interrupted"]:  # its best so far would stand among the finished runs, and not be made again
        raise KeyboardInterrupt
    seconds = time.perf_counter() - clock
    scores = nearest(found["pool"], images, mean)
    with torch.no_grad():
        margins = labels * model(images)[:, 0]
    weight, controls, values = first_layer(model), None, None
    if weight is not None:
        controls = nearest(singular_pool(model, weight, len(found["pool"])), images, mean).as_dict()
        values = singular_values_in_span(weight, (images - mean).flatten(1)).tolist()
    record = {
        "arm": name, "text": arm.text, "seed": seed, "n": arm.n, "model": arm.model, "labels": arm.labels,
        "recipe": asdict(recipe_of(arm, seed)), "attack_overrides": arm.attack, "training": training,
        "kkt_loss": stats["kkt_loss"], "kkt_loss_absolute": stats["kkt_loss_absolute"], "rank": stats["rank"],
        "restart_losses": found["candidate_scores"].tolist(), "multipliers": found["multipliers"].tolist(),
        "training_images": scores.as_dict(), "unseen_images": nearest(found["pool"], unseen, mean).as_dict(),
        "singular_vectors": controls,
        "margins": margins.tolist(),
        "singular_values_in_span": values,
        "attack_seconds": seconds, "device": describe_device(torch.device("cpu")), "versions": versions(),
    }  # fmt: skip
    write_json(run_file(out, name, seed), record)
    if name in ("default", "n20") and seed == 0:
        picture(out / f"{name}_seed{seed}.png", images, scores, margins, arm.text)
    log.info(
        "%s seed %d: KKT loss %.4f, NCC > 0.8: %.2f",
        name,
        seed,
        stats["kkt_loss"],
        float((scores.ncc > 0.8).double().mean()),
    )


def picture(path: Path, images: torch.Tensor, scores: Nearest, margins: torch.Tensor, title: str) -> None:
    """Draw each training image above its nearest candidate, smallest margin first."""
    order = margins.argsort()
    captions = [f"{scores.ncc[i]:.2f} / {scores.ssim[i]:.2f}" for i in order]
    save_captioned(
        path,
        images[order],
        scores.images[order].float(),
        captions,
        f"{title}: images by margin, NCC / SSIM of the nearest candidate",
        "nearest",
    )


def run_file(out: Path, name: str, seed: int) -> Path:
    return out / "runs" / f"{name}_seed{seed}.json"


# ---------------------------------------------------------------------- the report


def read(out: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the runs that are there, by arm."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name in ARMS:
        files = [run_file(out, name, seed) for seed in range(TUNED_ON)]
        rows = [json.loads(file.read_text()) for file in files if file.exists()]
        if rows:
            found[name] = rows
    return found


def report(out: Path) -> None:
    """Write table and figures of the runs that are there, and print the table."""
    print(write_report(read(out), out))


def main() -> None:
    """Make what is missing, then the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kkt")
    parser.add_argument("--cache", type=Path, default=Path("outputs") / "kkt_networks", help="trained weights")
    parser.add_argument("--only", default="", help="comma-separated arms")
    parser.add_argument(
        "--seeds", type=int, help=f"number of seeds of every arm, at most {TUNED_ON} (default: its own)"
    )
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    chosen = args.only.split(",") if args.only else list(ARMS)
    unknown = set(chosen) - set(ARMS)
    if unknown:
        parser.error(f"unknown arms {sorted(unknown)}; valid: {', '.join(ARMS)}")
    if args.seeds is not None and not 1 <= args.seeds <= TUNED_ON:
        parser.error(f"--seeds={args.seeds} is not possible; valid: 1 to {TUNED_ON}")
    jobs = [(name, seed) for name in chosen for seed in range(args.seeds or ARMS[name].seeds)]
    missing = [job for job in jobs if not run_file(args.out, *job).exists()]
    if args.list:
        print("\n".join(f"{name} seed {seed}{'' if (name, seed) in missing else ' (done)'}" for name, seed in jobs))
        return
    register()
    for name, seed in tqdm([] if args.report else missing, desc="runs", disable=None):
        make(name, seed, args.out, args.cache)
    report(args.out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
