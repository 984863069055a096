"""What every engine offers to the joint loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch


class StepResult(NamedTuple):
    """What a step found at the point where it started.

    Attributes:
        values: objective of every candidate, (N,).
        task_losses: their task losses, (N,).
        rankings: what a candidate's points are compared by, (N,), where the objective changes from step to step;
            None: the values.
        comparable: whether these compare with earlier steps' at all.
    """

    values: torch.Tensor
    task_losses: torch.Tensor
    rankings: torch.Tensor | None = None
    comparable: bool = True


class CandidateEngine(Protocol):
    """N candidates with their optimizers.

    A candidate is a list of tensors (its image batch first); `parameters` holds them with a leading candidate axis.
    """

    @property
    def name(self) -> str:
        """How the candidates are stepped: 'list', 'vmap' or 'compile'."""
        ...

    gradient_evaluations: int

    @property
    def parameters(self) -> list[torch.Tensor]:
        """Detached parameters, each (N, ...); the first one is the images (N, B, C, H, W)."""

    def step(self, iteration: int, alive: torch.Tensor) -> StepResult:
        """Take one optimizer step with every candidate that is alive; the others do not move."""

    def overwrite(self, parameters: list[torch.Tensor], where: torch.Tensor | None = None) -> None:
        """Put values, each (N, ...), into the candidates that the mask `where` (N,) selects (all by default)."""

    def state(self) -> dict[str, Any]:
        """Return everything that the next step depends on: parameters, optimizers, random streams.

        It is to be written before that step: large tensors are the engine's own.
        """

    def restore(self, state: dict[str, Any], steps: int) -> None:
        """Put a fresh engine where another one was after `steps` steps."""


#: (one candidate's parameters, their optimizer, iteration) -> closure that sets gradients and returns the objective
ClosureFactory = Callable[[list[torch.Tensor], torch.optim.Optimizer, int], Callable[[], torch.Tensor]]

#: parameters -> (optimizer, learning-rate schedule)
OptimizerFactory = Callable[[list[torch.Tensor]], tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]]

#: one candidate's parameters -> (objective, task loss), a pure function that torch.func can transform
CandidateObjective = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class GradientRule:
    """What Breaching does to a gradient before the optimizer sees it, per candidate (`optim` keys of a config).

    Attributes:
        max_iterations: total outer iterations, for the soft sign.
        langevin_noise: standard deviation of added Gaussian noise, in units of the current learning rate.
        grad_clip: largest Euclidean norm of one candidate's gradient, or None.
        signed: "hard" (sign), "soft" (tanh that hardens over the run) or None.
    """

    max_iterations: int
    langevin_noise: float = 0.0
    grad_clip: float | None = None
    signed: str | None = None

    @property
    def random(self) -> bool:
        """Whether the rule draws random numbers."""
        return self.langevin_noise > 0

    def __call__(self, gradient: torch.Tensor, noise: torch.Tensor | None, iteration: int, lr: float) -> torch.Tensor:
        """Return the gradient (N, ...) that the optimizer sees; `noise` is standard normal of the same shape."""
        if noise is not None:
            gradient = gradient + self.langevin_noise * lr * noise
        return self.shaped(gradient, self.softness(iteration))

    def softness(self, iteration: int) -> float:
        """Return the width of the soft sign, which hardens over the run."""
        return 1 - iteration / self.max_iterations

    def shaped(self, gradient: torch.Tensor, softness: float | torch.Tensor) -> torch.Tensor:
        """Return the gradient (N, ...) clipped and signed; pure."""
        if self.grad_clip is not None:
            norm = gradient.flatten(1).norm(dim=1)  # (N,)
            factor = torch.where(norm > self.grad_clip, self.grad_clip / (norm + 1e-6), torch.ones_like(norm))
            gradient = gradient * factor.view(-1, *[1] * (gradient.dim() - 1))
        if self.signed == "soft":
            gradient = (gradient * softness).tanh() / softness
        elif self.signed == "hard":
            gradient = gradient.sign()
        return gradient
