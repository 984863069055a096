"""The certified QP for a batch of (c, h) with Q and G shared: many x, or many perturbations q, at once.

Pure torch, on any device: a short ADMM run guesses the active sets (see `admm_guess`), a primal-dual
active-set method (Hintermüller, Ito, Kunisch, SIAM J. Optim. 2002) settles them with exact KKT solves, and
members that are not certified after that are solved one by one by `ParametricQP`, which raises the named
error where a member has no solution.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from breaching_ext.ssigd.active_factor import ActiveFactor
from breaching_ext.ssigd.admm_guess import ADMMGuess
from breaching_ext.ssigd.checks import SIGN_TOLERANCE
from breaching_ext.ssigd.errors import DegenerateError, NonFiniteError, SSIGDError
from breaching_ext.ssigd.kkt_system import CANCELLED, EPS, REFINE_ABOVE
from breaching_ext.ssigd.qp import ParametricQP
from breaching_ext.ssigd.rows import Array
from breaching_ext.ssigd.solution import QPSolution


@dataclass(frozen=True)
class BatchedSolution:
    """Certified minimisers of a batch.

    Attributes:
        y: minimisers, (N, n).
        side: active side of each two-sided row: 1 upper, −1 lower, 0 not active, (N, p).
        signed: multipliers, positive on the upper side, (N, p).
        margin: strict-complementarity margins, (N,).
        residual: relative KKT residuals, (N,).
        fallbacks: number of members that were solved one by one.
        factor: factors of the active Schur complements.
    """

    y: Tensor
    side: Tensor
    signed: Tensor
    margin: Tensor
    residual: Tensor
    fallbacks: int
    factor: ActiveFactor


class BatchedQP:
    """Batched solver that shares the constants of a `ParametricQP`.

    Args:
        single: the solver of one QP with the same Q and G; it is also the fallback.
        device: where the batch is solved, default CPU.
        admm_steps: most ADMM steps before the active-set polish, default 40.
        polish_steps: most active-set steps before the fallback, default 15.
    """

    def __init__(
        self,
        single: ParametricQP,
        *,
        device: torch.device | str = "cpu",
        admm_steps: int = 40,
        polish_steps: int = 15,
    ) -> None:
        """See the class."""
        self.single, self.device = single, torch.device(device)
        self.polish_steps = polish_steps
        for name in ("Q", "Q_inverse", "R", "T", "K"):
            setattr(self, name, torch.from_numpy(getattr(single.kkt, name)).to(self.device))
        self.Q: Tensor
        self.Q_inverse: Tensor
        self.R: Tensor
        self.T: Tensor
        self.K: Tensor
        self.norms = torch.linalg.vector_norm(self.R, dim=1)
        rows = single.rows
        self.upper_of = torch.from_numpy(rows.upper_of).to(self.device)
        self.lower_of = torch.from_numpy(rows.lower_of).to(self.device)
        self.pairs = torch.from_numpy(rows.paired.nonzero()[0]).to(self.device)
        self._inverse_size = float(self.Q_inverse.abs().sum(dim=1).max())
        self._guess = ADMMGuess(self.Q, self.R, self.K, admm_steps)

    def solve(self, c: Tensor, h: Tensor) -> BatchedSolution:
        """Solve and certify all members.

        Args:
            c: linear terms, (N, n), float64.
            h: right-hand sides, (N, m), float64.

        Raises:
            SSIGDError and its subclasses: see errors.py; the message names the first member at fault.
        """
        self._check(c, h)
        lower, upper = self._sides(h)
        self._check_gaps(c, h, lower, upper)
        free = -(c @ self.T)  # R y without constraints, (N, p)
        side = self._guess.sides(c, free, lower, upper)
        side, factor, settled = self._settle(free, lower, upper, side, c)
        solution = self._assemble(c, lower, upper, side, factor)
        certified = settled & self._certified(c, solution)
        if not bool(certified.all()):
            solution = self._repair(c, h, solution, (~certified).nonzero()[:, 0].tolist())
        self._check_margin(solution.margin)
        return solution

    def adjoint(self, solution: BatchedSolution, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return a (N, n) and b (N, p) of the adjoint KKT systems for cotangents v (N, n).

        As ParametricQP.adjoint, but b is signed like `solution.signed`: it is the derivative with respect
        to the active bound of R y.
        """
        if len(solution.margin):
            tolerance = SIGN_TOLERANCE * (1.0 + float(solution.y.abs().max()))
            self.single.warn_kink(float(solution.margin.min()), tolerance)
        a, b = self._kkt(solution.factor, v, torch.zeros_like(solution.signed))
        off = _most((a @ self.R.T).abs().div(self.norms).masked_fill(solution.side == 0, 0.0))
        reach = (v @ self.Q_inverse).abs().amax(dim=1)  # of a where nothing is active
        sound = off <= SIGN_TOLERANCE * reach  # not so with a failed factor, whose numbers are not finite
        for member in (~sound).nonzero()[:, 0].tolist():
            index = solution.side[member].nonzero()[:, 0]
            one, other = self.single.adjoint_on(index.cpu().numpy(), v[member].cpu().numpy())
            a[member], b[member] = self._to(one), torch.zeros_like(b[member]).index_copy(0, index, self._to(other))
        return a, b

    def row_values(self, signed: Tensor, side: Tensor) -> Tensor:
        """Spread values b over two-sided rows (N, p) over the rows of G, in the orientation of G: (N, m)."""
        rows = signed.new_zeros(len(signed), self.single.m)
        rows[:, self.upper_of] = torch.where(side > 0, signed, 0.0)
        rows[:, self.lower_of[self.pairs]] = torch.where(side < 0, -signed, 0.0)[:, self.pairs]
        return rows

    def _check(self, c: Tensor, h: Tensor) -> None:
        n, m = self.single.n, self.single.m
        if c.ndim != 2 or c.shape[1] != n or h.shape != (c.shape[0], m):
            raise SSIGDError(f"c has shape {tuple(c.shape)} and h {tuple(h.shape)}; expected (N, {n}) and (N, {m})")
        for name, value in (("c", c), ("h", h)):
            bad = (~torch.isfinite(value)).any(dim=1)
            if bool(bad.any()):
                raise NonFiniteError(f"member {int(bad.nonzero()[0, 0])}: {name} holds NaN or infinity")

    def _sides(self, h: Tensor) -> tuple[Tensor, Tensor]:
        upper = h[:, self.upper_of]
        lower = torch.full_like(upper, -torch.inf)
        lower[:, self.pairs] = -h[:, self.lower_of[self.pairs]]
        return lower, upper

    def _check_gaps(self, c: Tensor, h: Tensor, lower: Tensor, upper: Tensor) -> None:
        """Let the single solver raise its error where opposite rows cross or leave no room."""
        narrow = ((upper - lower) / self.norms <= SIGN_TOLERANCE).any(dim=1)
        if bool(narrow.any()):
            member = int(narrow.nonzero()[0, 0])
            self._solve_one(member, c, h)

    def _settle(
        self, free: Tensor, lower: Tensor, upper: Tensor, side: Tensor, c: Tensor
    ) -> tuple[Tensor, ActiveFactor, Tensor]:
        """Take active-set steps on the members whose set still changes; return sets, factor, who settled."""
        tolerance = SIGN_TOLERANCE * (1.0 + c.abs().amax(dim=1, keepdim=True))
        todo = torch.arange(len(side), device=side.device)
        factor: ActiveFactor | None = None
        for step in range(self.polish_steps):
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

    def _kkt(self, factor: ActiveFactor, r: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """Solve Q y + R_Wᵀ λ = r, R_W y = e for every member, refined where Q is ill-conditioned."""
        y, signed = self._kkt_once(factor, r, e)
        if self.single.condition > REFINE_ABOVE:
            for _ in range(2):
                dy, ds = self._kkt_once(factor, r - y @ self.Q - signed @ self.R, e - y @ self.R.T)
                y, signed = y + dy, signed + ds
        return y, signed

    def _kkt_once(self, factor: ActiveFactor, r: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        signed = factor.solve(r @ self.T - e)
        return r @ self.Q_inverse - signed @ self.T.T, signed

    def _assemble(self, c: Tensor, lower: Tensor, upper: Tensor, side: Tensor, factor: ActiveFactor) -> BatchedSolution:
        mask = side != 0
        bound = torch.where(side > 0, upper, lower).masked_fill(~mask, 0.0)
        y, signed = self._kkt(factor, -c, bound)
        Ry, off = self._off_bounds(y, bound, mask)
        size = y.abs().amax(dim=1)
        rough = off > SIGN_TOLERANCE * (1.0 + size)
        rough |= EPS * self._inverse_size * c.abs().amax(dim=1) > CANCELLED * size
        if bool(rough.any()):  # y is a small difference of large numbers there
            dy, ds = self._kkt_once(factor, -c - y @ self.Q - signed @ self.R, bound - Ry)
            y, signed = torch.where(rough[:, None], y + dy, y), torch.where(rough[:, None], signed + ds, signed)
            Ry, off = self._off_bounds(y, bound, mask)
        slack = torch.minimum(upper - Ry, Ry - lower) / self.norms
        opposite = (upper - lower) / self.norms
        gaps = torch.where(mask, torch.minimum(signed * side * self.norms, opposite), slack)
        lag = (y @ self.Q + c + signed @ self.R).abs().amax(dim=1)
        residual = lag / (1.0 + c.abs().amax(dim=1) + _most(signed.abs()))
        residual = torch.maximum(residual, off / (1.0 + y.abs().amax(dim=1)))
        margin = gaps.amin(dim=1) if gaps.shape[1] else torch.full_like(residual, torch.inf)
        return BatchedSolution(y, side, signed, margin, residual, 0, factor)

    def _off_bounds(self, y: Tensor, bound: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return R y (N, p), and how far active rows are from their bounds at most, (N,)."""
        Ry = y @ self.R.T
        return Ry, _most((Ry - bound).abs().div(self.norms).masked_fill(~mask, 0.0))

    def _certified(self, c: Tensor, solution: BatchedSolution) -> Tensor:
        """Return which members hold up: KKT signs with room to spare, small residual, sound factor, (N,)."""
        tolerance = SIGN_TOLERANCE * (1.0 + c.abs().amax(dim=1) + solution.y.abs().amax(dim=1))
        return solution.factor.sound(self.K) & (solution.margin > tolerance) & (solution.residual <= 1e-12)

    def _repair(self, c: Tensor, h: Tensor, solution: BatchedSolution, members: list[int]) -> BatchedSolution:
        """Replace the members that are not certified by what the single solver finds."""
        names = ("y", "side", "signed", "margin", "residual")
        parts = {name: getattr(solution, name).clone() for name in names}
        for i in members:
            single = self._solve_one(i, c, h)
            index, sides, _ = single.work
            rows = torch.from_numpy(index).to(self.device)
            parts["side"][i] = torch.zeros_like(parts["side"][i]).index_copy(0, rows, self._to(sides))
            strengths = self._to(sides * single.active_multipliers)
            parts["signed"][i] = torch.zeros_like(parts["signed"][i]).index_copy(0, rows, strengths)
            parts["y"][i] = self._to(single.y)
            parts["margin"][i], parts["residual"][i] = single.margin, single.residual
        factor = ActiveFactor.of(self.K, parts["side"] != 0)
        return BatchedSolution(**parts, fallbacks=len(members), factor=factor)

    def _to(self, array: Array) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def _solve_one(self, member: int, c: Tensor, h: Tensor) -> QPSolution:
        """Solve one member by the single solver; its errors name the member."""
        try:
            return self.single.solve(c[member].detach().cpu().numpy(), h[member].detach().cpu().numpy())
        except SSIGDError as error:
            raise type(error)(f"member {member}: {error}") from error

    def _check_margin(self, margin: Tensor) -> None:
        least = self.single.min_margin
        if least is not None and bool((margin < least).any()):
            member = int(margin.argmin())
            raise DegenerateError(
                f"member {member}: strict-complementarity margin {float(margin[member]):.3g} is below "
                f"min_margin={least:g}; perturb the linear term (q) or lower min_margin"
            )


def _most(values: Tensor) -> Tensor:
    return values.amax(dim=1) if values.shape[1] else values.new_zeros(len(values))
