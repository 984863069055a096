"""Steps MAGIA candidates: subset schedule, annealed image prior, and one optimizer state a candidate."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from ..selection import subset_size
from .engine import StepResult
from .lbfgs import BatchedLBFGS
from .subset_matching import SubsetMatching

__all__ = ["Annealing", "MagiaEngine", "OptimizerOptions", "Schedule"]


@dataclass(frozen=True)
class Schedule:
    """How many images a subset has, and how often it is drawn (see `breaching_ext.selection`).

    Attributes:
        mode, k, l_iter, a, b: as in `subset_size`.
        redraw: 'step' (once an outer step) or 'closure' (at every evaluation; makes L-BFGS's curvature noisy).

    Raises:
        ValueError: for an unknown mode or redraw, or l_iter < 1.
    """

    mode: str = "constk"
    k: int = 2
    l_iter: int = 100
    a: float = -0.1
    b: float = 200.0
    redraw: str = "step"

    def __post_init__(self) -> None:
        if self.redraw not in ("step", "closure"):
            raise ValueError(f"subset.redraw={self.redraw!r} is unknown; valid: step, closure.")
        subset_size(self.mode, 0, 1, 1, self.k, self.l_iter, self.a, self.b)

    def size(self, iteration: int, batch_size: int, n_iter: int) -> int:
        """S at an outer step."""
        return subset_size(self.mode, iteration, batch_size, n_iter, self.k, self.l_iter, self.a, self.b)


@dataclass(frozen=True)
class Annealing:
    """Weight of the image prior over the run: geometric from `first` to `last`, or constant.

    A strong prior at the start keeps the candidate smooth while the gradient settles which image has which label;
    it then fades so that detail is decided by the gradient.

    Attributes:
        last: weight at the end.
        first: weight at the start; None keeps `last` throughout.

    Raises:
        ValueError: for a negative weight, or a geometric run to or from 0.
    """

    last: float
    first: float | None = None

    def __post_init__(self) -> None:
        if self.last < 0 or (self.first is not None and (self.first <= 0 or self.last <= 0)):
            raise ValueError(f"prior weights first={self.first}, last={self.last}; valid: above 0 (last=0 alone: off).")

    def at(self, progress: float) -> float:
        """Weight at progress in [0, 1] through the run."""
        if self.first is None:
            return self.last
        return self.first * (self.last / self.first) ** min(max(progress, 0.0), 1.0)


@dataclass(frozen=True)
class OptimizerOptions:
    """Optimizer of the candidates.

    Attributes:
        name: 'l-bfgs' or 'adam'.
        step_size: L-BFGS's fixed step (1), or Adam's learning rate at the start (cosine decay over the run).
        inner_iterations: optimizer iterations an outer step.
        history_size: L-BFGS curvature pairs.
        line_search: None or 'strong_wolfe' (L-BFGS).

    Raises:
        ValueError: for an unknown optimizer.
    """

    name: str = "l-bfgs"
    step_size: float = 1.0
    inner_iterations: int = 20
    history_size: int = 100
    line_search: str | None = None

    def __post_init__(self) -> None:
        if self.name not in ("l-bfgs", "adam"):
            raise ValueError(f"optim.optimizer={self.name!r} is unknown; valid: l-bfgs, adam.")

    def build(self, parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
        """The optimizer over stacks (N, ...); both kinds keep the candidates apart."""
        if self.name == "adam":  # elementwise, so that a stack is N independent runs
            return torch.optim.Adam(parameters, lr=self.step_size)
        return BatchedLBFGS(
            parameters,
            lr=self.step_size,
            max_iter=self.inner_iterations,
            history_size=self.history_size,
            line_search_fn=self.line_search,
        )


@dataclass
class MagiaEngine:
    """N candidates, each a batch of pixels in [0, 1] and of label logits, with their optimizer.

    A `CandidateEngine`: an attack's loop and the study drive it alike.

    Attributes:
        matching: the objective.
        starts: pixels (N, B, C, H, W) and logits (N, B, K).
        seeds: one seed per candidate for its draws of subsets.
        iterations: outer steps of the whole run.
        schedule: subset sizes.
        annealing: weight of the image prior.
        options: the optimizer.
    """

    matching: SubsetMatching
    starts: list[torch.Tensor]
    seeds: list[int]
    iterations: int
    schedule: Schedule = field(default_factory=Schedule)
    annealing: Annealing = field(default_factory=lambda: Annealing(0.012, 0.6))
    options: OptimizerOptions = field(default_factory=OptimizerOptions)

    def __post_init__(self) -> None:
        if any(not bool(torch.isfinite(start).all()) for start in self.starts):
            raise ValueError("The start is not finite; every pixel and label logit must be a finite number.")
        self._stacks = [start.detach().clone().requires_grad_() for start in self.starts]
        self._optimizer = self.options.build(self._stacks)
        self._generators = [torch.Generator().manual_seed(seed % 2**63) for seed in self.seeds]
        self._alive = torch.ones(len(self.starts[0]), dtype=torch.bool)
        self._subsets: torch.Tensor | None = None
        self._prior_weight = 0.0
        self._adam_asked = 0
        self.name = self.matching.chosen_method(self.starts[0])
        self.gradient_evaluations = 0
        #: evaluations in units of a full-batch gradient (a subset counts S/B), summed over candidates
        self.full_gradients = 0.0

    @property
    def parameters(self) -> list[torch.Tensor]:
        return [stack.detach() for stack in self._stacks]

    @property
    def evaluation_cost(self) -> float:
        """Cost of the last evaluation of one candidate in full-batch gradients: 1, plus S/B for the subset."""
        return 1.0 + (0.0 if self._subsets is None else self._subsets.shape[1] / self.starts[0].shape[1])

    def step(self, iteration: int, alive: torch.Tensor, progress: float | None = None) -> StepResult:
        """One outer step.

        Args:
            iteration: counted from 0.
            alive: (N,) candidates to move.
            progress: share of the run that is over; default iteration / (iterations − 1).
        """
        done = iteration / max(self.iterations - 1, 1) if progress is None else progress
        self._alive = alive.cpu()
        self._prior_weight = self.annealing.at(done)
        self._draw(iteration)
        frozen = None if bool(alive.all()) else [stack.detach().clone() for stack in self._stacks]
        before = self._asked()
        values = self._run_optimizer(iteration, done)
        asked = self._asked() - before
        self.gradient_evaluations += asked
        self.full_gradients += asked * self.evaluation_cost
        if frozen is not None:
            self.overwrite(frozen, ~alive)
        return StepResult(values, torch.zeros_like(values))

    def overwrite(self, parameters: list[torch.Tensor], where: torch.Tensor | None = None) -> None:
        with torch.no_grad():
            for stack, value in zip(self._stacks, parameters, strict=True):
                if where is not None:
                    value = torch.where(where.view(-1, *[1] * (value.dim() - 1)), value, stack)
                stack.copy_(value)

    def _run_optimizer(self, iteration: int, done: float) -> torch.Tensor:
        """Values (N,) at the start of the step; NaN for candidates that failed in it."""

        def closure() -> torch.Tensor:
            if self.schedule.redraw == "closure":
                self._draw(iteration)
            pixels, logits = self._stacks
            values, pixels.grad, logits.grad = self.matching(pixels, logits, self._subsets, self._prior_weight)
            return values

        if isinstance(self._optimizer, BatchedLBFGS):
            values = self._optimizer.step(closure)
            failed = torch.tensor(self._optimizer.failed, device=values.device)
            return torch.where(failed, float("nan"), values)
        first: torch.Tensor | None = None
        for inner in range(self.options.inner_iterations):
            now = done + inner / self.options.inner_iterations / max(self.iterations, 1)
            lr = self.options.step_size * 0.5 * (1.0 + math.cos(math.pi * min(now, 1.0)))
            self._optimizer.param_groups[0]["lr"] = lr
            values = closure()
            self._optimizer.step()
            self._adam_asked += int(self._alive.sum())
            first = values if first is None else first
        assert first is not None
        return first

    def _asked(self) -> int:
        """Evaluations that live candidates have asked for so far."""
        if isinstance(self._optimizer, BatchedLBFGS):
            return sum(n for n, alive in zip(self._optimizer.func_evals, self._alive.tolist(), strict=True) if alive)
        return self._adam_asked

    def _draw(self, iteration: int) -> None:
        """Draw every candidate's subset from its own random stream."""
        if self.matching.term.kind == "none":
            return
        batch_size = self.starts[0].shape[1]
        size = self.schedule.size(iteration, batch_size, self.iterations)
        drawn = [torch.randperm(batch_size, generator=generator)[:size] for generator in self._generators]
        self._subsets = torch.stack(drawn).to(self.starts[0].device)  # (N, S)
