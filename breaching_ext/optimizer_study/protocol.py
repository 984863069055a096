"""What all runs of a study share, and what one of them is: its variant, its seed, its arguments, its file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import first_line
from ..values import is_number
from .config import Budget, require, require_choice
from .executor import check_choices
from .grid import LR_MULTIPLIERS, WD_MULTIPLIERS, check_cells, check_seed
from .models import model_options
from .records import saved_config
from .schedules import SCHEDULES
from .variants import VARIANTS, Variant, get_variant

RESULTS = "results"
BEYOND = "beyond"
#: What variants must have in common for their losses to compare.
COMPARED = ("model", "model_options", "train_size", "test_size", "pool", "epochs", "batch_size", "data_sha256")


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
        chunk: Most members in a stack; None for the fastest of 16, 36 and as many as memory allows.
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


#: What a configuration may say below `protocol`; the folder of the data stands by itself.
PROTOCOL_KEYS = tuple(one.name for one in fields(Protocol) if one.name != "data_folder")


@dataclass(frozen=True)
class Run:
    """One variant with one seed.

    Attributes:
        variant: The variant.
        seed: Seed of initial weights and order of batches.
        path: Its file.
        protocol: What it shares with the others; its weight decays are those beyond the grid if it trains these.
    """

    variant: Variant
    seed: int
    path: Path
    protocol: Protocol

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of `run_grid` that decide its numbers."""
        protocol, variant = self.protocol, self.variant
        return {
            "lr_multipliers": protocol.lr_multipliers,
            "wd_multipliers": protocol.wd_multipliers,
            "epochs": protocol.epochs,
            "batch_size": protocol.batch_size,
            "seed": self.seed,
            "schedule": protocol.schedule,
            "schedule_options": protocol.schedule_options.get(protocol.schedule or variant.schedule),
            "settings": {k: v for k, v in protocol.settings.items() if hasattr(variant.config, k)},
        }

    @property
    def key(self) -> dict[str, Any]:
        """What identifies it within a study: everything that decides its numbers, as it will be read from JSON."""
        chosen = ("model", "train_size", "test_size", "pool", "device")
        arguments = self.arguments
        rates = {key: [float(x) for x in arguments[key]] for key in ("lr_multipliers", "wd_multipliers")}
        shared = {key: getattr(self.protocol, key) for key in chosen}
        shared["model_options"] = model_options(self.protocol.model, self.protocol.model_options)
        return json.loads(json.dumps({"variant": self.variant.id} | shared | arguments | rates))

    def is_done(self) -> bool:
        """Whether its file is there.

        Raises:
            ValueError: If that file was made with other settings.
        """
        if not self.path.exists():
            return False
        same = saved_config(self.path).get("study") == self.key
        require(same, "out", str(self.path), "a folder without results of other settings")
        return True

    def check(self) -> None:
        """Make its settings and its schedule, and look at its file.

        Raises:
            ValueError: If one of them is not valid.
        """
        arguments = self.arguments
        check_cells(arguments["lr_multipliers"], arguments["wd_multipliers"])
        Budget(1, arguments["batch_size"], arguments["epochs"])
        self.variant.with_settings(**arguments["settings"])
        options = arguments["schedule_options"] or {}
        self.variant.create_schedule(arguments["epochs"], arguments["schedule"], **options)
        self.is_done()


def check_folder(folder: str | Path, run: Run) -> None:
    """Refuse a folder with results that could not be merged with those of a run.

    Raises:
        ValueError: If there is one, of whatever variant.
    """
    paths = (Path(folder) / RESULTS).glob("*_seed*.json")
    for path in sorted(path for path in paths if not path.name.startswith(".")):  # being written, or left so
        differ = differences(saved_config(path).get("study", run.key), run.key)
        require(not differ, "out", str(path), f"a folder without results of another {', '.join(differ)}")


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """In what two studies differ whose losses do not compare, if in anything."""
    return [key for key in COMPARED if one.get(key) != other.get(key)]


def planned(folder: str | Path, ids: Sequence[str], seeds: Sequence[int], protocol: Protocol) -> Iterator[Run]:
    """All runs of a study, seed by seed, each variant with its weight decays beyond the grid, if any.

    Raises:
        ValueError: If the seeds or what the protocol says of all variants are not valid.
    """
    _check_seeds(seeds)
    check_protocol(protocol)
    for seed in seeds:
        seed = int(seed)  # NumPy's are no JSON
        for variant in map(get_variant, ids):
            own = Run(variant, seed, result_path(folder, variant.id, seed), protocol)
            yield own
            if protocol.beyond and variant.with_settings(**own.arguments["settings"]).config.normalized_decay:
                wider = replace(protocol, wd_multipliers=protocol.beyond)
                yield Run(variant, seed, result_path(folder, variant.id, seed, beyond=True), wider)


def _check_seeds(seeds: Sequence[int]) -> None:
    require(len(seeds) > 0, "seed", list(seeds), "at least one whole number")
    for seed in seeds:
        check_seed(seed)
    require(len(set(seeds)) == len(seeds), "seed", list(seeds), "each seed once")


def check_protocol(protocol: Protocol) -> None:
    """Check what the protocol says of all variants.

    Raises:
        ValueError: If a value is not valid.
    """
    for key in ("lr_multipliers", "wd_multipliers", "beyond"):
        values = getattr(protocol, key)
        require(isinstance(values, (list, tuple)), f"protocol.{key}", values, "a list of multipliers, as [0,1,4]")
    check_cells(protocol.lr_multipliers, protocol.wd_multipliers)
    last, further = max(protocol.wd_multipliers), list(protocol.beyond)
    above = all(is_number(wd) and wd > last for wd in further)
    require(above, "beyond", further, f"multipliers above {last:g}")
    for key in ("model_options", "schedule_options", "settings"):
        require(isinstance(getattr(protocol, key), dict), key, getattr(protocol, key), "a mapping, such as {}")
    model_options(protocol.model, protocol.model_options)
    known = {name.name for variant in VARIANTS.values() for name in fields(variant.config)}
    for key in protocol.settings:  # each variant takes those that it has, so none may be one that no variant has
        require(key in known, "settings", key, "a setting of a variant: " + ", ".join(sorted(known)))
    for key, options in protocol.schedule_options.items():
        require_choice("schedule_options", key, SCHEDULES)
        require(isinstance(options, dict), f"schedule_options of {key}", options, "a mapping, such as {}")
    check_choices(protocol.executor, protocol.compile, protocol.chunk)
    _check_device(protocol.device)


def _check_device(name: object) -> None:
    """Refuse a device that torch does not know or have here."""
    try:
        found = isinstance(name, str) and torch.empty(0, device=name).numel() == 0
        reason = ""
    except (RuntimeError, AssertionError) as error:
        found, reason = False, f" that is here ({first_line(error)})"
    require(found, "device", name, f"a device of torch{reason}, such as cpu or cuda")


def select_variants(choice: str | Iterable[str]) -> list[str]:
    """Ids from ``all``, one id, or several.

    Raises:
        ValueError: If an id is unknown or twice there, or none is given.
    """
    if isinstance(choice, str) and choice == "all":
        return list(VARIANTS)
    ids = [choice] if isinstance(choice, str) else list(choice) if isinstance(choice, Iterable) else []
    require(len(ids) > 0, "variant", choice, "all, or ids such as B3")
    chosen = [get_variant(variant_id).id for variant_id in ids]
    require(len(set(chosen)) == len(chosen), "variant", chosen, "each id once")
    return chosen


def result_path(folder: str | Path, variant_id: str, seed: int, beyond: bool = False) -> Path:
    """The file of one variant and seed: its grid, or what was trained beyond it."""
    return Path(folder) / RESULTS / (BEYOND if beyond else "") / f"{variant_id}_seed{seed}.json"
