"""The ladder: from the full gradient down to what K local steps of an adapter give away, cell by cell.

A finished cell is on disk before the next one begins, so that a stopped ladder goes on where it stopped.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..environment import describe_device, versions
from ..errors import ConfigError
from ..files import only_here, write_atomically, write_json
from ..intervals import mean_interval, plus_minus
from ..tensor_files import read_tensors
from .adapters import require_peft
from .case import Case
from .cells import run_cell
from .settings import RANKLESS, Cell, Settings, plan

log = logging.getLogger(__name__)

__all__ = ["IMAGES", "Ladder", "label", "run_ladder"]

#: file of the pictures beside rows.json
IMAGES = "images.pt"


@dataclass
class Ladder:
    """The rows of a ladder and their file.

    Attributes:
        path: rows.json.
        settings: what the rows depend on.
        rows: one dict a finished cell.
        images: cell as text -> reconstruction (B, C, H, W) as bytes, of the seed that came first, for the picture.
        about: versions and device of the first cell; a row that was made with others carries its own.
    """

    path: Path
    settings: Settings
    rows: list[dict[str, Any]]
    images: dict[str, torch.Tensor]
    about: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: str | Path, settings: Settings) -> Ladder:
        """Read what is there of this ladder.

        Raises:
            ConfigError: when the rows in the folder were made with other settings.
        """
        path = Path(folder) / "rows.json"
        if not path.exists():
            return cls(path, settings, [], {})
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not {"settings", "rows"} <= set(content):
            raise ConfigError(f"out={folder} holds a rows.json of another program; take another folder.")
        wanted = json.loads(json.dumps(settings.fingerprint()))
        differing = sorted(key for key in wanted if content["settings"].get(key) != wanted[key])
        if any(row["model"] != settings.model for row in content["rows"]):
            differing.append("model")
        if differing:
            raise ConfigError(
                f"out={folder} holds cells made with another {', '.join(differing)}; take another folder."
            )
        pictures = path.with_name(IMAGES)
        return cls(
            path,
            settings,
            content["rows"],
            read_tensors(pictures, "out", "a ladder's pictures") if pictures.exists() else {},
            {key: content[key] for key in ("versions", "device") if key in content},
        )

    def missing(self) -> list[Cell]:
        """Return the cells that are still to be run, in order."""
        done = {_key(row) for row in self.rows}
        return [cell for cell in plan(self.settings) if _key(asdict(cell)) not in done]

    @property
    def lost_images(self) -> bool:
        """Whether rows are there without their images: a picture of the others would lack them."""
        of_one_seed = [row for row in self.rows if row["seed"] == self.rows[0]["seed"]]
        return any(label(row) not in self.images for row in of_one_seed)

    def add(self, row: dict[str, Any], images: torch.Tensor, device: torch.device) -> None:
        """Append a row and write the file; images (B, C, H, W) in [0, 1] are kept for the seed that came first."""
        if row["seed"] == (self.rows or [row])[0]["seed"]:
            self.images[label(row)] = (255 * images).round().byte()
            write_atomically(self.path.with_name(IMAGES), lambda target: torch.save(self.images, target))
        here = {"versions": versions(), "device": describe_device(device)}
        self.about = self.about or here
        self.rows.append({**row, **{key: value for key, value in here.items() if value != self.about.get(key)}})
        write_json(self.path, {"settings": self.settings.fingerprint(), **self.about, "rows": self.rows})


def run_ladder(settings: Settings, folder: str | Path, device: torch.device | None = None) -> Ladder:
    """Run the cells that are missing, and say before the first adapter whether the ceiling holds.

    Args:
        settings: checked settings.
        folder: where rows.json is or will be.
        device: where the attacks run; None is the CPU. Observations and decoding are small and in double precision on
            the CPU.

    Returns:
        The ladder; after Ctrl-C with the cells that were finished.

    Raises:
        MissingPeftError: when a cell needs peft and it is not installed, before the first cell.
        ConfigError: when another process works on the ladder in this folder, or it holds cells of other settings.
    """
    with only_here(folder):
        return _run_ladder(settings, folder, device or torch.device("cpu"))


def _run_ladder(settings: Settings, folder: str | Path, where: torch.device) -> Ladder:
    ladder = Ladder.open(folder, settings)
    if any((cell.phase, cell.method) not in RANKLESS for cell in ladder.missing()):
        require_peft()
    cases = functools.lru_cache(maxsize=None)(
        lambda seed: Case(settings.model, settings.layers, seed, settings.batch, settings.public)
    )
    said = False
    try:
        for cell in tqdm(ladder.missing(), desc=f"LoRA ladder, {settings.model}", unit="cell", disable=None):
            if cell.phase > 0 and not said:
                _say_ceiling(ladder)
                said = True
            ladder.add(*run_cell(cell, cases(cell.seed), settings, where), where)
    except KeyboardInterrupt:
        log.warning("Interrupted: %d cells are missing; the same command goes on with them.", len(ladder.missing()))
    return ladder


def label(row: Mapping[str, Any]) -> str:
    """Return a cell's name within its model and seed, for example "1 match zero 4"."""
    return " ".join(str(row[name]) for name in ("phase", "method", "start", "rank"))


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("model", "phase", "method", "rank", "start", "seed"))


def _say_ceiling(ladder: Ladder) -> None:
    values = [row["psnr"] for row in ladder.rows if row["phase"] == 0 and row["model"] == ladder.settings.model]
    if not values:
        return
    if mean_interval(values)[0] < ladder.settings.ceiling:
        log.warning(
            "Phase 0 fails on %s: the full gradient gives %s dB, below ceiling=%g. What the later phases lose is not "
            "the adapter's doing.", ladder.settings.model, plus_minus(values), ladder.settings.ceiling,
        )  # fmt: skip
    else:
        log.info("Phase 0 on %s: %s dB.", ladder.settings.model, plus_minus(values))
