"""L-BFGS for a stack of independent candidates.

``torch.optim.LBFGS`` treats everything that it is given as one vector: over a stack of candidates it would share
one curvature estimate, one step length and one stopping test among problems that have nothing to do with each
other. Here every candidate keeps its own history, curvature test, line search and convergence, while the
two-loop recursion and the objective run on the whole stack at once.

References:
    J. Nocedal, "Updating quasi-Newton matrices with limited storage", Mathematics of Computation 35 (1980).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from .lbfgs_history import History
from .lbfgs_step import LBFGSStep

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
        return LBFGSStep(self, torch.enable_grad()(closure)).run()
