"""The whole study: variants × seeds, one file each, resumable, and the merging of the files into a sheet and
a table."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from .config import require, require_choice
from .data import load_fashion_mnist
from .figures import save_sheet
from .grid import LR_MULTIPLIERS, WD_MULTIPLIERS, run_grid
from .models import create_model
from .records import OptimizerExperiment
from .schedules import SCHEDULES
from .storage import read_json
from .summary import merge_seeds, write_tables
from .variants import VARIANTS, get_variant

log = logging.getLogger(__name__)

RESULTS = "results"
BEYOND = "beyond"


@dataclass(frozen=True)
class Protocol:
    """What all variants and seeds of a study share.

    Attributes:
        model: A name of `models.MODELS`.
        model_options: Its arguments.
        train_size: Training images; None for all.
        test_size: Test images; None for all.
        pool: Side of the average pooling.
        epochs: Length of a run.
        batch_size: Images a batch.
        lr_multipliers: Learning-rate axis.
        wd_multipliers: Weight-decay axis.
        beyond: More weight decays, trained after the grid of a variant with normalized decay and used for its
            coupling number alone: normalized decay is so small that a grid may end before it does harm.
        data_folder: Where Fashion-MNIST lies; None to look for it.
        device: Device to train on.
        executor: ``auto``, ``stacked`` or ``sequential``.
        compile: True, False or ``auto``.
        chunk: Members in a stack; None for as many as memory allows.
        schedule: Another schedule than the variants' own.
        schedule_options: Its arguments, by schedule name.
        settings: Other settings than the variants' own.
    """

    model: str = "mlp"
    model_options: dict[str, Any] = field(default_factory=dict)
    train_size: int | None = 1024
    test_size: int | None = 512
    pool: int = 2
    epochs: int = 100
    batch_size: int = 64
    lr_multipliers: Sequence[float] = LR_MULTIPLIERS
    wd_multipliers: Sequence[float] = WD_MULTIPLIERS
    beyond: Sequence[float] = field(default_factory=list)
    data_folder: str | None = None
    device: str = "cpu"
    executor: str = "auto"
    compile: object = "auto"
    chunk: int | None = None
    schedule: str | None = None
    schedule_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def select_variants(choice: str | Sequence[str]) -> list[str]:
    """Ids from ``all``, one id, or a list of ids.

    Raises:
        ValueError: If an id is unknown or none is given.
    """
    if choice == "all":
        return list(VARIANTS)
    ids = [choice] if isinstance(choice, str) else list(choice)
    require(bool(ids), "variant", ids, "all, or ids such as B3")
    return [get_variant(variant_id).id for variant_id in ids]


def result_path(folder: str | Path, variant_id: str, seed: int, beyond: bool = False) -> Path:
    """The file of one variant and seed: its grid, or what was trained beyond it."""
    return Path(folder) / RESULTS / (BEYOND if beyond else "") / f"{variant_id}_seed{seed}.json"


def run_study(
    folder: str | Path,
    variants: Sequence[str],
    seeds: Sequence[int],
    protocol: Protocol | None = None,
    progress: bool = True,
) -> list[Path]:
    """Run what is missing of variants × seeds, each into a file of its own under ``folder``/results.

    A file that exists is kept if it was made with the same settings, so a killed study continues where it
    was; what is lost is the chunk in progress.

    Args:
        folder: Where the study lives.
        variants: Ids.
        seeds: Seeds of initial weights and order of batches.
        protocol: What they share; default: the reduced protocol.
        progress: Whether to show bars.

    Returns:
        The result files.

    Raises:
        ValueError: If an argument is not valid, or a file of other settings is in the way.
        FileNotFoundError: If Fashion-MNIST is not at hand.
    """
    protocol = protocol or Protocol()
    ids = select_variants(variants)
    require(bool(seeds), "seed", list(seeds), "at least one whole number")
    last = max(protocol.wd_multipliers, default=0)
    require(all(wd > last for wd in protocol.beyond), "beyond", list(protocol.beyond), f"multipliers above {last:g}")
    known = {name.name for variant in VARIANTS.values() for name in fields(variant.config)}
    for key in protocol.settings:  # each variant takes those that it has, so none may be one that no variant has
        require(key in known, "settings", key, "a setting of a variant: " + ", ".join(sorted(known)))
    for key in protocol.schedule_options:
        require_choice("schedule_options", key, SCHEDULES)
    train, test = (
        images.to(protocol.device)
        for images in load_fashion_mnist(protocol.data_folder, protocol.train_size, protocol.test_size, protocol.pool)
    )
    # One module for all seeds, so that compiled steps serve them all.
    model = create_model(protocol.model, train.shape[-1], seeds[0], **protocol.model_options).to(protocol.device)
    paths = []
    for seed in seeds:
        model.load_state_dict(
            create_model(protocol.model, train.shape[-1], seed, **protocol.model_options).state_dict()
        )
        for i in ids:
            path = result_path(folder, i, seed)
            paths.append(_run_one(path, i, seed, model, train, test, protocol, progress))
            if protocol.beyond and VARIANTS[i].config.normalized_decay:
                path, wider = (
                    result_path(folder, i, seed, beyond=True),
                    replace(protocol, wd_multipliers=protocol.beyond),
                )
                _run_one(path, i, seed, model, train, test, wider, progress)
    return paths


def _run_one(
    path: Path,
    variant_id: str,
    seed: int,
    model: torch.nn.Module,
    train: torch.Tensor,
    test: torch.Tensor,
    protocol: Protocol,
    progress: bool,
) -> Path:
    """Run one variant with one seed unless its file is there."""
    name = protocol.schedule or VARIANTS[variant_id].schedule
    arguments: dict[str, Any] = {
        "lr_multipliers": protocol.lr_multipliers,
        "wd_multipliers": protocol.wd_multipliers,
        "epochs": protocol.epochs,
        "batch_size": protocol.batch_size,
        "seed": seed,
        "schedule": protocol.schedule,
        "schedule_options": protocol.schedule_options.get(name),
        "settings": {k: v for k, v in protocol.settings.items() if hasattr(VARIANTS[variant_id].config, k)},
    }
    wanted = json.loads(json.dumps(run_grid_key(variant_id, protocol, arguments)))  # as it will be read: lists
    if path.exists():
        made_with = read_json(path)["config"].get("study")
        require(made_with == wanted, "out", str(path), "a folder without results of other settings")
        log.info("%s is there already.", path)
        return path
    partial = path.with_suffix(".partial")
    experiment = run_grid(
        variant_id,
        model,
        train,
        test,
        **arguments,
        executor=protocol.executor,
        compile=protocol.compile,
        chunk=protocol.chunk,
        checkpoint=partial,
        progress=progress,
    )
    experiment.config["study"] = wanted
    experiment.save(path)
    partial.unlink(missing_ok=True)
    return path


def run_grid_key(variant_id: str, protocol: Protocol, arguments: dict[str, Any]) -> dict[str, Any]:
    """What identifies a result within a study (JSON types): everything that decides its numbers."""
    chosen = ("model", "model_options", "train_size", "test_size", "pool", "device")
    rates = {key: [float(x) for x in arguments[key]] for key in ("lr_multipliers", "wd_multipliers")}
    return {"variant": variant_id} | {key: getattr(protocol, key) for key in chosen} | arguments | rates


def load_results(folders: Iterable[str | Path], beyond: bool = False) -> list[OptimizerExperiment]:
    """All grids below some folders, in the order of variants and seeds; the same file name counts once.

    Args:
        folders: Where to look.
        beyond: Load what was trained beyond the grids instead; there may be none.

    Raises:
        FileNotFoundError: If there is no grid.
        ValueError: If files of one name hold different studies.
    """
    folders = list(folders)
    found: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(Path(folder).rglob("*_seed*.json")):
            if (path.parent.name == BEYOND) == beyond and not path.name.startswith("."):  # being written, or left so
                _same_study(found.setdefault(path.name, path), path)
    if not found and not beyond:
        raise FileNotFoundError(f"no results (*_seed*.json) below {', '.join(map(str, folders))}.")
    experiments = [OptimizerExperiment.load(path) for path in found.values()]
    order = list(VARIANTS)
    return sorted(experiments, key=lambda e: (order.index(e.optimizer_id), e.config["seed"]))


def _same_study(first: Path, other: Path) -> None:
    """Refuse two files of one name that hold different studies: only one of them could count."""
    if first == other:
        return
    a, b = ({**read_json(path)["config"].get("study", {}), "device": None} for path in (first, other))
    require(a == b, "sources", str(other), f"folders without another study's {other.name} than {first}")


def merge_results(folders: Iterable[str | Path], out: str | Path) -> list[Path]:
    """Merge results, of one study or of many machines, into one sheet and one table.

    Args:
        folders: Where to look for results.
        out: Where ``heatmaps.png``, ``table.md`` and ``summary.json`` go.

    Returns:
        The three files.
    """
    folders = list(folders)
    experiments, beyond = load_results(folders), load_results(folders, beyond=True)
    by_variant: dict[str, list[OptimizerExperiment]] = {}
    for experiment in experiments:
        by_variant.setdefault(experiment.optimizer_id, []).append(experiment)
    merged = [merge_seeds(group) for group in by_variant.values()]
    sheet = save_sheet(merged, Path(out) / "heatmaps.png")
    return [sheet, *write_tables(by_variant, out, beyond)]
