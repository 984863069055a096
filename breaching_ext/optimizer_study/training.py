"""Training the members of a grid: stacked, or one after another with torch's own optimizers."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ..modes import evaluating
from .logbook import LogBook
from .optimizer import BaseOptimizer
from .rules import StepScalars, UpdateRule, step_scalars
from .stacked import (
    StepFunction,
    compiled_step,
    evaluate,
    flushed_denormals,
    make_step,
    member_norm,
    stack_members,
)
from .task import Cell, Moment, TrainingTask
from .torch_optim import torch_optimizer
from .training_log import TrainingLog

Progress = Callable[[int], Any]


class StackedRun:
    """Members that train at once.

    Args:
        task: What they share.
        cells: The multipliers (lr, wd) of each.
        compiled: Whether the step is compiled.
    """

    def __init__(self, task: TrainingTask, cells: Sequence[Cell], compiled: bool = False) -> None:
        """Stack the initial weights."""
        self.task, config = task, task.variant.config
        self.rule = UpdateRule(config)
        self.params = stack_members(task.model, len(cells))
        self.states = {name: self.rule.init_state(p) for name, p in self.params.items()}
        like = next(iter(self.params.values()))
        self.lr, self.weight_decay = (
            like.new_tensor([base * cell[axis] for cell in cells])
            for axis, base in enumerate((config.lr, config.weight_decay))
        )
        build = compiled_step if compiled else _plain_step
        self.function: StepFunction = build(task.model, self.rule, self.params, task.log_steps)

    def scalars(self, moment: Moment) -> StepScalars:
        """The numbers of a step, for all members."""
        return step_scalars(self.task.variant.config, self.lr, self.weight_decay, *moment)

    def step(self, batch: Tensor, moment: Moment) -> tuple[Tensor, Tensor]:
        """Advance all members by one step and return losses (M,) and gradient norms (M,)."""
        out = self.function(self.params, self.states, batch, self.scalars(moment))
        self.params, self.states = out.params, out.states
        return out.losses, out.grad_norms

    def rates(self, moment: Moment) -> Tensor:
        """Scheduled learning rates (M,)."""
        return self.scalars(moment).lr

    def reconstruct(self, images: Tensor) -> Tensor:
        """Reconstructions (M, n, …)."""
        forward = vmap(lambda p, x: functional_call(self.task.model, p, (x,)), in_dims=(0, None))
        with torch.no_grad(), evaluating(self.task.model):
            return forward(self.params, images)

    def test_losses(self) -> Tensor:
        """Test loss (M,)."""
        with evaluating(self.task.model):
            return evaluate(self.task.model, self.params, self.task.test, self.task.budget.batch_size)


class SequentialRun:
    """One member, as an ordinary model with an ordinary optimizer: torch's fused one where the definitions
    agree.

    Args:
        task: What the members share.
        cells: One pair of multipliers (lr, wd).
    """

    def __init__(self, task: TrainingTask, cells: Sequence[Cell]) -> None:
        """Copy the model."""
        (cell,) = cells
        self.task, config = task, task.variant.config
        self.model = copy.deepcopy(task.model)
        self.leaves = [p for p in self.model.parameters() if p.requires_grad]
        self.lr, self.weight_decay = config.lr * cell[0], config.weight_decay * cell[1]
        self.optimizer: torch.optim.Optimizer = torch_optimizer(config, self.leaves) or BaseOptimizer(
            self.leaves, config, task.schedule, task.budget
        )

    @property
    def params(self) -> dict[str, Tensor]:
        """The parameters as a stack of one, each (1, …)."""
        return {name: p.detach().unsqueeze(0) for name, p in self.model.named_parameters()}

    def rates(self, moment: Moment) -> Tensor:
        """Scheduled learning rate (1,)."""
        lr = self.leaves[0].detach().new_tensor([self.lr])
        return step_scalars(self.task.variant.config, lr, lr, *moment).lr

    def step(self, batch: Tensor, moment: Moment) -> tuple[Tensor, Tensor]:
        """Advance by one step; return loss (1,) and gradient norm (1,), the latter empty unless steps are
        logged."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.mse_loss(self.model(batch), batch)
        loss.backward()
        norms = loss.new_empty(0)
        if self.task.log_steps:
            norms = member_norm({str(i): p.grad[None] for i, p in enumerate(self.leaves) if p.grad is not None})
        self._set_rates(moment)
        self.optimizer.step()
        return loss.detach().view(1), norms

    def _set_rates(self, moment: Moment) -> None:
        """Hand this step's rates to the optimizer."""
        group = self.optimizer.param_groups[0]
        if isinstance(self.optimizer, BaseOptimizer):
            self.optimizer.set_rates(moment.eta, moment.decay_scale)
            group["lr"], group["weight_decay"] = self.lr, self.weight_decay
            return
        decay = self.weight_decay * moment.decay_scale
        group["lr"] = self.lr * moment.eta
        # torch's AdamW removes lr·λ; dividing by the unscheduled rate leaves the paper's η·λ.
        group["weight_decay"] = decay / self.lr if self.task.variant.config.decay == "schedule" else decay

    def reconstruct(self, images: Tensor) -> Tensor:
        """Reconstructions (1, n, …)."""
        with torch.no_grad(), evaluating(self.model):
            return self.model(images).unsqueeze(0)

    def test_losses(self) -> Tensor:
        """Test loss (1,)."""
        test = self.task.test
        with torch.no_grad(), evaluating(self.model):
            parts = [F.mse_loss(self.model(x), x) * len(x) for x in test.split(self.task.budget.batch_size)]
        return torch.stack(parts).sum().view(1) / len(test)


def _plain_step(model: nn.Module, rule: UpdateRule, params: dict[str, Tensor], track: bool) -> StepFunction:
    """`make_step` with the arguments of `compiled_step`."""
    return make_step(model, rule, track)


def train(
    run: StackedRun | SequentialRun,
    members: int,
    progress: Progress | None = None,
    started: float | None = None,
) -> list[TrainingLog]:
    """Train all members of a run to the end.

    Args:
        run: The members.
        members: How many.
        progress: Called with the number of member-steps done, after every step.
        started: `time.perf_counter` from which the runtime counts; default: now.

    Returns:
        One log a member.
    """
    task = run.task
    book = LogBook(members, task.log_steps, time.perf_counter() if started is None else started)
    with flushed_denormals():
        for epoch in range(task.schedule.epochs):
            for index, batch in enumerate(task.batches(epoch)):
                moment = task.moment(epoch, index)
                if task.log_steps:
                    book.before_step(member_norm(run.params), run.rates(moment))
                book.after_step(*run.step(batch, moment), len(batch))
                if progress is not None:
                    progress(members)
            book.after_epoch(run.test_losses())
            if epoch + 1 in task.sample_epochs:
                book.keep_samples(epoch + 1, run.reconstruct(task.test[: task.n_samples]))
    return book.logs()
