"""The log of one training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

NAN = math.nan
_SERIES = ("epoch_seconds", "step_losses", "step_grad_norms", "step_weight_norms", "step_lrs")


@dataclass
class TrainingLog:
    """Everything recorded while one member trained.

    A member whose training or test loss became non-finite has diverged: its losses are NaN from that epoch
    on.

    Attributes:
        epoch_train_losses: Mean batch loss of each epoch.
        epoch_test_losses: Test loss after each epoch.
        epoch_seconds: Wall time of each epoch (training and test); members of a stack share it equally. Result files
            hold it only where they hold steps or samples.
        runtime_seconds: Sum of the same, with start-up and compilation shared equally.
        step_losses: Batch loss of every step (optional).
        step_grad_norms: Gradient norm of every step, before weight decay (optional).
        step_weight_norms: Norm of all parameters before every step (optional).
        step_lrs: Scheduled learning rate (ρ_t for Adafactor) of every step (optional).
        samples: Reconstructions (n, …) of the first test images by epoch (optional).
    """

    epoch_train_losses: list[float] = field(default_factory=list)
    epoch_test_losses: list[float] = field(default_factory=list)
    epoch_seconds: list[float] = field(default_factory=list)
    runtime_seconds: float = 0.0
    step_losses: list[float] = field(default_factory=list)
    step_grad_norms: list[float] = field(default_factory=list)
    step_weight_norms: list[float] = field(default_factory=list)
    step_lrs: list[float] = field(default_factory=list)
    samples: dict[int, np.ndarray] = field(default_factory=dict)

    @property
    def diverged_epoch(self) -> int | None:
        """First epoch (from 1 on) with a non-finite loss, or None."""
        pairs = zip(self.epoch_train_losses, self.epoch_test_losses, strict=True)
        bad = (epoch for epoch, pair in enumerate(pairs, start=1) if not all(map(math.isfinite, pair)))
        return next(bad, None)

    @property
    def best_epoch(self) -> int | None:
        """Epoch (from 1 on) with the lowest test loss, or None if none was finite."""
        finite = [(loss, epoch) for epoch, loss in enumerate(self.epoch_test_losses, 1) if math.isfinite(loss)]
        return min(finite)[1] if finite else None

    @property
    def best_test_loss(self) -> float:
        """Lowest finite test loss, or NaN."""
        return NAN if self.best_epoch is None else self.epoch_test_losses[self.best_epoch - 1]

    @property
    def final_train_loss(self) -> float:
        """Training loss of the last epoch; NaN if the member diverged."""
        return self.epoch_train_losses[-1] if self.epoch_train_losses else NAN

    @property
    def final_test_loss(self) -> float:
        """Test loss after the last epoch; NaN if the member diverged."""
        return self.epoch_test_losses[-1] if self.epoch_test_losses else NAN


def pack_extras(logs: Iterable[TrainingLog]) -> dict[str, np.ndarray]:
    """The optional parts of some logs by key ``<log>/<name>``; empty if none of them has any."""
    logs = list(logs)
    if not any(log.step_losses or log.samples for log in logs):
        return {}
    arrays: dict[str, np.ndarray] = {}
    for index, log in enumerate(logs):
        for name in _SERIES:
            arrays[f"{index}/{name}"] = np.asarray(getattr(log, name))
        for epoch, images in log.samples.items():
            arrays[f"{index}/samples/{epoch}"] = images
    return arrays


def restore_extras(logs: Sequence[TrainingLog], path: Path) -> None:
    """Put what `pack_extras` took from some logs back into them, from an ``.npz`` file."""
    with np.load(path) as arrays:
        for key in arrays.files:
            index, name, *epoch = key.split("/")
            if epoch:
                logs[int(index)].samples[int(epoch[0])] = arrays[key]
            else:
                setattr(logs[int(index)], name, arrays[key].tolist())
