"""One call of `BatchedLBFGS.step`: the iterations of all candidates in lock-step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from .lbfgs_history import History, row_dot
from .line_search import Point, SearchResult, strong_wolfe

if TYPE_CHECKING:
    from .lbfgs import BatchedLBFGS

__all__ = ["LBFGSStep"]

Closure = Callable[[], torch.Tensor]


class LBFGSStep:
    """One call of `BatchedLBFGS.step`: what lives no longer than that call.

    Args:
        optimizer: the optimizer whose parameters and state are advanced.
        closure: the user's closure, with gradients enabled.
    """

    def __init__(self, optimizer: BatchedLBFGS, closure: Closure) -> None:
        self.o, self.closure = optimizer, closure
        self.group = optimizer.param_groups[0]
        self.active = [n for n in range(optimizer.num_candidates) if not optimizer._failed[n]]
        self.evals = [0] * optimizer.num_candidates  # in this call
        self.x = optimizer._flat()
        self.loss: list[float] = []
        self.grad = self.x  # (N, D), replaced by the first evaluation
        self.grad_max: list[float] = []

    def run(self) -> torch.Tensor:
        """Iterate until every candidate has stopped; returns the first losses, (N,)."""
        first = self._evaluate_here()
        self.active = [n for n in self.active if self.grad_max[n] > self.group["tolerance_grad"]]
        for iteration in range(1, self.group["max_iter"] + 1):
            if not self.active:
                break
            loss_before = list(self.loss)
            slope = self._new_direction()
            self.active = [n for n in self.active if slope[n] <= -self.group["tolerance_change"]]
            if not self.active:
                break
            reach = self._d.abs().amax(dim=1).tolist()
            if self.group["line_search_fn"] is None:
                self._fixed_move(evaluate=iteration < self.group["max_iter"])
            else:
                self._search(slope, reach)
            self.active = [n for n in self.active if self._goes_on(n, reach[n], loss_before[n])]
        return first

    @property
    def _d(self) -> torch.Tensor:
        assert self.o._d is not None
        return self.o._d

    def _goes_on(self, n: int, reach: float, loss_before: float) -> bool:
        """Whether candidate n, just moved, is to make another iteration in this call."""
        tolerance = self.group["tolerance_change"]
        return (
            self.evals[n] < self.group["max_eval"]
            and self.grad_max[n] > self.group["tolerance_grad"]
            and abs(reach * self.o._t[n]) > tolerance
            and abs(self.loss[n] - loss_before) >= tolerance
        )

    def _call(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses (N,) and gradients (N, D) at what the parameters hold now."""
        losses = self.closure().detach()
        if losses.shape != (self.o.num_candidates,):
            raise ValueError(
                f"the closure must return one loss per candidate, ({self.o.num_candidates},), "
                f"not a tensor of shape {tuple(losses.shape)}"
            )
        return losses, self.o._flat_grad()

    def _count(self, n: int, evals: int) -> None:
        self.evals[n] += evals
        self.o._evals[n] += evals

    def _evaluate_here(self) -> torch.Tensor:
        """Evaluate at the candidates' points, for all active ones; returns the losses, (N,)."""
        losses, self.grad = self._call()
        self.loss, self.grad_max = losses.tolist(), self.grad.abs().amax(dim=1).tolist()
        for n in self.active:
            self._count(n, 1)
        self._take_out_failed()
        return losses

    def _take_out_failed(self) -> None:
        """Put candidates whose value is not finite back to their last finite point, and leave them there."""
        bad = [n for n in self.active if not (math.isfinite(self.loss[n]) and math.isfinite(self.grad_max[n]))]
        if bad and self.o._safe is not None:
            self.x[bad] = self.o._safe[bad]
            self.o._write(self.x)
        for n in bad:
            self.o._failed[n] = True
        self.active = [n for n in self.active if n not in bad]
        self.o._safe = self.x  # moves make new tensors, so this needs no copy

    def _new_direction(self) -> list[float]:
        """Update the histories, compute every active candidate's direction; returns its slopes."""
        o = self.o
        if o._history is None or o._d is None or o._grad_before is None:
            o._history = History(self.group["history_size"], self.grad)
            o._d, o._grad_before = torch.zeros_like(self.grad), torch.zeros_like(self.grad)
        fresh = [n for n in self.active if o._iterations[n] == 0]
        known = [n for n in self.active if o._iterations[n] > 0]
        if known:
            step = o._d * self.x.new_tensor(o._t)[:, None]  # (N, D)
            o._history.push(step, self.grad - o._grad_before, known)
        direction = o._history.direction(self.grad)
        o._d = self._select(direction, o._d)
        o._grad_before = self._select(self.grad, o._grad_before)
        size = self.grad.abs().sum(dim=1).tolist() if fresh else []
        for n in self.active:
            o._iterations[n] += 1
            o._t[n] = self.group["lr"] * (min(1.0, 1.0 / size[n]) if n in fresh else 1.0)
        return row_dot(self.grad, o._d).tolist()

    def _select(self, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        """`new` for the active candidates, `old` for the others: (N, D)."""
        if len(self.active) == self.o.num_candidates:
            return new
        active = torch.zeros(self.o.num_candidates, dtype=torch.bool)
        active[self.active] = True
        return torch.where(active.to(new.device)[:, None], new, old)

    def _moved(self, lengths: dict[int, float]) -> torch.Tensor:
        """x + t d for the candidates in `lengths` (candidate: t), x for the others: (N, D)."""
        t = [lengths.get(n, 0.0) for n in range(self.o.num_candidates)]
        moved = torch.addcmul(self.x, self._d, self.x.new_tensor(t)[:, None])
        return self._select(moved, self.x)  # not by a step of 0 alone: 0 · inf is NaN

    def _fixed_move(self, evaluate: bool) -> None:
        """Move by the fixed step length; torch's L-BFGS leaves out the evaluation after the last move."""
        self.x = self._moved({n: self.o._t[n] for n in self.active})
        self.o._write(self.x)
        if evaluate:
            self._evaluate_here()

    def _search(self, slope: list[float], reach: list[float]) -> None:
        """Line searches of all active candidates in lock-step, one stacked evaluation a round."""
        results: dict[int, SearchResult] = {}
        searches = {}
        for n in self.active:
            start = Point(0.0, self.loss[n], slope[n], self.grad[n])
            budget = self.group["max_eval"] - self.evals[n]
            searches[n] = strong_wolfe(start, self.o._t[n], reach[n], max_ls=budget)
        asked = {n: next(search) for n, search in searches.items()}
        while asked:
            self.o._write(self._moved(asked))
            losses, grad = self._call()
            values, slopes = losses.tolist(), row_dot(grad, self._d).tolist()
            for n, t in list(asked.items()):
                try:
                    asked[n] = searches[n].send(Point(t, values[n], slopes[n], grad[n]))
                except StopIteration as stop:
                    results[n] = stop.value
                    del asked[n]
        self._accept(results)

    def _accept(self, results: dict[int, SearchResult]) -> None:
        """Go to where the searches ended."""
        grad = self.grad.clone()
        for n, result in results.items():
            self._count(n, result.evals)
            self.o._t[n], self.loss[n], grad[n] = result.point.t, result.point.f, result.point.grad
        self.x, self.grad = self._moved({n: result.point.t for n, result in results.items()}), grad
        self.grad_max = grad.abs().amax(dim=1).tolist()
        self.o._write(self.x)
        self._take_out_failed()
