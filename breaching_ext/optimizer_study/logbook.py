"""Collects what happens to M members while they train, and hands out one log for each."""

from __future__ import annotations

import math
import time

import numpy as np
import torch
from torch import Tensor

from .training_log import TrainingLog


class LogBook:
    """Running record of M members.

    Numbers stay on the device until an epoch ends, so that logging does not stall an accelerator.

    Args:
        members: M.
        log_steps: Whether single steps are kept.
        started: `time.perf_counter` from which the runtime counts.
    """

    def __init__(self, members: int, log_steps: bool, started: float) -> None:
        """Start empty."""
        self.members, self.log_steps, self.started = members, log_steps, started
        self._epoch_started = time.perf_counter()
        self._sum: Tensor | None = None
        self._points = 0
        self._train: list[np.ndarray] = []
        self._test: list[np.ndarray] = []
        self._seconds: list[float] = []
        self._steps: dict[str, list[Tensor]] = {name: [] for name in ("losses", "grad_norms", "weight_norms", "lrs")}
        self._samples: dict[int, np.ndarray] = {}

    def before_step(self, weight_norms: Tensor, lrs: Tensor) -> None:
        """Keep the state that a step starts from, both (M,)."""
        self._steps["weight_norms"].append(weight_norms)
        self._steps["lrs"].append(lrs)

    def after_step(self, losses: Tensor, grad_norms: Tensor, points: int) -> None:
        """Add the batch losses (M,) of ``points`` images, and the gradient norms where steps are kept."""
        weighted = losses.detach() * points
        self._sum = weighted if self._sum is None else self._sum + weighted
        self._points += points
        if self.log_steps:
            self._steps["losses"].append(losses.detach())
            self._steps["grad_norms"].append(grad_norms)

    def after_epoch(self, test_losses: Tensor) -> None:
        """Close an epoch with its test losses (M,)."""
        assert self._sum is not None  # an epoch has at least one step
        self._train.append((self._sum / self._points).double().cpu().numpy())
        self._test.append(test_losses.double().cpu().numpy())
        self._sum, self._points = None, 0
        now = time.perf_counter()
        self._seconds.append((now - self._epoch_started) / self.members)
        self._epoch_started = now

    def keep_samples(self, epoch: int, images: Tensor) -> None:
        """Keep reconstructions (M, n, …) after an epoch."""
        self._samples[epoch] = images.float().cpu().numpy()

    def logs(self) -> list[TrainingLog]:
        """One log a member; the losses of a diverged one are NaN from the epoch of its divergence on."""
        runtime = (time.perf_counter() - self.started) / self.members
        train, test = np.stack(self._train), np.stack(self._test)  # (epochs, M)
        bad = np.logical_or.accumulate(~(np.isfinite(train) & np.isfinite(test)), axis=0)
        train, test = np.where(bad, math.nan, train), np.where(bad, math.nan, test)
        steps = {n: torch.stack(v, 1).double().cpu().tolist() for n, v in self._steps.items() if v}
        return [
            TrainingLog(
                epoch_train_losses=train[:, member].tolist(),
                epoch_test_losses=test[:, member].tolist(),
                epoch_seconds=list(self._seconds),
                runtime_seconds=runtime,
                samples={epoch: images[member] for epoch, images in self._samples.items()},
                **{f"step_{name}": values[member] for name, values in steps.items()},
            )
            for member in range(self.members)
        ]
