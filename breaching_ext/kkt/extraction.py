"""Candidates and multipliers that make the KKT residual small: several restarts in one batched run.

What is minimised for each restart, over images x_i in the span of the first layer, multipliers λ_i and slacks u:

    ‖θ − Σ_i λ_i y_i ∇_θ Φ(x_i; θ)‖² / ‖θ‖²  +  w_λ Σ_i (λ_min − λ_i)₊²  +  w_box mean_i ‖x_i − [0, 1]‖²

The first term is the KKT loss, the others are the paper's priors. Two things go beyond the paper. The images are
searched in the span of the data where the first layer shows it (:mod:`~breaching_ext.kkt.span`). And the slope of
a unit may differ from σ(s·z): gradient descent leaves a good part of the pre-activations *on* the kink of the ReLU,
where the stationarity condition allows any slope in [0, 1] (Clarke), so each slope is σ(s·z + u) with its own
|u| ≤ `slack`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..errors import unknown
from ..values import check_number, check_whole
from .problem import Problem

log = logging.getLogger(__name__)

OPTIMIZERS = ("adam", "sgd")


@dataclass(frozen=True)
class ExtractionOptions:
    """What the search does.

    Args:
        steps: iterations of every restart.
        lr, lr_lambda, lr_slack: step sizes of images (in coordinates), multipliers, slacks; all fall by a half cosine.
        lambda_min: multipliers below it are penalised, with weight `lambda_weight`.
        lambda_init: multipliers start uniformly in 0.5 to 1.5 times this.
        init_scale: standard deviation of the start of the images.
        slack: largest |u|; 0 switches the slacks off, as in the paper.
        box_weight: weight of the pixel range.
        optimizer: 'adam', or 'sgd' with momentum 0.9, as in the paper.
    """

    steps: int = 2000
    lr: float = 0.03
    lr_lambda: float = 0.002
    lr_slack: float = 0.1
    lambda_min: float = 0.02
    lambda_weight: float = 1.0
    lambda_init: float = 0.1
    init_scale: float = 0.1
    slack: float = 3.0
    box_weight: float = 1.0
    optimizer: str = "adam"

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise unknown("optim.optimizer", self.optimizer, OPTIMIZERS)
        check_whole("optim.max_iterations", self.steps, 1)
        for name in ("lr", "lr_lambda", "init_scale", "lambda_init"):
            check_number(f"extraction.{name}", getattr(self, name), above=0)
        for name in ("lr_slack", "slack", "box_weight", "lambda_weight", "lambda_min"):
            check_number(f"extraction.{name}", getattr(self, name), least=0)


@dataclass
class Extracted:
    """The best point of every restart.

    Attributes:
        coordinates: (R, k, r) or (R, k, C, H, W), as the residual takes them.
        multipliers: λ, (R, k).
        losses: relative KKT loss, (R,); infinite where a restart never was finite.
        objective: the same with the priors, by which the best point was kept, (R,).
        histories: KKT loss every so many steps, one list a restart.
        interrupted: whether Ctrl-C ended the run.
        best_steps: how many steps led to each best point, (R,); 0 is the start.
        finite: whether each restart was finite when it was evaluated last, (R,).
    """

    coordinates: Tensor
    multipliers: Tensor
    losses: Tensor
    objective: Tensor
    histories: list[list[float]] = field(default_factory=list)
    interrupted: bool = False
    best_steps: Tensor = field(default_factory=lambda: torch.zeros(0))
    finite: Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def failures(self) -> list[int]:
        """Restarts that did not stay finite."""
        return (~self.finite.bool()).nonzero().flatten().tolist()

    @property
    def nowhere(self) -> bool:
        """Whether no restart came further than its start, because none stayed finite."""
        return not bool(self.losses.isfinite().any()) or (not self.finite.any() and not self.best_steps.any())


class Extraction:
    """The search, step by step.

    Args:
        problem: the network's residual and coordinates.
        labels: ±1 of every candidate, (k,).
        starts: coordinates of every restart, (R, k, ...).
        options: see :class:`ExtractionOptions`.
        generators: one a restart, for the start of its multipliers.
        fixed: hold the images fixed and fit multipliers and slacks only.
    """

    def __init__(
        self,
        problem: Problem,
        labels: Tensor,
        starts: Tensor,
        options: ExtractionOptions,
        generators: Sequence[torch.Generator],
        fixed: bool = False,
    ) -> None:
        self.problem, self.labels, self.options = problem, labels, options
        restarts, k = starts.shape[:2]
        draws = [torch.rand(k, generator=g, dtype=starts.dtype) for g in generators]
        self.x = starts.detach().clone().requires_grad_(not fixed)
        self.lam = (options.lambda_init * (0.5 + torch.stack(draws).to(starts.device))).requires_grad_()
        widths = problem.slack_widths if options.slack else []
        self.slack = [starts.new_zeros(restarts, k, width).requires_grad_() for width in widths]
        self._optimizer = self._make_optimizer()
        self.step_count = 0
        infinite = torch.full((restarts,), float("inf"), dtype=starts.dtype, device=starts.device)
        self.best = Extracted(self.x.detach().clone(), self.lam.detach().clone(), infinite, infinite.clone())
        self.best.histories = [[] for _ in range(restarts)]
        self.best.best_steps = torch.zeros(restarts, dtype=torch.long, device=starts.device)
        self.best.finite = torch.ones(restarts, dtype=torch.bool, device=starts.device)

    def _make_optimizer(self) -> torch.optim.Optimizer:
        rated = [(self.x, self.options.lr), (self.lam, self.options.lr_lambda)]
        rated += [(u, self.options.lr_slack) for u in self.slack]
        groups = [{"params": [tensor], "lr": lr, "rate": lr} for tensor, lr in rated if tensor.requires_grad]
        if self.options.optimizer == "sgd":
            return torch.optim.SGD(groups, momentum=0.9)
        return torch.optim.Adam(groups)

    def run(
        self,
        progress: bool | None = None,
        until: int | None = None,
        on_step: Callable[[int], None] | None = None,
        every: int = 50,
    ) -> Extracted:
        """Go on to the last step (or `until`); Ctrl-C ends the run and keeps what there is.

        Args:
            progress: show a bar; None shows it in a terminal.
            until: stop before this step.
            on_step: called with the number of every step that is done, for checkpoints.
            every: steps between two entries of the histories.
        """
        last = min(self.options.steps, self.options.steps if until is None else until)
        disable = None if progress is None else not progress
        try:
            with logging_redirect_tqdm(), tqdm(total=last, initial=self.step_count, desc="KKT", disable=disable) as bar:
                while self.step_count < last:
                    losses = self.step()
                    done = self.step_count
                    if (done - 1) % every == 0 or done == last:
                        self._log(losses)
                        bar.update(done - bar.n)
                        bar.set_postfix(loss=f"{float(losses.nan_to_num(nan=math.inf).min()):.4f}")
                    if on_step is not None:
                        on_step(done)
        except KeyboardInterrupt:
            log.warning("Interrupted after %d of %d steps.", self.step_count, self.options.steps)
            self.best.interrupted = True
        return self.best

    def _log(self, losses: Tensor) -> None:
        for history, value in zip(self.best.histories, losses.tolist(), strict=True):
            history.append(value)

    def step(self) -> Tensor:
        """Evaluate, keep what is better, and step; returns the KKT losses before the step, (R,)."""
        relative = self.problem.residual(self.x, self.lam * self.labels, self.slack) / self.problem.norm  # (R,)
        objective = relative + self._priors()
        self._optimizer.zero_grad(set_to_none=True)
        objective[objective.detach().isfinite()].sum().backward()  # one that has failed keeps its best point
        self._keep(relative.detach(), objective.detach())
        share = 0.5 * (1 + math.cos(math.pi * self.step_count / self.options.steps))
        for group in self._optimizer.param_groups:
            group["lr"] = group["rate"] * share
        self._optimizer.step()
        with torch.no_grad():
            for u in self.slack:
                u.clamp_(-self.options.slack, self.options.slack)
        self.step_count += 1
        return relative.detach()

    def _priors(self) -> Tensor:
        options = self.options
        prior = options.lambda_weight * (options.lambda_min - self.lam).clamp_min(0).square().sum(dim=1)
        if options.box_weight:
            pixels = self.problem.pixels(self.x)  # (R, k, C, H, W)
            beyond = pixels - pixels.clamp(0, 1)
            prior = prior + options.box_weight * beyond.square().flatten(2).sum(dim=2).mean(dim=1)
        return prior

    def _keep(self, losses: Tensor, objective: Tensor) -> None:
        better = objective < self.best.objective  # NaN is not better
        self.best.finite = objective.isfinite()
        self.best.best_steps = torch.where(better, self.step_count, self.best.best_steps)
        self.best.objective = torch.where(better, objective, self.best.objective)
        self.best.losses = torch.where(better, losses, self.best.losses)
        self.best.multipliers = torch.where(better[:, None], self.lam.detach(), self.best.multipliers)
        shape = (-1, *[1] * (self.x.ndim - 1))
        self.best.coordinates = torch.where(better.view(shape), self.x.detach(), self.best.coordinates)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on."""
        best = self.best
        return {
            "iteration": self.step_count,
            "tensors": [t.detach() for t in (self.x, self.lam, *self.slack)],
            "optimizer": self._optimizer.state_dict(),
            "best": [best.coordinates, best.multipliers, best.losses, best.objective],
            "histories": best.histories,
            "best_steps": best.best_steps,
            "finite": best.finite,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of a run with the same arguments."""
        self.step_count = state["iteration"]
        with torch.no_grad():
            for mine, saved in zip((self.x, self.lam, *self.slack), state["tensors"], strict=True):
                mine.copy_(saved)
        self._optimizer.load_state_dict(state["optimizer"])
        coordinates, multipliers, losses, objective = (t.to(self.x.device) for t in state["best"])
        self.best = Extracted(coordinates, multipliers, losses, objective, state["histories"])
        self.best.best_steps = state["best_steps"].to(self.x.device)
        self.best.finite = state["finite"].to(self.x.device)
