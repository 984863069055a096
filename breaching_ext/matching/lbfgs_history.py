"""Curvature pairs of N independent candidates, and the two-loop recursion over all of them at once.

References:
    J. Nocedal, "Updating quasi-Newton matrices with limited storage", Mathematics of Computation 35 (1980).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["History", "row_dot"]


#: Rows of this length and above go through BLAS one by one, which keeps a row in the cache; shorter ones together.
_LONG_ROW = 65536


def row_dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Inner product of each candidate's row: (N, D), (N, D) -> (N,).

    How a row is summed must not depend on N, or a candidate's path would depend on its company: L-BFGS amplifies
    rounding differences.
    """
    if a.shape[1] >= _LONG_ROW and a.device.type == "cpu":
        return torch.stack([torch.dot(x, y) for x, y in zip(a, b, strict=True)])
    return torch.linalg.vecdot(a, b)


class History:
    """The curvature pairs of every candidate, in one ring buffer each.

    A candidate that skips a pair (its curvature test failed) does not move its ring. As long as no candidate
    has skipped one that another has taken, all rings stand at the same slot and pairs are plain views.

    Args:
        size: pairs that are kept per candidate.
        like: a tensor (N, D) whose shape, dtype and device the pairs have.
    """

    def __init__(self, size: int, like: torch.Tensor) -> None:
        n = like.shape[0]
        # zeros, not empty: unused slots take part in the recursion with weight 0 and must be finite
        self.steps = like.new_zeros((size, *like.shape))  # (M, N, D)
        self.yields = like.new_zeros((size, *like.shape))  # (M, N, D)
        self.rho = like.new_zeros((size, n))  # (M, N); 0 where a slot is unused
        self.scale = like.new_ones(n)  # (N,) the initial Hessian approximation's inverse
        self.taken = [0] * n  # pairs ever taken, per candidate

    def reset(self, rows: Sequence[int]) -> None:
        """Forget the pairs of some candidates."""
        for n in rows:
            self.rho[:, n] = 0.0
            self.scale[n] = 1.0
            self.taken[n] = 0

    def push(self, s: torch.Tensor, y: torch.Tensor, rows: Sequence[int]) -> None:
        """Offer the pairs (s, y), both (N, D), of the candidates `rows`; those with yᵀs > 1e-10 are taken."""
        ys = row_dot(y, s)  # (N,)
        positive = (ys > 1e-10).tolist()
        rows = [n for n in rows if positive[n]]
        if not rows:
            return
        slots = {self.taken[n] % len(self.rho) for n in rows}
        if len(slots) == 1 and len(rows) == len(self.taken):
            slot = slots.pop()
            self.steps[slot], self.yields[slot] = s, y
            self.rho[slot] = 1.0 / ys
            self.scale = ys / row_dot(y, y)
        else:
            scale = ys / row_dot(y, y)
            for n in rows:
                slot = self.taken[n] % len(self.rho)
                self.steps[slot, n], self.yields[slot, n] = s[n], y[n]
                self.rho[slot, n] = 1.0 / ys[n]
                self.scale[n] = scale[n]
        for n in rows:
            self.taken[n] += 1

    def _pair(self, age: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Step, yield (N, D) and rho (N,) of each candidate's pair of that age, 0 being the newest."""
        size = len(self.rho)
        slots = [(taken - 1 - age) % size for taken in self.taken]
        if len(set(slots)) == 1:
            slot = slots[0]
            return self.steps[slot], self.yields[slot], self.rho[slot]
        index = torch.tensor(slots, device=self.rho.device)
        each = torch.arange(len(slots), device=self.rho.device)
        return self.steps[index, each], self.yields[index, each], self.rho[index, each]

    def direction(self, grad: torch.Tensor) -> torch.Tensor:
        """Two-loop recursion: minus the inverse Hessian approximation times the gradient, (N, D)."""
        depth = min(max(self.taken), len(self.rho))
        q = grad.neg()
        alpha: list[torch.Tensor] = []
        for age in range(depth):
            s, y, rho = self._pair(age)
            alpha.append(row_dot(s, q) * rho)
            q.addcmul_(y, alpha[-1][:, None], value=-1.0)
        q.mul_(self.scale[:, None])
        for age in reversed(range(depth)):
            s, y, rho = self._pair(age)
            q.addcmul_(s, (alpha[age] - row_dot(y, q) * rho)[:, None])
        return q

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on, as tensors and plain numbers."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        for key, value in state.items():
            own = getattr(self, key)
            setattr(self, key, value.to(own).clone() if isinstance(own, torch.Tensor) else list(value))
