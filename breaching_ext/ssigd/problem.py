"""Quadratic bilevel problems with a linearly constrained lower level.

    min over x in X of  F(x) = f(x, y*(x)),    y*(x) = argmin over y of g(x, y)  subject to  A x + B y ≤ b

    f(x, y) = ½ (x − x_t)ᵀ Q_u (x − x_t) + c_uᵀ y + ½ yᵀ Q_uy y + xᵀ R y + constant
    g(x, y) = ½ yᵀ Q_l y + (c_l + Pᵀ x + q)ᵀ y

q is the random linear perturbation of Khanduri et al. (ICML 2023), which makes y* differentiable almost
surely.

The coupling P (or A) is what makes this a bilevel problem: without it y* is the same for every x, the
implicit part of the gradient is zero, and a test of that gradient tests nothing. On the reference problem
(reference.py), leaving that part out makes the gradient wrong by 53 to 67 % (median relative error at n = 5
to 50; measured by benchmarks/ssigd.py).
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from breaching_ext.ssigd.arguments import check_number, real_array
from breaching_ext.ssigd.errors import NonFiniteError, SSIGDError
from breaching_ext.ssigd.layer import QPLayer
from breaching_ext.ssigd.qp import ParametricQP
from breaching_ext.ssigd.rows import Array
from breaching_ext.ssigd.solution import QPSolution

Numbers = Any  # a float64 array or tensor; the result of a method is of the kind that it was given


def _tensor(value: ArrayLike | Tensor, name: str) -> Tensor:
    tensor = torch.from_numpy(real_array(name, value))
    if name not in ("x_lower", "x_upper") and not torch.isfinite(tensor).all():
        raise NonFiniteError(f"{name} holds NaN or infinity")
    return tensor


def _bound(value: ArrayLike | Tensor, name: str, n: int) -> Tensor:
    tensor = _tensor(value, name)
    if tensor.shape not in ((), (1,), (n,)):
        raise SSIGDError(f"{name} has shape {tuple(tensor.shape)}; expected ({n},) or a number")
    return tensor.expand(n).clone()


class QuadraticBilevelProblem:
    """A bilevel problem from its matrices, which must not be changed afterwards: factors are cached.

    Args:
        Q_upper: (n, n), positive semi-definite. x_target: (n,). c_upper: (p,).
        Q_lower: (p, p), positive definite. c_lower: (p,). P: coupling, (n, p).
        A, B, b: lower-level constraints A x + B y ≤ b; (m, n), (m, p), (m,).
        x_lower, x_upper: the box X, (n,) or scalars; default unbounded.
        Q_upper_y: quadratic of f in y, (p, p), default zero. R: bilinear term of f, (n, p), default zero.
        constant: added to f, default 0.
        min_margin: solutions and gradients raise DegenerateError below this strict-complementarity margin, values of F
            do not; None (default) only warns.

    Raises:
        SSIGDError: a shape does not match. NonFiniteError, NotStronglyConvexError: see errors.py.
    """

    def __init__(
        self, *, Q_upper: ArrayLike, x_target: ArrayLike, c_upper: ArrayLike, Q_lower: ArrayLike,
        c_lower: ArrayLike, P: ArrayLike, A: ArrayLike, B: ArrayLike, b: ArrayLike,
        x_lower: ArrayLike = -np.inf, x_upper: ArrayLike = np.inf,
        Q_upper_y: ArrayLike | None = None, R: ArrayLike | None = None,
        constant: float = 0.0, min_margin: float | None = None,
    ) -> None:  # fmt: skip
        """See the class."""
        self.Q_upper, self.x_target = _tensor(Q_upper, "Q_upper"), _tensor(x_target, "x_target")
        self.c_upper, self.Q_lower = _tensor(c_upper, "c_upper"), _tensor(Q_lower, "Q_lower")
        self.c_lower, self.P = _tensor(c_lower, "c_lower"), _tensor(P, "P")
        self.A, self.B, self.b = _tensor(A, "A"), _tensor(B, "B"), _tensor(b, "b")
        for name in ("x_target", "c_lower", "b"):
            if getattr(self, name).ndim != 1:
                raise SSIGDError(f"{name} has shape {tuple(getattr(self, name).shape)}; expected one dimension")
        n, p = len(self.x_target), len(self.c_lower)
        self.Q_upper_y = _tensor(np.zeros((p, p)) if Q_upper_y is None else Q_upper_y, "Q_upper_y")
        self.R = _tensor(np.zeros((n, p)) if R is None else R, "R")
        self.x_lower, self.x_upper = _bound(x_lower, "x_lower", n), _bound(x_upper, "x_upper", n)
        check_number("constant", constant)
        self.constant, self.min_margin = float(constant), min_margin
        self._check_shapes(n, p, len(self.b))
        self.cache: dict[str, Any] = {}  # what the CVXPY backends compile, once for each problem
        self.solver = ParametricQP(self.Q_lower.numpy(), self.B.numpy(), min_margin=min_margin)

    def _check_shapes(self, n: int, p: int, m: int) -> None:
        expected = {
            "Q_upper": (n, n), "x_target": (n,), "c_upper": (p,), "Q_lower": (p, p), "c_lower": (p,),
            "P": (n, p), "A": (m, n), "B": (m, p), "b": (m,), "Q_upper_y": (p, p), "R": (n, p),
        }  # fmt: skip
        for name, shape in expected.items():
            if tuple(getattr(self, name).shape) != shape:
                raise SSIGDError(f"{name} has shape {tuple(getattr(self, name).shape)}; expected {shape}")
        possible = (self.x_lower <= self.x_upper) & (self.x_lower < torch.inf) & (self.x_upper > -torch.inf)
        if not possible.all():
            raise SSIGDError("x_lower exceeds x_upper, or one of them holds NaN; expected a non-empty box")

    @property
    def dim(self) -> int:
        """Number of upper-level variables."""
        return len(self.x_target)

    @property
    def dim_lower(self) -> int:
        """Number of lower-level variables."""
        return len(self.c_lower)

    @cached_property
    def fingerprint(self) -> str:
        """Eight hexadecimal digits of a hash of all data; a checkpoint is tied to its problem by them."""
        digest = hashlib.sha256(repr(self.constant).encode())
        for value in (*vars(self._tensors).values(), self.B, self.x_lower, self.x_upper):
            digest.update(value.numpy().tobytes())
        return digest.hexdigest()[:8]

    def __repr__(self) -> str:
        """Return the sizes and the fingerprint of the data."""
        sizes = f"dim={self.dim}, dim_lower={self.dim_lower}, rows={len(self.b)}"
        return f"{type(self).__name__}({sizes}, fingerprint={self.fingerprint!r})"

    @cached_property
    def layer(self) -> QPLayer:
        """The lower level as a differentiable layer."""
        return QPLayer(self.Q_lower, self.B, min_margin=self.min_margin)

    @cached_property
    def coupled_constraints(self) -> bool:
        """Whether x moves the lower-level constraints (A is not zero)."""
        return bool(self.A.any())

    @cached_property
    def _tensors(self) -> SimpleNamespace:
        names = ("Q_upper", "x_target", "c_upper", "Q_lower", "c_lower", "P", "A", "b", "Q_upper_y", "R")
        data = {name: getattr(self, name) for name in names}
        return SimpleNamespace(**data, hessian=_symmetric(self.Q_upper), hessian_y=_symmetric(self.Q_upper_y))

    @cached_property
    def arrays(self) -> SimpleNamespace:
        """The data as float64 arrays that share memory with the tensors."""
        return SimpleNamespace(**{name: value.numpy() for name, value in vars(self._tensors).items()})

    def _like(self, x: Numbers) -> SimpleNamespace:
        """Return the data as arrays or as tensors, whichever x is: small problems run faster in NumPy."""
        return self.arrays if isinstance(x, np.ndarray) else self._tensors

    @staticmethod
    def _double(*values: Numbers) -> Any:
        """Return values in float64, which all data are in."""
        return tuple(v if isinstance(v, np.ndarray) else v.to(torch.float64) for v in values)

    @cached_property
    def _upper_terms(self) -> tuple[bool, bool]:
        return bool(self.Q_upper_y.any()), bool(self.R.any())

    def linear_term(self, x: Numbers, q: Numbers | None = None) -> Numbers:
        """Return c_l + Pᵀx + q for x of shape (..., n): (..., p)."""
        (x,) = self._double(x)
        data = self._like(x)
        linear = data.c_lower + x @ data.P
        return linear if q is None else linear + q

    def right_hand_side(self, x: Numbers) -> Numbers:
        """Return b − A x for x of shape (..., n): (..., m)."""
        (x,) = self._double(x)
        data = self._like(x)
        if x.ndim == 1 and not self.coupled_constraints:
            return data.b
        return data.b - x @ data.A.T

    def upper_objective(self, x: Numbers, y: Numbers) -> Numbers:
        """Return f(x, y) for x (..., n) and y (..., p): (...)."""
        x, y = self._double(x, y)
        data = self._like(x)
        d = x - data.x_target
        quadratic = 0.5 * (d * (d @ data.Q_upper)).sum(-1) + 0.5 * (y * (y @ data.Q_upper_y)).sum(-1)
        return quadratic + y @ data.c_upper + ((x @ data.R) * y).sum(-1) + self.constant

    def upper_gradients(self, x: Numbers, y: Numbers) -> tuple[Numbers, Numbers]:
        """Return ∇ₓf (..., n) and ∇ᵧf (..., p); override it together with upper_objective."""
        x, y = self._double(x, y)
        data = self._like(x)
        curved, bilinear = self._upper_terms
        grad_x = (x - data.x_target) @ data.hessian
        grad_y = data.c_upper + y @ data.hessian_y if curved else data.c_upper + 0.0 * y
        return (grad_x + y @ data.R.T, grad_y + x @ data.R) if bilinear else (grad_x, grad_y)

    def lower_objective(self, x: Numbers, y: Numbers, q: Numbers | None = None) -> Numbers:
        """Return g(x, y) + qᵀy for x (..., n) and y (..., p): (...)."""
        x, y = self._double(x, y)
        return 0.5 * (y * (y @ self._like(x).Q_lower)).sum(-1) + (self.linear_term(x, q) * y).sum(-1)

    def solve_lower_level(self, x: Tensor, q: Tensor | None = None) -> Tensor:
        """Return y*(x), differentiable in x and q, for x of shape (n,) or (N, n): (p,) or (N, p)."""
        x, q = x.to(torch.float64), None if q is None else q.to(torch.float64)
        return self.layer(self.linear_term(x, q), self.right_hand_side(x))

    def certified_solution(self, x: Numbers, q: Numbers | None = None, *, degenerate: bool = False) -> QPSolution:
        """Return y*(x) with its active set, margin and residual for one x, (n,); `degenerate` as in ParametricQP."""
        x, q = _array(x), None if q is None else _array(q)
        return self.solver.solve(self.linear_term(x, q), self.right_hand_side(x), degenerate=degenerate)

    def objective(self, x: Numbers, q: Numbers | None = None) -> float:
        """Return F(x) = f(x, y*(x)) for one x, (n,); without q at the unperturbed y*.

        F has a value where it has no gradient, so neither `min_margin` nor LICQ matters here.
        """
        x = _array(x)
        return float(self.upper_objective(x, self.certified_solution(x, q, degenerate=True).y))

    def project(self, x: Tensor) -> Tensor:
        """Project onto the box X."""
        return torch.minimum(torch.maximum(x, self.x_lower), self.x_upper)

    def violation(self, x: Numbers, y: Numbers) -> float:
        """Return the largest violation of A x + B y ≤ b, 0 where all hold; x (n,), y (p,)."""
        excess = self.solver.G @ _array(y) - self.right_hand_side(_array(x))
        return float(excess.max(initial=0.0))


def _array(value: Numbers) -> Array:
    return value if isinstance(value, np.ndarray) else value.detach().to("cpu", torch.float64).numpy()


def _symmetric(matrix: Tensor) -> Tensor:
    return 0.5 * (matrix + matrix.T)
