"""A certified finish for convex F: cutting planes over the active sets that a run has found.

Where the optimum lies on a kink of F, a subgradient method with steps 1/(μ(r+1)) is slow (a gap of
O(log T / T) is what Khanduri et al. promise): its iterates jump between the pieces that meet there. Where f
is linear in y, each of these pieces is known exactly from one gradient: F is ½ (x−x_t)ᵀQ_u(x−x_t) plus the
maximum of one affine function for each active set. Minimising over the pieces seen so far is a QP (Kelley's
method with an exact quadratic part); its value is a lower bound of F, so the result carries a gap that needs
no knowledge of the optimum.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import daqp
import numpy as np
import torch
from torch import Tensor

from breaching_ext.ssigd.arguments import check_number, check_tensor, check_whole
from breaching_ext.ssigd.errors import NotCertifiedError, SSIGDError
from breaching_ext.ssigd.gradients import adjoint_gradient
from breaching_ext.ssigd.problem import QuadraticBilevelProblem
from breaching_ext.ssigd.rows import UNBOUNDED, Array

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CertifiedPoint:
    """Result of the finish.

    Attributes:
        x: best point, (n,).
        objective: F(x) at the unperturbed y*.
        lower_bound: a lower bound of F over X, valid where F is convex.
        gradients: gradient evaluations spent.
    """

    x: Tensor
    objective: float
    lower_bound: float
    gradients: int

    @property
    def gap(self) -> float:
        """Certified bound on F(x) − min F."""
        return self.objective - self.lower_bound


def certified_finish(
    problem: QuadraticBilevelProblem,
    points: Iterable[Tensor],
    *,
    tolerance: float = 1e-9,
    max_gradients: int = 50,
) -> CertifiedPoint:
    """Minimise the model from the pieces at `points`, adding the piece at its minimiser until the gap closes.

    Args:
        problem: F must be convex (the caller knows; for instance `convex_instance`), with f linear in y and
            Q_upper positive definite.
        points: where the model starts, (n,) each: the last iterate and the average of a run, say.
        tolerance: certified gap to stop at, default 1e-9.
        max_gradients: most gradients to spend, default 50.

    Returns:
        The best point. Where the model or a lower level on the way cannot be solved, the log says so and the bound
        is what it was by then (minus infinity before the first model).

    Raises:
        SSIGDError: f is not linear in y, Q_upper is singular, or there is no point, or no gradient left for the
            model; or the lower level cannot be solved at one of `points`.
    """
    check_finish(problem)
    check_number("tolerance", tolerance, least=0)
    check_whole("max_gradients", max_gradients, 2)
    planes: dict[tuple[int, ...], tuple[Array, float]] = {}
    given = list(points)
    for point in given:
        check_tensor("a point", point, (problem.dim,))
    starts = [point.detach().to("cpu", torch.float64).numpy() for point in given]
    if not starts:
        raise SSIGDError("expected at least one point")
    if not len(starts) < max_gradients:
        raise SSIGDError(f"expected 1 to {max_gradients - 1} points for max_gradients={max_gradients}")
    values = [_add_plane(problem, x, planes) for x in starts]
    objective, best = min(values, key=lambda value: value[0])
    spent, bound = len(values), -np.inf
    while spent < max_gradients and objective - bound > tolerance:
        try:
            x, bound = _minimise_model(problem, planes)
            value, _ = _add_plane(problem, x, planes)
        except SSIGDError as error:
            logger.warning("The finish ends after %d gradients with a gap of %.1e: %s", spent, objective - bound, error)
            break
        spent += 1
        if value < objective:
            objective, best = value, x
    return CertifiedPoint(torch.from_numpy(best.copy()), objective, float(bound), spent)


def check_finish(problem: QuadraticBilevelProblem) -> None:
    """Raise SSIGDError where the finish does not apply: f is not linear in y, or Q_upper is singular."""
    base = QuadraticBilevelProblem
    if type(problem).upper_objective is not base.upper_objective:
        raise SSIGDError(f"{type(problem).__name__} has an upper objective of its own; the finish knows the quadratic")
    if bool(problem.Q_upper_y.any()) or bool(problem.R.any()):
        raise SSIGDError("expected f linear in y: Q_upper_y and R must be zero")
    if not float(np.linalg.eigvalsh(problem.arrays.hessian)[0]) > 0:
        raise SSIGDError("expected a positive definite Q_upper")


def _add_plane(
    problem: QuadraticBilevelProblem, x: Array, planes: dict[tuple[int, ...], tuple[Array, float]]
) -> tuple[float, Array]:
    """Add the affine piece of the active set at x; return F(x) and x."""
    data, solution = problem.arrays, problem.certified_solution(x)
    d = x - data.x_target
    objective = float(problem.upper_objective(x, solution.y))
    slope = adjoint_gradient(problem, x, solution, warn=False) - data.hessian @ d
    offset = objective - 0.5 * d @ data.hessian @ d - slope @ x
    planes[tuple(sorted(solution.active.tolist()))] = (slope, float(offset))
    return objective, x


def _minimise_model(
    problem: QuadraticBilevelProblem, planes: dict[tuple[int, ...], tuple[Array, float]]
) -> tuple[Array, float]:
    """Return the minimiser of the model over X, and a lower bound of its value.

    The bound is the value of the Lagrangian dual at daqp's multipliers, made to sum to one: weak duality
    holds for any such multipliers, so rounding in the solver cannot make the bound wrong.
    """
    data, n = problem.arrays, problem.dim
    slopes = np.array([slope for slope, _ in planes.values()])
    offsets = np.array([offset for _, offset in planes.values()])
    H = np.zeros((n + 1, n + 1))
    H[:n, :n] = data.hessian
    f = np.r_[-data.hessian @ data.x_target, 1.0]
    lower_x, upper_x = problem.x_lower.numpy(), problem.x_upper.numpy()
    upper = np.r_[np.minimum(upper_x, UNBOUNDED), UNBOUNDED, -offsets]
    lower = np.r_[np.maximum(lower_x, -UNBOUNDED), -UNBOUNDED, np.full(len(planes), -UNBOUNDED)]
    z, _, flag, info = daqp.solve(H, f, np.c_[slopes, -np.ones(len(planes))], upper, lower)
    if flag != 1:
        raise NotCertifiedError(f"daqp stopped with exit flag {flag} on the cutting-plane model; rescale the problem")
    weights = np.maximum(info["lam"][n + 1 :], 0.0)
    weights /= weights.sum()
    x = np.clip(z[:n], lower_x, upper_x)
    return x, _dual_value(problem, weights @ slopes, float(weights @ offsets), x)


def _dual_value(problem: QuadraticBilevelProblem, slope: Array, offset: float, x: Array) -> float:
    """Return a lower bound of the minimum over X of the quadratic part plus one plane, from around x."""
    data = problem.arrays
    d = x - data.x_target
    gradient = data.hessian @ d + slope
    mu = float(np.linalg.eigvalsh(data.hessian)[0])
    lower, upper = problem.x_lower.numpy(), problem.x_upper.numpy()
    step = np.clip(-gradient / mu, lower - x, upper - x)
    return float(0.5 * d @ data.hessian @ d + slope @ x + offset + gradient @ step + 0.5 * mu * step @ step)
