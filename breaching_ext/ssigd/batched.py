"""The certified QP for a batch of (c, h) with Q and G shared: many x, or many perturbations q, at once.

Pure torch, on any device: a short ADMM run guesses the active sets (see `admm_guess`), active-set steps settle them
with exact KKT solves (see `batched_kkt`), and members that are not certified after that are solved one by one by
`ParametricQP`, which raises the named error where a member has no solution.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from breaching_ext.ssigd.active_factor import ActiveFactor
from breaching_ext.ssigd.admm_guess import ADMMGuess
from breaching_ext.ssigd.arguments import check_tensor, check_whole
from breaching_ext.ssigd.batched_kkt import BatchedKKT
from breaching_ext.ssigd.errors import DegenerateError, NonFiniteError, SSIGDError
from breaching_ext.ssigd.kkt_point import CLEAR, TINY
from breaching_ext.ssigd.kkt_system import EPS, SIGN_TOLERANCE, cancels
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
        kink: as in QPSolution, (N,).
        fallbacks: number of members that were solved one by one.
        factor: factors of the active Schur complements, of scaled rows.
    """

    y: Tensor
    side: Tensor
    signed: Tensor
    margin: Tensor
    residual: Tensor
    kink: Tensor
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
        check_whole("admm_steps", admm_steps, 0)
        check_whole("polish_steps", polish_steps, 0)
        self.polish_steps = polish_steps
        self.kkt = BatchedKKT(single.kkt, self.device)
        rows, scaling = single.rows, single.scaling
        self._variables, self._rows = self._to(scaling.variables), self._to(scaling.rows)
        self._units = self._to(single.margin_units)
        self.upper_of = torch.from_numpy(rows.upper_of).to(self.device)
        self.lower_of = torch.from_numpy(rows.lower_of).to(self.device)
        self.pairs = torch.from_numpy(rows.paired.nonzero()[0]).to(self.device)
        self._guess = ADMMGuess(self.kkt.Q, self.kkt.R, self.kkt.K, admm_steps)

    def solve(self, c: Tensor, h: Tensor) -> BatchedSolution:
        """Solve and certify all members.

        Args:
            c: linear terms, (N, n).
            h: right-hand sides, (N, m).

        Raises:
            SSIGDError and its subclasses: see errors.py; the message names the first member at fault.
        """
        self._check(c, h)
        c, h = c.to(torch.float64), h.to(torch.float64)
        lower, upper = self._sides(h)
        self._check_gaps(c, h, lower, upper)
        scaled = c * self._variables
        free = -(scaled @ self.kkt.T)  # R y without constraints, (N, p)
        side = self._guess.sides(scaled, free, lower, upper)
        side, factor, settled = self.kkt.settle(free, lower, upper, side, scaled, self.polish_steps)
        solution, sound = self._assemble(scaled, lower, upper, side, factor)
        certified = settled & sound
        if not bool(certified.all()):
            solution = self._repair(c, h, solution, (~certified).nonzero()[:, 0].tolist())
        self._check_margin(solution.margin)
        return solution

    def adjoint(self, solution: BatchedSolution, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return a (N, n) and b (N, p) of the adjoint KKT systems for cotangents v (N, n).

        As ParametricQP.adjoint, but b is signed like `solution.signed`: it is the derivative with respect
        to the active bound of R y.
        """
        if bool(solution.kink.any()):
            self.single.warn_kink(True, float(solution.margin[solution.kink].min()))
        v = v * self._variables
        a, b = self.kkt.solve(solution.factor, v, torch.zeros_like(solution.signed))
        off = _most((a @ self.kkt.R.T).abs().masked_fill(solution.side == 0, 0.0))
        reach = (v @ self.kkt.Q_inverse).abs().amax(dim=1)  # of a where nothing is active
        vertex = (solution.side != 0).sum(dim=1) == self.single.n  # a is zero there, whatever rounding says
        small = ~vertex & cancels(1.0, reach, a.abs().amax(dim=1))
        sound = (off <= SIGN_TOLERANCE * reach) & ~small  # not so with a failed factor, whose numbers are not finite
        for member in (~sound).nonzero()[:, 0].tolist():
            index = solution.side[member].nonzero()[:, 0]
            one, other = self.single.adjoint_on(index.cpu().numpy(), v[member].cpu().numpy())
            a[member], b[member] = self._to(one), torch.zeros_like(b[member]).index_copy(0, index, self._to(other))
        return (a * self._variables).masked_fill(vertex[:, None], 0.0), b * self._rows

    def row_values(self, signed: Tensor, side: Tensor) -> Tensor:
        """Spread values b over two-sided rows (N, p) over the rows of G, in the orientation of G: (N, m)."""
        rows = signed.new_zeros(len(signed), self.single.m)
        rows[:, self.upper_of] = torch.where(side > 0, signed, 0.0)
        rows[:, self.lower_of[self.pairs]] = torch.where(side < 0, -signed, 0.0)[:, self.pairs]
        return rows

    def _check(self, c: Tensor, h: Tensor) -> None:
        n, m = self.single.n, self.single.m
        check_tensor("c", c, finite=False)
        check_tensor("h", h, finite=False)
        if c.ndim != 2 or c.shape[1] != n or h.shape != (c.shape[0], m):
            raise SSIGDError(f"c has shape {tuple(c.shape)} and h {tuple(h.shape)}; expected (N, {n}) and (N, {m})")
        for name, value in (("c", c), ("h", h)):
            bad = (~torch.isfinite(value)).any(dim=1)
            if bool(bad.any()):
                raise NonFiniteError(f"member {int(bad.nonzero()[0, 0])}: {name} holds NaN or infinity")

    def _sides(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scaled bounds of the two-sided rows."""
        upper = h[:, self.upper_of]
        lower = torch.full_like(upper, -torch.inf)
        lower[:, self.pairs] = -h[:, self.lower_of[self.pairs]]
        return lower * self._rows, upper * self._rows

    def _check_gaps(self, c: Tensor, h: Tensor, lower: Tensor, upper: Tensor) -> None:
        """Let the single solver raise its error where opposite rows cross or leave no room."""
        if not len(self.pairs):
            return
        lower, upper = lower[:, self.pairs], upper[:, self.pairs]
        narrow = (upper - lower <= SIGN_TOLERANCE * (lower.abs() + upper.abs())).any(dim=1)
        if bool(narrow.any()):
            member = int(narrow.nonzero()[0, 0])
            self._solve_one(member, c, h)

    def _assemble(
        self, c: Tensor, lower: Tensor, upper: Tensor, side: Tensor, factor: ActiveFactor
    ) -> tuple[BatchedSolution, Tensor]:
        """Return the solution on these sides, in the caller's units, and which members hold up, (N,).

        These have a sound factor, a small residual, and signs that are far from zero (`KKTPoint.clear`).
        """
        mask = side != 0
        bound = torch.where(side > 0, upper, lower).masked_fill(~mask, 0.0)
        y, signed = self.kkt.solve(factor, -c, bound)
        Ry, off = self._off_bounds(y, bound, mask)
        c_size, y_size = c.abs().amax(dim=1), y.abs().amax(dim=1)
        size = torch.maximum(c_size, y_size)
        bound_size = _most(bound.abs())
        reach = torch.maximum(y_size, torch.where(bound_size > 0, bound_size, EPS * size))
        rough = (off > SIGN_TOLERANCE * reach) | cancels(self.kkt.inverse_size, c_size, y_size)
        if bool(rough.any()):  # y is a small difference of large numbers there
            dy, ds = self.kkt.once(factor, -c - y @ self.kkt.Q - signed @ self.kkt.R, bound - Ry)
            y, signed = torch.where(rough[:, None], y + dy, y), torch.where(rough[:, None], signed + ds, signed)
            Ry, off = self._off_bounds(y, bound, mask)
        force, slack = signed * side, torch.minimum(upper - Ry, Ry - lower)
        least = _least(torch.where(mask, force, slack))
        opposite = torch.minimum(force * self._units, (upper - lower) / self._units)
        margin = _least(torch.where(mask, opposite, slack / self._units))
        lag = (y @ self.kkt.Q + c + signed @ self.kkt.R).abs().amax(dim=1)
        scale = torch.maximum(size, _most(signed.abs())).clamp_min(TINY)
        residual = torch.maximum(lag / scale, off / reach.clamp_min(TINY))
        sound = factor.sound(self.kkt.K) & (least > CLEAR * size) & (residual <= 1e-12)
        kink = torch.zeros_like(sound)  # signs that are clear are far from zero
        y, signed = y * self._variables, signed * self._rows
        return BatchedSolution(y, side, signed, margin, residual, kink, 0, factor), sound

    def _off_bounds(self, y: Tensor, bound: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return R y (N, p), and how far active rows are from their bounds at most, (N,)."""
        Ry = y @ self.kkt.R.T
        return Ry, _most((Ry - bound).abs().masked_fill(~mask, 0.0))

    def _repair(self, c: Tensor, h: Tensor, solution: BatchedSolution, members: list[int]) -> BatchedSolution:
        """Replace the members that are not certified by what the single solver finds."""
        names = ("y", "side", "signed", "margin", "residual", "kink")
        parts = {name: getattr(solution, name).clone() for name in names}
        for i in members:
            single = self._solve_one(i, c, h)
            index, sides, _ = single.work
            rows = torch.from_numpy(index).to(self.device)
            parts["side"][i] = torch.zeros_like(parts["side"][i]).index_copy(0, rows, self._to(sides))
            strengths = self._to(sides * single.active_multipliers)
            parts["signed"][i] = torch.zeros_like(parts["signed"][i]).index_copy(0, rows, strengths)
            parts["y"][i] = self._to(single.y)
            parts["margin"][i], parts["residual"][i], parts["kink"][i] = single.margin, single.residual, single.kink
        factor = ActiveFactor.of(self.kkt.K, parts["side"] != 0)
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


def _least(values: Tensor) -> Tensor:
    return values.amin(dim=1) if values.shape[1] else values.new_full((len(values),), torch.inf)
