"""Steps MAGIA candidates: subset schedule, annealed image prior, and one optimizer state a candidate."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from .engine import StepResult
from .lbfgs import BatchedLBFGS
from .magia_optimizer import OptimizerOptions
from .magia_schedules import Annealing, Schedule
from .pyramid import Pyramid, enlarge, shrink
from .randomness import CandidateStreams
from .state import optimizer_state
from .subset_matching import SubsetMatching

__all__ = ["Annealing", "MagiaEngine", "OptimizerOptions", "Pyramid", "Schedule"]


@dataclass
class MagiaEngine:
    """N candidates, each a batch of pixels in [0, 1] and of label logits, with their optimizer.

    A `CandidateEngine`: an attack's loop and the study drive it alike.

    Attributes:
        matching: the objective.
        starts: pixels (N, B, C, H, W) and logits (N, B, K).
        seeds: one seed per candidate for its draws of subsets, and of what its model draws (dropout that is on).
        iterations: outer steps of the whole run.
        schedule: subset sizes.
        annealing: weight of the image prior.
        options: the optimizer; L-BFGS starts afresh where the grid changes.
        pyramid: the grids on which pixels are optimised.
    """

    matching: SubsetMatching
    starts: list[torch.Tensor]
    seeds: list[int]
    iterations: int
    schedule: Schedule = field(default_factory=Schedule)
    annealing: Annealing = field(default_factory=lambda: Annealing(0.001, 3.0))
    options: OptimizerOptions = field(default_factory=OptimizerOptions)
    pyramid: Pyramid = field(default_factory=Pyramid)

    def __post_init__(self) -> None:
        if any(not bool(torch.isfinite(start).all()) for start in self.starts):
            raise ValueError("The start is not finite; every pixel and label logit must be a finite number.")
        self._size = self.starts[0].shape[-2:]
        self._units = self._units_of_targets()
        self._are_ones = bool((self._units == 1).all())  # as for most untrained models
        self._factor = 0
        self._adam_asked = self._asked_before = 0
        self._failed = torch.zeros(len(self.starts[0]), dtype=torch.bool, device=self.starts[0].device)
        self._on_grid(self.pyramid.factor(0.0), [start.detach() for start in self.starts])
        self._generators = [torch.Generator().manual_seed(seed % 2**63) for seed in self.seeds]
        self._streams = CandidateStreams(self.seeds, self.starts[0].device)
        self._alive = torch.ones(len(self.starts[0]), dtype=torch.bool)
        self._subsets: torch.Tensor | None = None
        self._prior_weight = math.inf
        self._rankings: torch.Tensor | None = None
        self.gradient_evaluations = 0
        #: evaluations in units of a full-batch gradient (a subset counts S/B), summed over candidates
        self.full_gradients = 0.0

    def _units_of_targets(self) -> torch.Tensor:
        """What optimizers see the objective in, (N,): ‖g*‖² where that is below 1, else 1.

        A trained model's gradient is small, and with it its distance; L-BFGS's test of curvature and Adam's ε are
        absolute.
        """
        norms = [self.matching.target.squared_norm(n) for n in range(len(self.starts[0]))]
        return self.starts[0].new_tensor([norm if 0 < norm < 1 else 1.0 for norm in norms])

    @property
    def name(self) -> str:
        """How the stack is evaluated: 'list', 'vmap' or 'compile'."""
        return self.matching.chosen_method(self.starts[0])

    @property
    def parameters(self) -> list[torch.Tensor]:
        """Pixels (N, B, C, H, W) and label logits (N, B, K), detached copies."""
        grid, logits = (stack.detach() for stack in self._stacks)
        return [enlarge(grid, self._size).clone(), logits * self.options.label_scale]

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
        comparable = self._next_objective(iteration, done)
        if self.pyramid.factor(done) != self._factor:
            self._on_grid(self.pyramid.factor(done), self.parameters)
        frozen = None if bool(alive.all()) else [stack.detach().clone() for stack in self._stacks]
        before = self._asked()
        self._rankings = None
        # the learning rate is 0 at the end of the run, not before its last step
        values = self._run_optimizer(iteration, iteration / self.iterations if progress is None else progress)
        asked = self._asked() - before
        self.gradient_evaluations += asked
        self.full_gradients += asked * self.evaluation_cost
        if frozen is not None:
            self._put(frozen, ~alive)
        assert self._rankings is not None
        return StepResult(values, torch.zeros_like(values), self._rankings, comparable)

    def rankings(self) -> torch.Tensor:
        """‖G − g*‖² + tv · TV (and the group's term) of every candidate as it is, (N,), with the last step's tv.

        Unlike the objective it depends neither on the subset that was drawn nor on its size.
        """
        self._rankings = None
        self._evaluate()
        self.gradient_evaluations += len(self._alive)
        self.full_gradients += len(self._alive) * self.evaluation_cost
        assert self._rankings is not None
        return self._rankings

    def overwrite(self, parameters: list[torch.Tensor], where: torch.Tensor | None = None) -> None:
        """Put pixels and logits, each (N, ...), into the candidates `where` (N,); on a coarse grid, their averages."""
        pixels, logits = parameters
        self._put([shrink(pixels, self._factor), logits / self.options.label_scale], where)

    def project(self, box: tuple[torch.Tensor, torch.Tensor], where: torch.Tensor | None = None) -> None:
        """Move the candidates `where` (N,) towards the box: on a coarse grid by the averages of what pixels lack.

        Replaced by averages of the clipped pixels, a grid would be blurred, whether anything is outside the box or not.
        """
        grid, logits = (stack.detach() for stack in self._stacks)
        pixels = enlarge(grid, self._size)
        inside = pixels.clamp(*box)
        self._put([inside if self._factor == 1 else grid + shrink(inside - pixels, self._factor), logits], where)

    def state(self) -> dict[str, Any]:
        """See `CandidateEngine`: the grid and its variables, the optimizer, random streams and counters."""
        return {
            "factor": self._factor,
            "stacks": [stack.detach().clone() for stack in self._stacks],
            "optimizer": optimizer_state(self._optimizer),
            "generators": [generator.get_state() for generator in self._generators],
            "streams": list(self._streams.states),
            "subsets": None if self._subsets is None else self._subsets.clone(),
            "prior_weight": self._prior_weight,
            "failed": self._failed.clone(),
            "counters": [self._adam_asked, self._asked_before, self.gradient_evaluations, self.full_gradients],
        }

    def restore(self, state: dict[str, Any], steps: int) -> None:
        """See `CandidateEngine`."""
        self._on_grid(state["factor"], self.parameters)
        self._put([stack.to(self.starts[0]) for stack in state["stacks"]], None)
        self._optimizer.load_state_dict(state["optimizer"])
        for generator, saved in zip(self._generators, state["generators"], strict=True):
            generator.set_state(saved.cpu())
        self._streams.states = list(state["streams"])
        self._subsets = None if state["subsets"] is None else state["subsets"].to(self.starts[0].device)
        self._prior_weight = state["prior_weight"]
        self._failed = state["failed"].to(self.starts[0].device)
        self._adam_asked, self._asked_before, self.gradient_evaluations, self.full_gradients = state["counters"]

    def _put(self, stacks: list[torch.Tensor], where: torch.Tensor | None) -> None:
        """Put values on the present grid into the candidates `where` (N,); None: into all."""
        with torch.no_grad():
            for stack, value in zip(self._stacks, stacks, strict=True):
                if where is not None:
                    value = torch.where(where.view(-1, *[1] * (value.dim() - 1)), value, stack)
                stack.copy_(value)

    def _on_grid(self, factor: int, parameters: list[torch.Tensor]) -> None:
        """Go on, from pixels and logits, on the grid of that factor."""
        self._asked_before, self._factor = self._asked() if self._factor else 0, factor
        pixels, logits = parameters
        grid = shrink(pixels, factor) if factor > 1 else pixels.clone()
        self._stacks = [grid.requires_grad_(), (logits / self.options.label_scale).requires_grad_()]
        self._optimizer = self.options.build(self._stacks)

    def _run_optimizer(self, iteration: int, done: float) -> torch.Tensor:
        """Values (N,) at the start of the step; NaN for candidates that failed in it."""

        def closure() -> torch.Tensor:
            if self.schedule.redraw == "closure":
                self._draw(iteration)
            values = self._evaluate()
            if self._are_ones:
                return values
            for stack in self._stacks:
                assert stack.grad is not None
                stack.grad = stack.grad / self._units.view(-1, *[1] * (stack.dim() - 1))
            return values / self._units

        if isinstance(self._optimizer, BatchedLBFGS):
            values = self._optimizer.step(closure)
            self._failed |= torch.tensor(self._optimizer.failed, device=values.device)
            return torch.where(self._failed, float("nan"), values * self._units)
        first: torch.Tensor | None = None
        for inner in range(self.options.inner_iterations):
            now = done + inner / self.options.inner_iterations / self.iterations
            lr = self.options.step_size * 0.5 * (1.0 + math.cos(math.pi * min(now, 1.0)))
            self._optimizer.param_groups[0]["lr"] = lr
            values = closure()
            self._optimizer.step()
            self._adam_asked += len(self._alive)
            first = values if first is None else first
        assert first is not None
        return first * self._units

    def _evaluate(self) -> torch.Tensor:
        """Set the gradients of grid and label variables, and return the values (N,)."""
        grid, labels = self._stacks
        scale = self.options.label_scale
        leaf = grid.detach().requires_grad_()
        with torch.enable_grad():
            pixels = enlarge(leaf, self._size)
        values, rankings, in_pixels, in_logits = self.matching(
            pixels.detach(), labels.detach() * scale, self._subsets, self._prior_weight, self._streams
        )
        if self._rankings is None:
            self._rankings = rankings.clone()
        grid.grad = in_pixels if pixels is leaf else torch.autograd.grad(pixels, leaf, in_pixels)[0]
        labels.grad = in_logits * scale
        return values

    def _asked(self) -> int:
        """Evaluations that candidates have asked for so far (frozen ones are counted, too: they are evaluated)."""
        if isinstance(self._optimizer, BatchedLBFGS):
            return self._asked_before + sum(self._optimizer.func_evals)
        return self._adam_asked

    def _next_objective(self, iteration: int, done: float) -> bool:
        """Set the step's prior weight and subsets; returns whether rankings compare with those before.

        They do not where the prior has grown: every point would be worse than the first.
        """
        weight, self._prior_weight = self._prior_weight, self.annealing.at(done)
        self._draw(iteration)
        return self._prior_weight <= weight

    def _draw(self, iteration: int) -> None:
        """Draw every candidate's subset from its own random stream."""
        if self.matching.term.kind == "none":
            return
        batch_size = self.starts[0].shape[1]
        size = self.schedule.size(iteration, batch_size, self.iterations)
        drawn = [torch.randperm(batch_size, generator=generator)[:size] for generator in self._generators]
        self._subsets = torch.stack(drawn).to(self.starts[0].device)  # (N, S)
