"""What a study leaves behind: one cell of a grid, and the grid of one variant."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ConfigError, first_line
from .storage import from_json_floats, read_json, to_json_floats, write_json, write_npz
from .training_log import TrainingLog, pack_extras, restore_extras

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass
class GridSearchResult:
    """One cell of a grid.

    Attributes:
        lr_multiplier: Factor on the base learning rate.
        wd_multiplier: Factor on the base weight decay.
        learning_rate: Base learning rate times multiplier.
        weight_decay: Base λ (or λ_norm) times multiplier.
        log: The training.
    """

    lr_multiplier: float
    wd_multiplier: float
    learning_rate: float
    weight_decay: float
    log: TrainingLog

    @property
    def cell(self) -> tuple[float, float]:
        """The two multipliers."""
        return self.lr_multiplier, self.wd_multiplier

    def to_dict(self) -> dict[str, Any]:
        """The cell in the layout of the result files; non-finite numbers become null."""
        log = self.log
        values = {
            "lr_multiplier": self.lr_multiplier,
            "wd_multiplier": self.wd_multiplier,
            "learning_rate": self.learning_rate,
            "weight_decay": self.weight_decay,
            "final_train_loss": log.final_train_loss,
            "final_test_loss": log.final_test_loss,
            "best_test_loss": log.best_test_loss,
            "best_epoch": log.best_epoch,
            "epoch_train_losses": log.epoch_train_losses,
            "epoch_test_losses": log.epoch_test_losses,
            "runtime_seconds": log.runtime_seconds,
        }
        return {key: to_json_floats(value) for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GridSearchResult:
        """Read what `to_dict` wrote."""
        log = TrainingLog(
            epoch_train_losses=from_json_floats(values["epoch_train_losses"]),
            epoch_test_losses=from_json_floats(values["epoch_test_losses"]),
            runtime_seconds=values["runtime_seconds"],
        )
        return cls(
            lr_multiplier=values["lr_multiplier"],
            wd_multiplier=values["wd_multiplier"],
            learning_rate=values["learning_rate"],
            weight_decay=values["weight_decay"],
            log=log,
        )


@dataclass
class OptimizerExperiment:
    """The grid of one variant.

    Attributes:
        optimizer_id: A1 … D3.
        optimizer_name: Readable name.
        config: Settings, schedule, protocol, seed, versions and device of the run, and which cells diverged.
        results: The cells.
    """

    optimizer_id: str
    optimizer_name: str
    config: dict[str, Any]
    results: list[GridSearchResult]

    @property
    def lr_multipliers(self) -> list[float]:
        """Learning-rate multipliers, ascending."""
        return sorted({result.lr_multiplier for result in self.results})

    @property
    def wd_multipliers(self) -> list[float]:
        """Weight-decay multipliers, ascending."""
        return sorted({result.wd_multiplier for result in self.results})

    @property
    def diverged(self) -> list[dict[str, float]]:
        """The cells that diverged, with the epoch."""
        return [
            {
                "lr_multiplier": r.lr_multiplier,
                "wd_multiplier": r.wd_multiplier,
                "epoch": r.log.diverged_epoch,
            }
            for r in self.results
            if r.log.diverged_epoch is not None
        ]

    def get_heatmap_data(self, value: str = "final_test_loss") -> tuple[np.ndarray, list[float], list[float]]:
        """A quantity over the grid.

        Args:
            value: A number of `TrainingLog`, such as ``final_test_loss`` or ``best_test_loss``.

        Returns:
            The quantity (n_lr, n_wd), NaN where a cell diverged or is missing, and the multipliers of both
            axes.
        """
        lrs, wds = self.lr_multipliers, self.wd_multipliers
        data = np.full((len(lrs), len(wds)), np.nan)
        for result in self.results:
            number = getattr(result.log, value)
            place = lrs.index(result.lr_multiplier), wds.index(result.wd_multiplier)
            data[place] = number if number is not None and math.isfinite(number) else np.nan
        return data, lrs, wds

    def plot_heatmap(self, ax: Axes | None = None, title: str | None = None) -> Axes:
        """Draw the final test loss over the grid, the ten best cells circled; see `figures.draw_heatmap`."""
        from .figures import draw_heatmap

        return draw_heatmap(self, ax, title)

    def to_dict(self) -> dict[str, Any]:
        """The experiment in the layout of the result files."""
        return {
            "optimizer_id": self.optimizer_id,
            "optimizer_name": self.optimizer_name,
            "config": {**self.config, "diverged": self.diverged},
            "results": [result.to_dict() for result in self.results],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> OptimizerExperiment:
        """Read what `to_dict` wrote."""
        config = {key: value for key, value in values["config"].items() if key != "diverged"}
        results = [GridSearchResult.from_dict(result) for result in values["results"]]
        return cls(values["optimizer_id"], values["optimizer_name"], config, results)

    def save(self, path: str | Path) -> Path:
        """Write the experiment as JSON, atomically, and optional per-step logs and samples beside it as
        ``.npz``."""
        extras = pack_extras(result.log for result in self.results)
        if extras:
            write_npz(_beside(path), extras)
        elif Path(path).exists():  # of the experiment that was there, they would be read with this one
            _beside(path).unlink(missing_ok=True)
        return write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> OptimizerExperiment:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is not a saved experiment.
        """
        with _named(path):
            experiment = cls.from_dict(read_json(path))
        extras = _beside(path)
        if extras.exists():
            restore_extras([result.log for result in experiment.results], extras)
        return experiment


def saved_config(path: str | Path) -> dict[str, Any]:
    """The config of a saved experiment.

    Raises:
        ConfigError: If the file is not a saved experiment.
    """
    with _named(path):
        return dict(read_json(path)["config"])


@contextmanager
def _named(path: str | Path) -> Iterator[None]:
    """Say which file it is that does not hold what is read from it."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is not a saved experiment ({first_line(error)}); remove it.") from error


def _beside(path: str | Path) -> Path:
    """Where per-step logs and samples of an experiment are; two experiments have two, whatever dots are in a name."""
    path = Path(path)
    return path.with_name((path.stem if path.suffix == ".json" else path.name) + ".npz")
