"""One switch for the three ways to compute the implicit gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from breaching_ext.ssigd import cvxpy_backends
from breaching_ext.ssigd.errors import NonFiniteError, SSIGDError
from breaching_ext.ssigd.gradients import kkt_gradient
from breaching_ext.ssigd.problem import QuadraticBilevelProblem

GRADIENTS: dict[str, Callable[..., Tensor]] = {
    "kkt": kkt_gradient,
    "cvxpylayers": cvxpy_backends.cvxpylayers_gradient,
    "fd": cvxpy_backends.fd_gradient,
}


def check_backend(backend: str) -> str:
    """Return `backend`, or raise SSIGDError that names the valid ones."""
    if backend not in GRADIENTS:
        raise SSIGDError(f"backend={backend!r} is unknown; expected one of {tuple(GRADIENTS)}")
    return backend


def implicit_gradient(
    problem: QuadraticBilevelProblem, x: Tensor, q: Tensor | None = None, backend: str = "kkt", **options: Any
) -> Tensor:
    """Return ∇F(x), the gradient of F(x) = f(x, y*(x)).

    Args:
        problem: the bilevel problem.
        x: where, (n,).
        q: linear perturbation of the lower level, (p,), or None for none.
        backend: "kkt" (default) solves by daqp and differentiates exactly by one adjoint KKT solve;
            "cvxpylayers" differentiates CVXPY's cone program by autograd; "fd" takes central differences of
            CVXPY re-solves. The last two need the extra [ssigd].
        **options: of the backend: solver_args (cvxpylayers); step, solver and the solver's options (fd).

    Returns:
        The gradient, (n,), float64, on the CPU.

    Raises:
        SSIGDError and its subclasses: see errors.py. ImportError: the extra is missing.
    """
    gradient = GRADIENTS[check_backend(backend)]
    x = x.detach().to("cpu", torch.float64)
    q = None if q is None else q.detach().to("cpu", torch.float64)
    _check_point(problem, x, q)
    return gradient(problem, x, q, **options)


def _check_point(problem: QuadraticBilevelProblem, x: Tensor, q: Tensor | None) -> None:
    if x.shape != (problem.dim,):
        raise SSIGDError(f"x has shape {tuple(x.shape)}; expected ({problem.dim},)")
    if q is not None and q.shape != (problem.dim_lower,):
        raise SSIGDError(f"q has shape {tuple(q.shape)}; expected ({problem.dim_lower},)")
    for name, value in (("x", x), ("q", q)):
        if value is not None and not np.isfinite(value.numpy()).all():
            raise NonFiniteError(f"{name} holds NaN or infinity")
