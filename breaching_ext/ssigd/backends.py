"""One switch for the three ways to compute the implicit gradient."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from breaching_ext.ssigd import cvxpy_backends
from breaching_ext.ssigd.arguments import check_tensor
from breaching_ext.ssigd.errors import SSIGDError
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
            CVXPY re-solves. The last two need the extra [ssigd]; they are cross-checks, and not certified: they return
            what the libraries return, also at kinks, below `min_margin` and where multipliers are not unique.
        **options: of the backend: solver_args (cvxpylayers); step, solver and the solver's options (fd).

    Returns:
        The gradient, (n,), float64, on the CPU.

    Raises:
        SSIGDError and its subclasses: see errors.py. ImportError: the extra is missing.
    """
    gradient = GRADIENTS[check_backend(backend)]
    if options:  # reading a signature takes as long as a small gradient
        _check_options(backend, options)
    check_tensor("x", x, (problem.dim,))
    if q is not None:
        check_tensor("q", q, (problem.dim_lower,))
    x = x.detach().to("cpu", torch.float64)
    q = None if q is None else q.detach().to("cpu", torch.float64)
    return gradient(problem, x, q, **options)


def _check_options(backend: str, options: dict[str, Any]) -> None:
    """Refuse options that the backend does not have; those of fd's solvers are the solvers' own."""
    parameters = inspect.signature(GRADIENTS[backend]).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            raise SSIGDError(f"{name} is no option of backend={backend!r}; valid: {', '.join(known) or 'none'}")
