"""L-BFGS for a stack of independent candidates.

``torch.optim.LBFGS`` treats everything that it is given as one vector: over a stack of candidates it would share
one curvature estimate, one step length and one stopping test among problems that have nothing to do with each
other. Here every candidate keeps its own history, curvature test, line search and convergence, while the
two-loop recursion and the objective run on the whole stack at once.

References:
    J. Nocedal, "Updating quasi-Newton matrices with limited storage", Mathematics of Computation 35 (1980).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from .lbfgs_history import History, row_dot
from .line_search import Point, SearchResult, strong_wolfe

__all__ = ["BatchedLBFGS"]

Closure = Callable[[], torch.Tensor]


class BatchedLBFGS(torch.optim.Optimizer):
    """L-BFGS on N candidates at once, each with the semantics of ``torch.optim.LBFGS``.

    Every parameter carries the candidates in its leading axis. Per candidate, `step` does what
    ``torch.optim.LBFGS.step`` does on that candidate alone; a candidate that has converged sits out the rest of
    the step, and one whose loss or gradient turns non-finite is put back to its last finite point and stays
    there. The others are not affected.

    Args:
        params: tensors (N, ...) with the same N, dtype and device.
        lr: step length (without line search), or the first one that the search tries.
        max_iter: most iterations a call of `step`.
        max_eval: most evaluations a call of `step` and candidate; default 1.25 `max_iter`.
        tolerance_grad: a candidate stops once its largest absolute gradient entry is at most this.
        tolerance_change: it stops once its step or its change of loss is smaller than this.
        history_size: curvature pairs kept per candidate; memory is 2 · history_size · N · D numbers.
        line_search_fn: None, or 'strong_wolfe'.

    Raises:
        ValueError: for an argument out of range, or parameters whose leading axes differ.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor],
        lr: float = 1.0,
        max_iter: int = 20,
        max_eval: int | None = None,
        tolerance_grad: float = 1e-7,
        tolerance_change: float = 1e-9,
        history_size: int = 100,
        line_search_fn: str | None = None,
    ) -> None:
        if not lr >= 0.0:
            raise ValueError(f"lr={lr} must not be negative")
        if max_iter < 1 or history_size < 1:
            raise ValueError(f"max_iter={max_iter} and history_size={history_size} must be at least 1")
        if line_search_fn not in (None, "strong_wolfe"):
            raise ValueError(f"line_search_fn={line_search_fn!r} is not one of None, 'strong_wolfe'")
        defaults = {
            "lr": lr,
            "max_iter": max_iter,
            "max_eval": max_iter * 5 // 4 if max_eval is None else max_eval,
            "tolerance_grad": tolerance_grad,
            "tolerance_change": tolerance_change,
            "history_size": history_size,
            "line_search_fn": line_search_fn,
        }
        super().__init__(params, defaults)
        if len(self.param_groups) != 1:
            raise ValueError("BatchedLBFGS takes one parameter group: curvature is shared by all parameters")
        self._params: list[torch.Tensor] = self.param_groups[0]["params"]
        counts = {p.shape[0] if p.ndim else 0 for p in self._params}
        if len(counts) != 1 or 0 in counts:
            raise ValueError(f"parameters must share a leading candidate axis, got lengths {sorted(counts)}")
        self.num_candidates = counts.pop()
        self._reset_state()

    # ------------------------------------------------------------------ state

    def _reset_state(self) -> None:
        n = self.num_candidates
        self._history: History | None = None
        self._evals, self._iterations = [0] * n, [0] * n
        self._failed = [False] * n
        self._t = [0.0] * n
        self._d: torch.Tensor | None = None
        self._grad_before: torch.Tensor | None = None
        self._safe: torch.Tensor | None = None

    _NUMBERS = ("_evals", "_iterations", "_failed", "_t")
    _TENSORS = ("_d", "_grad_before", "_safe")

    @property
    def func_evals(self) -> list[int]:
        """Evaluations that each candidate has asked for so far."""
        return list(self._evals)

    @property
    def n_iter(self) -> list[int]:
        """Iterations that each candidate has made so far."""
        return list(self._iterations)

    @property
    def failed(self) -> list[bool]:
        """Which candidates were taken out because their loss or gradient became non-finite."""
        return list(self._failed)

    def state_dict(self) -> dict[str, Any]:
        """Hyper-parameters and the state of every candidate, enough to go on bit for bit."""
        own: dict[str, Any] = {key: list(getattr(self, key)) for key in self._NUMBERS}
        own |= {key: getattr(self, key) for key in self._TENSORS}
        own["history"] = None if self._history is None else self._history.state_dict()
        group = {key: value for key, value in self.param_groups[0].items() if key != "params"}
        return {"state": own, "param_groups": [group | {"params": list(range(len(self._params)))}]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave for parameters of the same shapes.

        Raises:
            ValueError: if the state is one of another number of candidates.
        """
        own = state_dict["state"]
        if len(own["_evals"]) != self.num_candidates:
            raise ValueError(f"state of {len(own['_evals'])} candidates, parameters have {self.num_candidates}")
        self.param_groups[0].update({k: v for k, v in state_dict["param_groups"][0].items() if k != "params"})
        for key in self._NUMBERS:
            setattr(self, key, list(own[key]))
        flat = self._flat()
        for key in self._TENSORS:
            setattr(self, key, None if own[key] is None else own[key].to(flat).clone())
        self._history = None
        if own["history"] is not None:
            self._history = History(self.param_groups[0]["history_size"], flat)
            self._history.load_state_dict(own["history"])

    # ------------------------------------------------------------------ flat views

    def _flat(self) -> torch.Tensor:
        """All parameters of a candidate as one row: (N, D), a copy."""
        return torch.cat([p.detach().reshape(self.num_candidates, -1) for p in self._params], dim=1)

    def _flat_grad(self) -> torch.Tensor:
        rows = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._params]
        return torch.cat([row.reshape(self.num_candidates, -1) for row in rows], dim=1)

    def _write(self, flat: torch.Tensor) -> None:
        offset = 0
        for p in self._params:
            width = p[0].numel()
            p.copy_(flat[:, offset : offset + width].reshape(p.shape))
            offset += width

    # ------------------------------------------------------------------ one step

    @torch.no_grad()
    def step(self, closure: Closure) -> torch.Tensor:  # type: ignore[override]
        """Make at most `max_iter` iterations with every candidate that has not failed.

        Args:
            closure: re-evaluates the stack: sets ``p.grad`` of every parameter and returns the losses (N,).

        Returns:
            The losses of the first evaluation, (N,).

        Raises:
            ValueError: if the closure's result has not one loss per candidate.
        """
        return _Step(self, torch.enable_grad()(closure)).run()


class _Step:
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
