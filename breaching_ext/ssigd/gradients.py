"""The implicit gradient ∇F(x) = ∇ₓf + (∂y*/∂x)ᵀ ∇ᵧf through the KKT system, one x at a time or a batch.

Source: Khanduri et al. (ICML 2023), Lemma 2.4; with coupled constraints arXiv 2504.04545, section 2.2. The
Jacobian of y* is never formed: one adjoint solve gives the product that the chain rule needs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from breaching_ext.ssigd.arguments import check_tensor
from breaching_ext.ssigd.errors import SSIGDError
from breaching_ext.ssigd.problem import QuadraticBilevelProblem
from breaching_ext.ssigd.rows import Array
from breaching_ext.ssigd.solution import QPSolution


def adjoint_gradient(
    problem: QuadraticBilevelProblem,
    x: Array,
    solution: QPSolution,
    *,
    y: Array | None = None,
    noise: tuple[Array, Array] | None = None,
    warn: bool = True,
) -> Array:
    """Return ∇F(x) from a solved lower level.

    Args:
        problem: the bilevel problem.
        x: upper-level point, (n,).
        solution: lower-level solution at x; its active set defines the Jacobian.
        y: where ∇f is taken, (p,); default the solution itself. An inexact ŷ with the right active set goes
            here.
        noise: added to ∇ₓf (n,) and ∇ᵧf (p,): a stochastic gradient f̃(·; ξ).
        warn: False where a one-sided gradient at a kink is meant, default True.

    Returns:
        The implicit gradient, (n,).
    """
    grad_x, grad_y = problem.upper_gradients(x, solution.y if y is None else y)
    if noise is not None:
        grad_x, grad_y = grad_x + noise[0], grad_y + noise[1]
    a, b = problem.solver.adjoint(solution, grad_y, warn=warn)
    gradient = grad_x - problem.arrays.P @ a
    if problem.coupled_constraints:
        gradient = gradient - b @ problem.arrays.A[solution.active]
    return gradient


def kkt_gradient(problem: QuadraticBilevelProblem, x: Tensor, q: Tensor | None = None) -> Tensor:
    """Return ∇F(x) by one certified solve and one adjoint solve, (n,)."""
    point = x.numpy()
    solution = problem.certified_solution(point, None if q is None else q.numpy())
    return torch.from_numpy(adjoint_gradient(problem, point, solution))


def batched_implicit_gradient(
    problem: QuadraticBilevelProblem,
    x: Tensor,
    q: Tensor | None = None,
    *,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return ∇F at many points, or for many perturbations, at once.

    Args:
        problem: the bilevel problem.
        x: points, (N, n), or one point (n,) for many q.
        q: perturbations, (N, p), one (p,) for all, or None.
        device: where the lower levels are solved, default CPU.

    Returns:
        The gradients, (N, n), float64, on `device`.
    """
    device = torch.device(device)
    _check_shapes(problem, x, q)
    count = x.shape[0] if x.ndim == 2 else (q.shape[0] if q is not None and q.ndim == 2 else 1)
    x = x.detach().cpu().to(torch.float64).expand(count, problem.dim)
    q = None if q is None else q.detach().cpu()
    batched = problem.layer.batched(device)
    linear, right = problem.linear_term(x, q).to(device), problem.right_hand_side(x).to(device)
    solution = batched.solve(linear, right)
    grad_x, grad_y = problem.upper_gradients(x, solution.y.to(x.device))
    a, b = batched.adjoint(solution, grad_y.to(device))
    gradient = grad_x.to(device) - a @ problem.P.T.to(device)
    if problem.coupled_constraints:
        gradient = gradient - batched.row_values(b, solution.side) @ problem.A.to(device)
    return gradient


def _check_shapes(problem: QuadraticBilevelProblem, x: Tensor, q: Tensor | None) -> None:
    counts: set[int] = set()
    for name, value, width in (("x", x, problem.dim), ("q", q, problem.dim_lower)):
        if value is None:
            continue
        check_tensor(name, value, (width,), ("N", width))
        counts.update(value.shape[:-1])
    if len(counts) > 1:
        raise SSIGDError(f"there are {x.shape[0]} points x and {len(q) if q is not None else 0} perturbations q")


def smoothed_gradient(
    problem: QuadraticBilevelProblem, x: Tensor, q: Tensor, *, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Return a Monte-Carlo estimate of ∇E_q[F_q(x)] over q (N, p), and its standard error; (n,) each.

    Raises:
        SSIGDError: fewer than two perturbations.
    """
    check_tensor("q", q, (problem.dim_lower,), ("N", problem.dim_lower))
    if q.ndim != 2 or len(q) < 2:
        raise SSIGDError(f"q has shape {tuple(q.shape)}; expected (N, {problem.dim_lower}) with N of at least 2")
    gradients = batched_implicit_gradient(problem, x, q, device=device)
    return gradients.mean(dim=0), gradients.std(dim=0) / len(q) ** 0.5


def coupling_free_gradient(problem: QuadraticBilevelProblem, x: Tensor, q: Tensor | None = None) -> Tensor:
    """Return ∇ₓf at (x, y*(x)) alone, which takes the lower level not to depend on x, (n,).

    This is the (wrong) gradient of a prototype whose lower level did not contain x. It is here to be
    measured.
    """
    return problem.upper_gradients(x, torch.from_numpy(problem.certified_solution(x, q).y))[0]
