"""QPLayer: a quadratic program as a differentiable PyTorch module.

The backward pass is one adjoint KKT solve on the active set (Amos & Kolter, "OptNet", ICML 2017, eq. 6–8,
without the complementarity rows that the certified active set makes redundant). It uses no finite
differences and no unrolling, so its accuracy is that of a linear solve in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from breaching_ext.ssigd.arguments import check_tensor, real_array
from breaching_ext.ssigd.batched import BatchedQP, BatchedSolution
from breaching_ext.ssigd.errors import SSIGDError
from breaching_ext.ssigd.qp import ParametricQP
from breaching_ext.ssigd.solution import QPSolution


class _Final(torch.autograd.Function):
    """The identity, whose derivative is an error."""

    @staticmethod
    def forward(ctx: Any, *values: Tensor) -> tuple[Tensor, ...]:
        return tuple(value.clone() for value in values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError("QPLayer has no second derivatives: its gradient cannot be differentiated again")


def _first_derivative_only(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """Let differentiating a gradient raise, whatever the loss.

    torch's `once_differentiable` raises only where the cotangent depends on something; with a loss that is linear in y
    it does not, and the gradient would pass as a constant, although it depends on Q and G.
    """

    @functools.wraps(backward)
    def first(ctx: Any, *grads: Any) -> tuple:
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return results
        final = iter(_Final.apply(*(r.detach().requires_grad_() for r in results if r is not None)))
        return tuple(None if r is None else next(final) for r in results)

    return first


class _SingleQP(torch.autograd.Function):
    """Forward: certified solve. Backward: one adjoint KKT solve for Q, G, c and h together."""

    @staticmethod
    def forward(ctx: Any, Q: Tensor, G: Tensor, c: Tensor, h: Tensor, layer: QPLayer) -> Tensor:
        ctx.qp = layer.single()
        ctx.solution = layer.last_solution = ctx.qp.solve(c.detach().cpu().numpy(), h.detach().cpu().numpy())
        ctx.devices = [value.device for value in (Q, G, c, h)]
        return torch.from_numpy(ctx.solution.y.copy()).to(c.device)  # the certificate's own stays as it is

    @staticmethod
    @_first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        solution: QPSolution = ctx.solution
        a, b = ctx.qp.adjoint(solution, grad.cpu().numpy())
        wanted = ctx.needs_input_grad
        grad_Q = grad_G = grad_h = None
        if wanted[0]:
            outer = np.outer(a, solution.y)
            grad_Q = -0.5 * (outer + outer.T)
        if wanted[1]:
            grad_G = np.zeros((solution.rows, len(a)))
            grad_G[solution.active] = -np.outer(solution.active_multipliers, a) - np.outer(b, solution.y)
        if wanted[3]:
            grad_h = np.zeros(solution.rows)
            grad_h[solution.active] = b
        grads = (grad_Q, grad_G, -a if wanted[2] else None, grad_h)
        placed = zip(grads, ctx.devices, strict=True)
        return (*(None if g is None else torch.from_numpy(g).to(device) for g, device in placed), None)


class _BatchedQP(torch.autograd.Function):
    """Autograd of a batch: one adjoint KKT solve a member, gradients of Q and G summed over the batch."""

    @staticmethod
    def forward(ctx: Any, Q: Tensor, G: Tensor, c: Tensor, h: Tensor, qp: BatchedQP) -> tuple[Tensor, BatchedSolution]:
        ctx.devices = [value.device for value in (Q, G, c, h)]
        ctx.qp, ctx.solution = qp, qp.solve(c, h)
        return ctx.solution.y.clone(), ctx.solution

    @staticmethod
    @_first_derivative_only
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        qp, s = ctx.qp, ctx.solution
        a, b = qp.adjoint(s, grad)
        wanted = ctx.needs_input_grad
        grad_Q = grad_G = grad_h = None
        if wanted[0]:
            outer = a.T @ s.y
            grad_Q = -0.5 * (outer + outer.T)
        if wanted[1]:
            grad_G = -(qp.row_values(s.signed, s.side).T @ a) - qp.row_values(b, s.side).T @ s.y
        if wanted[3]:
            grad_h = qp.row_values(b, s.side)
        grads = (grad_Q, grad_G, -a if wanted[2] else None, grad_h)
        return (*(None if g is None else g.to(device) for g, device in zip(grads, ctx.devices, strict=True)), None)


def _same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(
        a.dtype == b.dtype and a.device == b.device and torch.equal(a, b) for a, b in zip(one, other, strict=True)
    )


class QPLayer(nn.Module):
    """y(c, h) = argmin over y of ½ yᵀQy + cᵀy subject to G y ≤ h, differentiable in Q, G, c and h.

    Float64 throughout: inputs in float32 are converted, the result is float64. Second derivatives are not
    defined (they raise). Factors of constant Q and G are cached; they are rebuilt when a value in Q or G
    changes, so both may be parameters under training.

    Args:
        Q: (n, n), positive definite; its symmetric part counts.
        G: (m, n).
        min_margin: raise DegenerateError below this strict-complementarity margin; None (default) warns once
            where a gradient is taken at a margin of zero.

    Attributes:
        last_solution: the certificate of the last call: a QPSolution, or a BatchedSolution for a batch.

    Example:
        >>> layer = QPLayer(torch.eye(2), torch.cat([torch.eye(2), -torch.eye(2)]))
        >>> layer(torch.tensor([-3.0, 0.5]), torch.ones(4))
        tensor([ 1.0000, -0.5000], dtype=torch.float64)
    """

    def __init__(self, Q: Tensor, G: Tensor, *, min_margin: float | None = None) -> None:
        """See the class."""
        super().__init__()
        self.Q: Tensor
        self.G: Tensor
        self.min_margin = min_margin
        for name, given in (("Q", Q), ("G", G)):
            value = given if isinstance(given, Tensor) else torch.from_numpy(real_array(name, given))
            check_tensor(name, value, finite=False)
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            elif value.requires_grad:
                setattr(self, name, value)
            else:
                self.register_buffer(name, value.to(torch.float64))
        self.last_solution: QPSolution | BatchedSolution | None = None
        self._made_for: tuple[Tensor, Tensor] | None = None
        self._single: ParametricQP | None = None
        self._batched: BatchedQP | None = None
        self.single()  # bad matrices raise here, not at the first call

    def single(self) -> ParametricQP:
        """Return the solver of one QP for the present Q and G."""
        # by value: fused optimizers and `.data` change tensors without a new version, and an id may come again
        if self._single is None or self._made_for is None or not _same(self._made_for, (self.Q, self.G)):
            arrays = (value.detach().cpu().numpy() for value in (self.Q, self.G))
            self._single = ParametricQP(*arrays, min_margin=self.min_margin)
            self._batched, self._made_for = None, (self.Q.detach().clone(), self.G.detach().clone())
        return self._single

    def batched(self, device: torch.device) -> BatchedQP:
        """Return the solver of a batch for the present Q and G on `device`."""
        single = self.single()
        if self._batched is None or self._batched.device != device:
            self._batched = BatchedQP(single, device=device)
        return self._batched

    def forward(self, c: Tensor, h: Tensor) -> Tensor:
        """Solve for c of shape (n,) or (N, n) and h of shape (m,) or (N, m); either may be the batched one.

        Returns:
            y of shape (n,) or (N, n), float64.

        Raises:
            SSIGDError and its subclasses: see errors.py; in a batch the message names the member.
        """
        check_tensor("c", c, finite=False)
        check_tensor("h", h, finite=False)
        c, h = c.to(torch.float64), h.to(torch.float64)
        if c.ndim == 1 and h.ndim == 1:
            return _SingleQP.apply(self.Q.to(torch.float64), self.G.to(torch.float64), c, h, self)
        if max(c.ndim, h.ndim) != 2:
            raise SSIGDError(f"c has {c.ndim} and h {h.ndim} dimensions; expected 1 or 2 (a batch)")
        counts = {value.shape[0] for value in (c, h) if value.ndim == 2}
        count = max(counts) if 0 not in counts else 0
        if counts - {1, count} or 0 in (c.ndim, h.ndim):
            raise SSIGDError(f"c of shape {tuple(c.shape)} and h of shape {tuple(h.shape)} are not of one batch")
        c, h = c.expand(count, -1), h.expand(count, -1)
        batched = self.batched(c.device)
        y, self.last_solution = _BatchedQP.apply(self.Q.to(torch.float64), self.G.to(torch.float64), c, h, batched)
        return y
