"""Instances with a known optimum or from the literature, and independent ways to compute their optimum."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import daqp
import numpy as np
import torch
from torch import Tensor

from breaching_ext.ssigd.arguments import check_number, check_whole
from breaching_ext.ssigd.errors import InfeasibleError, NotCertifiedError, SSIGDError
from breaching_ext.ssigd.problem import QuadraticBilevelProblem
from breaching_ext.ssigd.reference import random_spd
from breaching_ext.ssigd.rows import Array

MAX_ENUMERATION = 200_000


@dataclass(frozen=True)
class Optimum:
    """A global optimum: x (n,), y (p,), and the objective f(x, y)."""

    x: Tensor
    y: Tensor
    objective: float


def convex_instance(dim: int, seed: int = 0) -> QuadraticBilevelProblem:
    """Return a problem whose F is strongly convex and whose optimum is a single-level QP.

    Q_lower is diagonal and the only constraints are y ≤ 1, so yᵢ = min(1, −(c_l + Pᵀx)ᵢ/dᵢ) is concave in x;
    with c_upper < 0 the objective c_uᵀ y*(x) is convex, with a kink wherever a bound becomes active.

    Args:
        dim: number of variables of either level.
        seed: seed of the data.
    """
    check_whole("dim", dim, 1)
    check_whole("seed", seed, 0)
    rng = np.random.default_rng(seed)
    return QuadraticBilevelProblem(
        Q_upper=random_spd(rng, dim, 4.0), x_target=rng.uniform(-1.0, 1.0, dim),
        c_upper=-rng.uniform(0.5, 2.0, dim), Q_lower=np.diag(rng.uniform(1.0, 4.0, dim)),
        c_lower=rng.standard_normal(dim), P=2.0 * rng.standard_normal((dim, dim)) / np.sqrt(dim),
        A=np.zeros((dim, dim)), B=np.eye(dim), b=np.ones(dim), x_lower=-2.0, x_upper=2.0,
    )  # fmt: skip


def convex_optimum(problem: QuadraticBilevelProblem) -> Optimum:
    """Return the optimum of a `convex_instance` from one QP in (x, y).

    Because c_upper < 0 the upper level wants y large, and y*(x) is the largest y with y ≤ 1 and Q_lower y ≤
    −(c_l + Pᵀx): so the lower level may be replaced by these inequalities.

    Raises:
        SSIGDError: the problem is not of this form. NotCertifiedError: the QP was not solved.
    """
    diagonal = problem.Q_lower.diagonal()
    n, p = problem.dim, problem.dim_lower
    one_sided = torch.equal(problem.B, torch.eye(p, dtype=torch.float64)) and not problem.coupled_constraints
    plain = not bool(problem.R.any()) and not bool(problem.Q_upper_y.any())
    diagonal_only = torch.equal(problem.Q_lower, torch.diag(diagonal))
    if not (one_sided and plain and diagonal_only and bool((problem.c_upper < 0).all())):
        raise SSIGDError("expected a diagonal Q_lower, constraints y ≤ b, c_upper < 0 and f linear in y")
    d = diagonal.numpy()
    H = np.zeros((n + p, n + p))
    H[:n, :n] = problem.arrays.hessian
    f = np.r_[-problem.arrays.hessian @ problem.x_target.numpy(), problem.c_upper.numpy()]
    rows = np.vstack([np.eye(n + p), np.c_[problem.P.numpy().T, np.diag(d)]])
    upper = np.r_[problem.x_upper.numpy(), problem.b.numpy(), -problem.c_lower.numpy()]
    lower = np.r_[problem.x_lower.numpy(), np.full(2 * p, -1e30)]
    # daqp wants a positive definite Hessian, and may cycle where it hardly is; the exact solve on the active rows that
    # it finds removes the regularisation, and says whether they are the right ones.
    for regularisation in (1e-9, 1e-8, 1e-7, 1e-6):
        regularised = H + np.diag(np.r_[np.zeros(n), np.full(p, regularisation)])
        _, _, flag, info = daqp.solve(regularised, f, rows[n + p :], upper, lower, primal_tol=1e-12)
        z = _optimum_on_active_rows(H, f, rows, lower, upper, info["lam"]) if flag == 1 else None
        if z is not None:
            x, y = torch.from_numpy(z[:n]), torch.from_numpy(z[n:])
            return Optimum(x, y, float(problem.upper_objective(x, y)))
    raise NotCertifiedError(f"daqp stopped with exit flag {flag} on the single-level QP, or without its optimum")


def _optimum_on_active_rows(
    H: Array, f: Array, rows: Array, lower: Array, upper: Array, sides: Array, tolerance: float = 1e-9
) -> Array | None:
    """Minimise ½zᵀHz + fᵀz on the rows with a side; None where other rows or signs say that it is not the optimum."""
    index = np.flatnonzero(sides)
    active, sign = rows[index], np.sign(sides[index])
    bounds = np.where(sign > 0, upper[index], lower[index])
    kkt = np.block([[H, active.T], [active, np.zeros((len(index), len(index)))]])
    try:
        z, multipliers = np.split(np.linalg.solve(kkt, np.r_[-f, bounds]), [len(f)])
    except np.linalg.LinAlgError:
        return None
    excess = np.maximum(rows @ z - upper, lower - rows @ z).max() / (1.0 + np.abs(z).max())
    wrong = (-sign * multipliers).max(initial=0.0) / (1.0 + np.abs(multipliers).max(initial=0.0))
    return z if max(excess, wrong) <= tolerance else None


def enumerate_optimum(problem: QuadraticBilevelProblem) -> Optimum:
    """Return the global optimum by trying every active set of the lower level.

    On one active set y*(x) is affine, so F is quadratic, and the x for which the set is right form a
    polyhedron: a QP for each. The least of these optima is the global one.

    Raises:
        SSIGDError: f is bilinear (the pieces may be non-convex), X is unbounded, or there are too many sets.
        InfeasibleError: no active set is right anywhere in X.
    """
    if bool(problem.R.any()) or not bool(torch.isfinite(torch.cat([problem.x_lower, problem.x_upper])).all()):
        raise SSIGDError("expected f without a bilinear term and a bounded box X")
    rows = problem.solver.rows
    choices = [(0, 1, -1) if paired else (0, 1) for paired in rows.paired]
    count = int(np.prod([len(choice) for choice in choices], dtype=float))
    if count > MAX_ENUMERATION:
        raise SSIGDError(f"{count} active sets are too many to try; expected at most {MAX_ENUMERATION}")
    best: Optimum | None = None
    for sides in product(*choices):
        found = _piece_optimum(problem, np.array(sides))
        if found is not None and (best is None or found.objective < best.objective):
            best = found
    if best is None:
        raise InfeasibleError("no active set of the lower level is right anywhere in X; check b and the box X")
    return best


_INFEASIBLE = -1  # daqp's exit flag


def _piece_optimum(problem: QuadraticBilevelProblem, side: Array) -> Optimum | None:
    """Return the optimum over the x for which `side` is the active set, or None where there are none."""
    qp, data = problem.solver, problem.arrays
    index = np.flatnonzero(side)
    if len(index) > qp.n or np.linalg.matrix_rank(qp.R[index]) < len(index):
        return None
    sign = side[index][:, None]
    of_h = qp.rows.row_of(index, side[index])
    kkt = np.block([[qp.Q, qp.R[index].T], [qp.R[index], np.zeros((len(index), len(index)))]])
    right = np.vstack([-data.P.T, -(sign * data.A[of_h])])
    slope = np.linalg.solve(kkt, right)  # of (y, λ) in x
    offset = np.linalg.solve(kkt, np.r_[-data.c_lower, sign[:, 0] * data.b[of_h]])
    J, y0 = slope[: qp.n], offset[: qp.n]
    inactive = np.setdiff1d(np.arange(qp.m), of_h)
    rows = np.vstack([-sign * slope[qp.n :], qp.G[inactive] @ J + data.A[inactive]])
    upper = np.r_[problem.x_upper.numpy(), sign[:, 0] * offset[qp.n :], data.b[inactive] - qp.G[inactive] @ y0]
    lower = np.r_[problem.x_lower.numpy(), np.full(len(rows), -1e30)]
    H = data.hessian + J.T @ data.hessian_y @ J
    f = J.T @ (data.c_upper + data.hessian_y @ y0) - data.hessian @ data.x_target
    x, _, flag, _ = daqp.solve(H, f, np.ascontiguousarray(rows), upper, lower, primal_tol=1e-10)
    if flag == _INFEASIBLE:
        return None
    if flag != 1:
        raise NotCertifiedError(f"daqp stopped with exit flag {flag} on a piece of F; it must be convex on each")
    y = J @ x + y0
    return Optimum(torch.from_numpy(x), torch.from_numpy(y), float(problem.upper_objective(x, y)))


def dsblo_example(upper: int, lower: int, constraints: int, seed: int = 0, low: float = 0.0) -> QuadraticBilevelProblem:
    """Return the numerical example of arXiv 2504.04545, section 4.1.

    f = ‖x‖² + 0.1 xᵀQ₁y + ‖y‖² + 1ᵀx + 1ᵀy and g = ‖x‖² + xᵀQ₂y + ‖y‖², with A x + B y ≤ b and x unbounded.
    The paper draws all matrices and b from "the uniform distribution" without its range. On [0, 1] hardly any
    constraint is ever active; on [−1, 1] several are, and F has kinks.

    Args:
        upper, lower, constraints: d_u, d_l and k; the paper has 10, 10, 5 and 50, 50, 10.
        seed: seed of the data.
        low: entries of Q₁, Q₂, A and B are uniform on [low, 1], default 0; those of b on [0, 1].
    """
    for name, value, least in (
        ("upper", upper, 1),
        ("lower", lower, 1),
        ("constraints", constraints, 0),
        ("seed", seed, 0),
    ):
        check_whole(name, value, least)
    check_number("low", low, below=1)
    rng = np.random.default_rng(seed)
    Q1, Q2 = rng.uniform(low, 1.0, (upper, lower)), rng.uniform(low, 1.0, (upper, lower))
    B, A = rng.uniform(low, 1.0, (constraints, lower)), rng.uniform(low, 1.0, (constraints, upper))
    return QuadraticBilevelProblem(
        Q_upper=2.0 * np.eye(upper), x_target=np.full(upper, -0.5), constant=-0.25 * upper,
        c_upper=np.ones(lower), Q_upper_y=2.0 * np.eye(lower), R=0.1 * Q1,
        Q_lower=2.0 * np.eye(lower), c_lower=np.zeros(lower), P=Q2,
        A=A, B=B, b=rng.uniform(size=constraints),
    )  # fmt: skip
