"""The whole stack of candidates evaluated at once with torch.func, and stepped by one optimizer."""

from __future__ import annotations

import logging
from typing import Any, cast

import torch

from .augmented import Augmentation, AugmentedImages
from .engine import CandidateObjective, GradientRule, OptimizerFactory, StepResult
from .evaluation import Specialise, StackedEvaluation
from .randomness import CandidateStreams
from .state import optimizer_state, restore_optimizer

log = logging.getLogger(__name__)


class VmapEngine:
    """N candidates as stacks (N, ...), one evaluation for all of them.

    The optimizer must keep candidates apart: an elementwise one (Adam, SGD and their variants) does by itself, L-BFGS
    in the form of `BatchedLBFGS`.

    Args:
        starts: start values, each (N, ...).
        objective: one candidate's parameters -> (objective, task loss); pure.
        make_optimizer: optimizer and schedule over the stacks.
        rule: what happens to each candidate's gradient before the optimizer sees it.
        streams: the candidates' random streams, for noise and augmentations.
        augmentation: random change of one candidate's images (B, C, H, W) before they are evaluated, or None.
        differentiable: whether the gradient flows through the augmentation; if not, it changes the candidate itself,
            as in Breaching.
        chunk, specialise, alone: see `StackedEvaluation`.
    """

    name = "vmap"

    def __init__(
        self,
        starts: list[torch.Tensor],
        objective: CandidateObjective,
        make_optimizer: OptimizerFactory,
        rule: GradientRule,
        streams: CandidateStreams,
        augmentation: Augmentation | None = None,
        differentiable: bool = False,
        chunk: int | None = None,
        specialise: Specialise | None = None,
        alone: bool = False,
    ) -> None:
        self._starts, self._make_optimizer = starts, make_optimizer
        self._rule, self._streams = rule, streams
        self._augmentation, self._differentiable = augmentation, differentiable
        self.evaluation = StackedEvaluation(objective, len(starts), chunk, specialise, alone)
        self._begin()

    def _begin(self) -> None:
        self._stacks = [start.detach().clone().requires_grad_() for start in self._starts]
        self._optimizer, self._scheduler = self._make_optimizer(self._stacks)
        self._task_losses = self._starts[0].new_zeros(len(self._starts[0]))
        self.gradient_evaluations = 0

    def rewind(self) -> None:
        """Go back to the starts, with a fresh optimizer; random streams stay where they are."""
        self._begin()

    @property
    def parameters(self) -> list[torch.Tensor]:
        """See `CandidateEngine`."""
        return [stack.detach() for stack in self._stacks]

    def evaluate(self) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        """Return gradients (each (N, ...)), objectives (N,) and task losses (N,) at the current candidates."""
        through = None
        if self._augmentation is not None and self._differentiable:
            through = AugmentedImages(self._augmentation, self._streams)
        elif self._augmentation is not None:
            self._augment_candidates(self._augmentation)
        gradients, values, task_losses = self.evaluation(*self.parameters, through=through)
        return list(gradients), values, task_losses

    def step(self, iteration: int, alive: torch.Tensor) -> StepResult:
        """See `CandidateEngine`."""
        frozen = None if bool(alive.all()) else [stack.detach().clone() for stack in self._stacks]
        failed = getattr(self._optimizer, "failed", None)  # L-BFGS: within an earlier step
        # torch's optimizers hand through whatever the closure returns; here one value per candidate
        values = cast(torch.Tensor, self._optimizer.step(lambda: cast(float, self._closure(iteration, alive))))
        self._scheduler.step()
        if frozen is not None:
            self.overwrite(frozen, ~alive)
        values = values.detach()
        if failed is not None and any(failed):
            values = torch.where(torch.tensor(failed, device=values.device), float("nan"), values)
        return StepResult(values, self._task_losses)

    def overwrite(self, parameters: list[torch.Tensor], where: torch.Tensor | None = None) -> None:
        """See `CandidateEngine`."""
        with torch.no_grad():
            for stack, value in zip(self._stacks, parameters, strict=True):
                if where is not None:
                    value = torch.where(where.view(-1, *[1] * (value.dim() - 1)), value, stack)
                stack.copy_(value)

    def state(self) -> dict[str, Any]:
        """See `CandidateEngine`."""
        return {
            "parameters": [p.clone() for p in self.parameters],
            "optimizer": optimizer_state(self._optimizer),
            "streams": list(self._streams.states),
            "gradient_evaluations": self.gradient_evaluations,
            "chunk": self.evaluation.chunk,
        }

    def restore(self, state: dict[str, Any], steps: int) -> None:
        """See `CandidateEngine`."""
        self.overwrite([p.to(s.device) for p, s in zip(state["parameters"], self._stacks, strict=True)])
        restore_optimizer(self._optimizer, self._scheduler, state["optimizer"], steps)
        self._streams.states = list(state["streams"])
        self.gradient_evaluations = state["gradient_evaluations"]
        self._take_chunk(state["chunk"])

    def _take_chunk(self, saved: int | None) -> None:
        """Go on in the chunks of the run before, whose size decides the rounding, unless only smaller ones fit now."""
        planned, count = self.evaluation.chunk, len(self._stacks[0])
        if (planned or count) >= (saved or count):
            self.evaluation.chunk = saved
            return
        log.warning(
            "Memory is for %d candidates at a time now, the checkpoint's run had %d: what follows agrees to rounding, "
            "not bit for bit.",
            *(planned, saved or count),
        )

    def _closure(self, iteration: int, alive: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            gradients, values, self._task_losses = self.evaluate()
        self.gradient_evaluations += int(alive.sum())
        lr = self._optimizer.param_groups[0]["lr"]
        for stack, gradient in zip(self._stacks, gradients, strict=True):
            stack.grad = self._rule(gradient, self._noise(stack.detach()), iteration, lr)
        return values

    def _noise(self, stack: torch.Tensor) -> torch.Tensor | None:
        """Draw each candidate's noise, in the candidate's memory layout, as Breaching does: numbers depend on it."""
        if not self._rule.random:
            return None
        noise = []
        for index in range(len(stack)):
            with self._streams.use(index):
                noise.append(torch.randn_like(stack[index]))
        return torch.stack(noise)

    def _augment_candidates(self, augmentation: Augmentation) -> None:
        """Replace each candidate's images by augmented ones, drawn from its own random stream."""
        for index, images in enumerate(self.parameters[0]):
            with self._streams.use(index):
                images.copy_(augmentation(images.clone()))
