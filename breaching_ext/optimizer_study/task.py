"""What the members of a grid share while they train: model, images, batches, schedule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .config import Budget
from .optimizer import decay_scale
from .schedules import LRScheduler
from .variants import Variant

Cell = tuple[float, float]
"""The multipliers (lr, wd) of a member."""


class Moment(NamedTuple):
    """Where a run is: step (from 1 on), schedule factor and normalized-decay scale."""

    t: int
    eta: float
    decay_scale: float


@dataclass(frozen=True)
class TrainingTask:
    """All that the members of a grid share.

    Attributes:
        variant: Rule and base rates.
        schedule: Schedule, which also says how many epochs to run.
        budget: Number of training points, batch size, epochs.
        model: Skeleton and initial weights of every member.
        train: Training inputs (n, …) on the model's device.
        test: Test inputs (n, …) on the same device.
        seed: Seed of the order of the batches.
        log_steps: Whether to record every step.
        sample_epochs: Epochs (from 1 on) after which reconstructions are kept.
        n_samples: How many.
    """

    variant: Variant
    schedule: LRScheduler
    budget: Budget
    model: nn.Module
    train: Tensor
    test: Tensor
    seed: int = 42
    log_steps: bool = False
    sample_epochs: Sequence[int] = field(default_factory=tuple)
    n_samples: int = 8

    @property
    def steps(self) -> int:
        """Optimizer steps of one member."""
        return self.schedule.epochs * self.budget.steps_per_epoch

    def batches(self, epoch: int) -> Iterator[Tensor]:
        """The batches of an epoch, in an order that depends on seed and epoch alone: members see the same
        ones."""
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * epoch)
        order = torch.randperm(len(self.train), generator=generator).to(self.train.device)
        return (self.train[index] for index in order.split(self.budget.batch_size))

    def moment(self, epoch: int, batch: int) -> Moment:
        """Step number, η and decay scale at a batch of an epoch (both from 0 on)."""
        per_epoch = self.budget.steps_per_epoch
        at = epoch + batch / per_epoch
        scale = decay_scale(self.variant.config, self.schedule, self.budget, at)
        return Moment(epoch * per_epoch + batch + 1, self.schedule.factor(at), scale)
