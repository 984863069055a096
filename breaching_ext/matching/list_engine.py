"""Candidates stepped one after another, each with its own optimizer: works with everything Breaching has."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from .engine import ClosureFactory, OptimizerFactory, StepResult
from .randomness import CandidateStreams
from .state import optimizer_state, restore_optimizer


class ListEngine:
    """The slow, obvious engine, and the reference for the others.

    Args:
        starts: start values, each (N, ...).
        make_closure: Breaching's closure for one candidate; it returns the objective and leaves the task loss in
            `task_loss(...)`.
        make_optimizer: optimizer and schedule for one candidate.
        task_loss: returns the task loss of the closure called last.
        streams: random streams, if a step draws random numbers.
    """

    name = "list"

    def __init__(
        self,
        starts: list[torch.Tensor],
        make_closure: ClosureFactory,
        make_optimizer: OptimizerFactory,
        task_loss: Callable[[], torch.Tensor],
        streams: CandidateStreams | None = None,
    ) -> None:
        self._make_closure, self._task_loss, self._streams = make_closure, task_loss, streams
        self._candidates = [[_leaf(start[i]) for start in starts] for i in range(len(starts[0]))]
        self._optimizers = [make_optimizer(candidate) for candidate in self._candidates]
        self._last = torch.full((2, len(self._candidates)), float("nan"), dtype=starts[0].dtype)
        self.gradient_evaluations = 0

    @property
    def parameters(self) -> list[torch.Tensor]:
        """See `CandidateEngine`."""
        return [torch.stack([p.detach() for p in group]) for group in zip(*self._candidates, strict=True)]

    def step(self, iteration: int, alive: torch.Tensor) -> StepResult:
        """See `CandidateEngine`."""
        values, task_losses = self._last.clone()
        for index in alive.nonzero().flatten().tolist():
            optimizer, scheduler = self._optimizers[index]
            with self._streams.use(index) if self._streams else contextlib.nullcontext():
                closure = self._counted(self._make_closure(self._candidates[index], optimizer, iteration))
                values[index] = optimizer.step(closure).detach()
            task_losses[index] = self._task_loss().detach()
            scheduler.step()
        self._last = torch.stack([values, task_losses])
        return StepResult(values.to(alive.device), task_losses.to(alive.device))

    def overwrite(self, parameters: list[torch.Tensor], where: torch.Tensor | None = None) -> None:
        """See `CandidateEngine`."""
        chosen = range(len(self._candidates)) if where is None else where.nonzero().flatten().tolist()
        for index in chosen:
            for parameter, value in zip(self._candidates[index], parameters, strict=True):
                parameter.data.copy_(value[index])

    def state(self) -> dict[str, Any]:
        """See `CandidateEngine`."""
        return {
            "parameters": self.parameters,
            "optimizers": [optimizer_state(optimizer) for optimizer, _ in self._optimizers],
            "streams": list(self._streams.states) if self._streams else [],
            "last": self._last,
            "gradient_evaluations": self.gradient_evaluations,
        }

    def restore(self, state: dict[str, Any], steps: int) -> None:
        """See `CandidateEngine`."""
        self.overwrite(state["parameters"])
        for (optimizer, scheduler), saved in zip(self._optimizers, state["optimizers"], strict=True):
            restore_optimizer(optimizer, scheduler, saved, steps)
        if self._streams:
            self._streams.states = list(state["streams"])
        self._last, self.gradient_evaluations = state["last"], state["gradient_evaluations"]

    def _counted(self, closure: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        def counted() -> torch.Tensor:
            self.gradient_evaluations += 1
            return closure()

        return counted


def _leaf(value: torch.Tensor) -> torch.Tensor:
    leaf = value.detach().clone().requires_grad_()
    leaf.grad = torch.zeros_like(leaf)
    return leaf
