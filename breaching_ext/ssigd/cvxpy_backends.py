"""Reference gradients through CVXPY: cvxpylayers, and central differences of re-solves.

Both need the extra: pip install "breaching-ext[ssigd]". The lower level is compiled once for each problem as
a DPP program whose parameters are the linear term c_l + Pᵀx + q and the right-hand side b − A x.

They are cross-checks of the backend "kkt" and share none of its code, so nothing is certified here: beyond what the
solver itself reports, there is no check of KKT signs, margin (`min_margin`) or LICQ, and a one-sided gradient, or one
of several, comes back without a word.
"""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from breaching_ext.errors import first_line
from breaching_ext.ssigd.arguments import check_number
from breaching_ext.ssigd.errors import InfeasibleError, NotCertifiedError, SSIGDError
from breaching_ext.ssigd.problem import QuadraticBilevelProblem
from breaching_ext.ssigd.rows import Array

# cvxpylayers' defaults (SCS at 1e-4, derivative by LSQR) give a gradient with an error around 1e-5. Tight
# tolerances and a factorised ("dense") derivative bring it to 1e-13. Clarabel does not: its interior-point
# solutions are not exactly complementary, and the derivative at such a point is wrong by about 1e-6 however
# small the tolerance.
ACCURATE_LAYER = {"mode": "dense", "eps_abs": 1e-12, "eps_rel": 1e-12, "max_iters": 100_000}
# OSQP's polish solves the KKT system of the active set, which makes the re-solves exact enough to be
# differenced.
ACCURATE_RESOLVE = {"eps_abs": 1e-10, "eps_rel": 1e-10, "polishing": True, "max_iter": 100_000}
FD_STEP = 1e-4


def available(package: str = "cvxpylayers") -> bool:
    """Return whether `package` (cvxpylayers or cvxpy) is installed."""
    return importlib.util.find_spec(package) is not None


def _require(package: str, backend: str) -> None:
    if not available(package):
        raise ImportError(
            f'backend={backend!r} needs {package}: pip install "breaching-ext[ssigd]", or use backend="kkt"'
        )


def _program(problem: QuadraticBilevelProblem) -> tuple[Any, Any, Any, Any]:
    """Compile the lower level once; return the CVXPY problem, its variable and its two parameters."""
    if "program" not in problem.cache:
        import cvxpy as cp

        y, linear, right = (
            cp.Variable(problem.dim_lower),
            cp.Parameter(problem.dim_lower),
            cp.Parameter(len(problem.b)),
        )
        root = np.linalg.cholesky(problem.solver.Q)
        objective = cp.Minimize(0.5 * cp.sum_squares(root.T @ y) + linear @ y)
        program = cp.Problem(objective, [problem.B.numpy() @ y <= right])
        problem.cache["program"] = (program, y, linear, right)
    return problem.cache["program"]


def cvxpy_lower_level(
    problem: QuadraticBilevelProblem,
    x: Tensor,
    q: Tensor | None = None,
    *,
    solver: str = "OSQP",
    **options: Any,
) -> Array:
    """Solve the lower level by CVXPY.

    Args:
        problem: the bilevel problem.
        x: (n,).
        q: perturbation, (p,), or None.
        solver: CVXPY's name of the solver, default OSQP.
        **options: the solver's options; default for OSQP is a tolerance of 1e-10 with polish.

    Returns:
        y, (p,).

    Raises:
        ImportError: cvxpy is not installed. InfeasibleError, NotCertifiedError: CVXPY reports no optimum, or does not
            know the solver or its options.
    """
    _require("cvxpy", "fd")
    import cvxpy as cp

    program, y, linear, right = _program(problem)
    linear.value = problem.linear_term(x, q).numpy()
    right.value = problem.right_hand_side(x).numpy()
    if not options and solver == "OSQP":
        options = ACCURATE_RESOLVE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "solution may be inaccurate" comes back as the status below
        try:
            program.solve(solver=solver, **options)
        except (cp.SolverError, TypeError) as error:
            raise NotCertifiedError(f"CVXPY fails with solver={solver!r}: {first_line(error)}") from error
    if program.status in ("infeasible", "infeasible_inaccurate"):
        raise InfeasibleError(f"no y satisfies A x + B y ≤ b at this x: CVXPY reports {program.status}")
    if y.value is None or program.status not in ("optimal", "optimal_inaccurate"):
        raise NotCertifiedError(f"CVXPY reports {program.status} for the lower level; try another solver")
    return np.asarray(y.value, dtype=float)


def fd_gradient(
    problem: QuadraticBilevelProblem,
    x: Tensor,
    q: Tensor | None = None,
    *,
    step: float = FD_STEP,
    **options: Any,
) -> Tensor:
    """Return ∇F(x) by central differences of 2n CVXPY solves, (n,): slow, and independent of our KKT algebra.

    F is quadratic between kinks, so the central difference has no truncation error there and its error is the
    solver's, divided by the step.

    Args:
        problem: the bilevel problem.
        x: (n,).
        q: perturbation, (p,), or None.
        step: difference step, default 1e-4.
        **options: passed to `cvxpy_lower_level`.
    """
    check_number("step", step, above=0)
    gradient = torch.empty(problem.dim, dtype=torch.float64)
    for i in range(problem.dim):
        values = []
        for sign in (1.0, -1.0):
            moved = x.clone()
            moved[i] += sign * step
            y = torch.from_numpy(cvxpy_lower_level(problem, moved, q, **options))
            values.append(float(problem.upper_objective(moved, y)))
        gradient[i] = (values[0] - values[1]) / (2.0 * step)
    return gradient


def cvxpylayers_solve(
    problem: QuadraticBilevelProblem,
    x: Tensor,
    q: Tensor | None = None,
    *,
    solver_args: dict[str, Any] | None = None,
) -> Tensor:
    """Return y*(x) through cvxpylayers, (p,), differentiable in x and q.

    Args:
        problem: the bilevel problem.
        x: (n,).
        q: perturbation, (p,), or None.
        solver_args: passed to the layer; default SCS at 1e-12 with a dense derivative. {} gives cvxpylayers'
            own defaults (SCS at 1e-4, LSQR).

    Raises:
        ImportError: cvxpylayers is not installed. InfeasibleError, NotCertifiedError: SCS reports no optimum, or does
            not know an argument. SSIGDError: there are no constraints, which cvxpylayers does not take.
    """
    _require("cvxpylayers", "cvxpylayers")
    if not len(problem.b):
        raise SSIGDError('backend="cvxpylayers" needs at least one constraint; use backend="kkt"')
    if "layer" not in problem.cache:
        from cvxpylayers.torch import CvxpyLayer

        program, y, linear, right = _program(problem)
        problem.cache["layer"] = CvxpyLayer(program, parameters=[linear, right], variables=[y])
    linear_term, right_hand_side = problem.linear_term(x, q), problem.right_hand_side(x)
    arguments = dict(ACCURATE_LAYER if solver_args is None else solver_args)
    if not (torch.is_grad_enabled() and (linear_term.requires_grad or right_hand_side.requires_grad)):
        arguments.pop("mode", None)  # of the derivative; without one the layer passes it on to SCS, which fails
    try:
        (solution,) = problem.cache["layer"](linear_term, right_hand_side, solver_args=arguments)
    except Exception as error:
        if type(error).__name__ not in ("SolverError", "TypeError"):  # the first is diffcp's, which may be missing
            raise
        if "infeasible" in str(error):
            raise InfeasibleError("no y satisfies A x + B y ≤ b at this x: SCS reports infeasible") from error
        raise NotCertifiedError(f"cvxpylayers fails with {arguments}: {first_line(error)}") from error
    return solution


def cvxpylayers_gradient(
    problem: QuadraticBilevelProblem,
    x: Tensor,
    q: Tensor | None = None,
    *,
    solver_args: dict[str, Any] | None = None,
) -> Tensor:
    """Return ∇F(x) by autograd through `cvxpylayers_solve`, (n,)."""
    x = x.detach().clone().requires_grad_()
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of cvxpylayers 1.2 under NumPy 2
        y = cvxpylayers_solve(problem, x, q, solver_args=solver_args)
        (gradient,) = torch.autograd.grad(problem.upper_objective(x, y), x)
    return gradient
