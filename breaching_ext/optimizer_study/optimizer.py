"""The rules as an ordinary `torch.optim.Optimizer`: the grid's rule with one member."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .config import Budget, OptimizerConfig
from .rules import StepScalars, UpdateRule, step_scalars
from .schedules import Fixed, LRScheduler

log = logging.getLogger(__name__)


class BaseOptimizer(UpdateRule, torch.optim.Optimizer):
    """Any optimizer of the study, for one model.

    The hooks ``compute_first_moment``, ``compute_second_moment``, ``compute_update`` and
    ``weight_decay_step`` are those of `UpdateRule`; a subclass may override them. ``param_groups`` carry
    ``lr`` and ``weight_decay``. The schedule moves only with `set_epoch`, called before every step; torch's own
    schedulers change ``lr`` alone, so with ``decay="schedule"`` the decay does not follow them.

    Args:
        params: Parameters or parameter groups.
        config: Settings of the optimizer.
        schedule: Schedule that `set_epoch` consults; default: fixed.
        budget: Size of the run, for normalized decay.
        lr: Rate of groups that name none, also of those that `add_param_group` adds later; default: the config's.
        weight_decay: Their λ (or λ_norm), likewise.

    References:
        Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019.
        Shazeer & Stern, "Adafactor", ICML 2018.
    """

    def __init__(
        self,
        params: Iterable[Any],
        config: OptimizerConfig,
        schedule: LRScheduler | None = None,
        budget: Budget | None = None,
        *,
        lr: float | None = None,
        weight_decay: float | None = None,
    ) -> None:
        """Set up the parameter groups at epoch 0."""
        UpdateRule.__init__(self, config)
        self.budget = budget or Budget()
        self.schedule = schedule or Fixed(self.budget.epochs)
        rates = {
            "lr": config.lr if lr is None else lr,
            "weight_decay": config.weight_decay if weight_decay is None else weight_decay,
        }
        torch.optim.Optimizer.__init__(self, params, rates)
        self.set_epoch(0.0)
        self._moved = isinstance(self.schedule, Fixed)

    def set_epoch(self, epoch: float) -> None:
        """Move the schedule to ``epoch`` (fractional, from 0 on); call it before a step."""
        self._moved, self.epoch = True, epoch
        self.eta = self.schedule.factor(epoch)
        self.decay_scale = decay_scale(self.config, self.schedule, self.budget, epoch)

    def set_rates(self, eta: float, scale: float) -> None:
        """Take a step's factors of learning rate and decay from somebody else who follows the schedule."""
        self._moved, self.eta, self.decay_scale = True, eta, scale

    def __getstate__(self) -> dict[str, Any]:
        """Return everything for a copy or a pickle; torch's own keeps groups and state only."""
        own = ("config", "budget", "schedule", "epoch", "eta", "decay_scale", "_moved")
        return {**torch.optim.Optimizer.__getstate__(self), **{key: getattr(self, key) for key in own}}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Re-evaluates the model and returns the loss.

        Returns:
            The closure's loss, or None.
        """
        if not self._moved:
            self._moved = True
            name = type(self.schedule).__name__
            log.warning("The schedule %s stays at epoch 0: call set_epoch(epoch + batch / batches) before steps.", name)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._step_param(param, group)
        return loss

    def _step_param(self, param: Tensor, group: dict[str, Any]) -> None:
        """Advance one parameter, with a member axis of one."""
        record = self.state[param]
        if not record:
            record.update(step=0, **self.init_state(param.unsqueeze(0)))
        record["step"] += 1
        moments = {key: value for key, value in record.items() if key != "step"}
        scalars = self._scalars(param, group, record["step"])
        new, moments = self.apply(param.unsqueeze(0), param.grad.unsqueeze(0), moments, scalars)  # type: ignore[union-attr]
        param.copy_(new.squeeze(0))
        record.update(moments)

    def _scalars(self, param: Tensor, group: dict[str, Any], t: int) -> StepScalars:
        """The numbers of step ``t`` for one group."""
        lr, decay = (param.new_tensor([group[key]]) for key in ("lr", "weight_decay"))
        return step_scalars(self.config, lr, decay, t, self.eta, self.decay_scale)


def decay_scale(config: OptimizerConfig, schedule: LRScheduler, budget: Budget, epoch: float) -> float:
    """√(b/(B·T)) for normalized decay, with B training points and T epochs of the current period; else 1."""
    if not config.normalized_decay:
        return 1.0
    return math.sqrt(budget.batch_size / (budget.points * schedule.period(epoch)))
