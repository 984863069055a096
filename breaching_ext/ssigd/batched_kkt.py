"""The KKT systems of many QPs that share Q and R, in torch, and the active-set steps that settle their sides.

Primal-dual active-set method: Hintermüller, Ito, Kunisch, SIAM J. Optim. 2002.
"""

from __future__ import annotations

import torch
from torch import Tensor

from breaching_ext.ssigd.active_factor import ActiveFactor
from breaching_ext.ssigd.kkt_system import REFINE_ABOVE, SIGN_TOLERANCE, KKTSystem


class BatchedKKT:
    """Q y + R_Wᵀ λ = r, R_W y = e for a batch, one set of rows W a member.

    Args:
        kkt: the system of one QP.
        device: where the batch is solved.

    Attributes:
        Q, Q_inverse, R, T, K, inverse_size: as in KKTSystem.
    """

    Q: Tensor
    Q_inverse: Tensor
    R: Tensor
    T: Tensor
    K: Tensor

    def __init__(self, kkt: KKTSystem, device: torch.device) -> None:
        """See the class."""
        for name in ("Q", "Q_inverse", "R", "T", "K"):
            setattr(self, name, torch.from_numpy(getattr(kkt, name)).to(device))
        self.inverse_size = kkt.inverse_size
        self._refine = kkt.condition > REFINE_ABOVE

    def solve(self, factor: ActiveFactor, r: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """Return y (N, n) and λ (N, p) for r (N, n) and e (N, p), refined where Q is ill-conditioned."""
        y, signed = self.once(factor, r, e)
        if self._refine:
            for _ in range(2):
                dy, ds = self.once(factor, r - y @ self.Q - signed @ self.R, e - y @ self.R.T)
                y, signed = y + dy, signed + ds
        return y, signed

    def once(self, factor: ActiveFactor, r: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """Solve without refinement."""
        signed = factor.solve(r @ self.T - e)
        return r @ self.Q_inverse - signed @ self.T.T, signed

    def settle(
        self, free: Tensor, lower: Tensor, upper: Tensor, side: Tensor, c: Tensor, steps: int
    ) -> tuple[Tensor, ActiveFactor, Tensor]:
        """Take active-set steps on the members whose sides still change.

        Args:
            free: R y of the minimisers without constraints, (N, p).
            lower, upper: bounds, (N, p).
            side: sides to begin with: 1 upper, −1 lower, 0 not active, (N, p).
            c: linear terms, (N, n); their size is that of a sign's rounding.
            steps: most steps.

        Returns:
            The sides, their factor, and whose sides no longer change, (N,).
        """
        tolerance = SIGN_TOLERANCE * c.abs().amax(dim=1, keepdim=True)
        todo = torch.arange(len(side), device=side.device)
        factor: ActiveFactor | None = None
        for step in range(steps):
            part = ActiveFactor.of(self.K, side[todo] != 0)
            new = self._next_sides(part, free[todo], lower[todo], upper[todo], side[todo], tolerance[todo])
            changed = (new != side[todo]).any(dim=1)
            if step == 0:
                factor = part
            todo = todo[changed]
            if not len(todo):
                break
            side = side.index_copy(0, todo, new[changed])
        settled = torch.ones(len(side), dtype=torch.bool, device=side.device).index_fill(0, todo, False)
        if factor is None or step:  # the first factor holds only where no set changed after it
            factor = ActiveFactor.of(self.K, side != 0)
        return side, factor, settled

    def _next_sides(
        self,
        factor: ActiveFactor,
        free: Tensor,
        lower: Tensor,
        upper: Tensor,
        side: Tensor,
        tolerance: Tensor,
    ) -> Tensor:
        """Drop rows whose multiplier has the wrong sign and add rows that are violated."""
        bound = torch.where(side > 0, upper, lower)
        signed = factor.solve(free - bound)
        Ry = free - signed @ self.K
        added = (Ry > upper + tolerance).double() - (Ry < lower - tolerance).double()
        return torch.where(side == 0, added, torch.where(signed * side >= -tolerance, side, 0.0))
