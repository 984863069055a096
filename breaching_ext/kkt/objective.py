"""The KKT residual of a homogeneous network, as a function of candidate images and their multipliers.

A homogeneous network Φ(x; θ) that gradient flow trains on the logistic loss converges in direction to a point that
satisfies the conditions of the max-margin problem (Lyu and Li 2020; Ji and Telgarsky 2020):

    θ = Σ_i λ_i y_i ∇_θ Φ(x_i; θ),   λ_i ≥ 0.

Whoever holds θ can therefore look for x_i and λ_i with a small residual ‖θ − Σ_i λ_i y_i ∇_θ Φ(x_i; θ)‖². Two forms
of it are here, both for R restarts at once, and they agree (tests/kkt):

* :class:`GramResidual` for fully connected networks of any depth. The gradient of layer l is Σ_i c_i δ_i h_iᵀ with
  c_i = λ_i y_i, so that ‖W − Σ c δ hᵀ‖² = ‖W‖² − 2 Σ_i c_i ⟨δ_i, W h_i⟩ + cᵀ(ΔΔᵀ ∘ HHᵀ)c needs k × k Gram matrices of
  the k candidates and never forms the gradient.
* :func:`autograd_residual` for any network: one backward pass of Σ_i c_i Φ(x_i) gives the whole sum.

References:
    Haim, Vardi, Yehudai, Shamir and Irani, "Reconstructing training data from trained neural networks", NeurIPS 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

#: one fully connected layer: weight (out, in) and bias (out,) or None
Layer = tuple[Tensor, Tensor | None]


class _ReLUWithSlope(torch.autograd.Function):
    """ReLU forward, the given slopes backward (they themselves get no gradient from here)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return z.clamp_min(0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return grad_outputs[0] * slope, None


class GramResidual:
    """‖θ − Σ_i c_i ∇_θ Φ(x_i; θ)‖² of a fully connected ReLU network with one output, through Gram matrices.

    Args:
        layers: weights (out, in) and biases (out,) or None, first layer first; the last has one output.
        steepness: slope of the ReLU at pre-activation z is σ(steepness · z + slack); infinity is the plain ReLU's
            1[z > 0], whose own derivative is zero.
        outside: squared norm of what the coordinates of `layers` leave out of the parameters (see
            :mod:`~breaching_ext.kkt.span`); a constant.
    """

    def __init__(self, layers: Sequence[Layer], steepness: float, outside: float = 0.0) -> None:
        self.layers, self.steepness, self.outside = list(layers), steepness, outside
        self._norms = [float(w.square().sum()) + (0.0 if b is None else float(b.square().sum())) for w, b in layers]
        self.norm = sum(self._norms) + outside

    @property
    def slack_widths(self) -> list[int]:
        """Number of units of each hidden layer."""
        return [len(weight) for weight, _ in self.layers[:-1]]

    def __call__(self, x: Tensor, c: Tensor, slack: Sequence[Tensor] = ()) -> Tensor:
        """Return the residual of every restart, (R,).

        Args:
            x: candidates (R, k, D), D the input size of the first layer.
            c: signed multipliers λ_i y_i, (R, k).
            slack: added to steepness times pre-activation, one (R, k, units) a hidden layer; none is 0.
        """
        inputs, outputs, slopes = [x], [], []
        for index, (weight, bias) in enumerate(self.layers):
            z = inputs[-1] @ weight.T  # (R, k, units)
            z = z if bias is None else z + bias
            outputs.append(z)
            if index < len(self.layers) - 1:
                slopes.append(self._slope(z, slack[index] if slack else None))
                inputs.append(_ReLUWithSlope.apply(z, slopes[-1]))
        residual = torch.full_like(c[:, 0], self.norm)
        delta = torch.ones_like(outputs[-1])  # (R, k, 1), ∂Φ/∂z of the layer at hand
        for index in range(len(self.layers) - 1, -1, -1):
            weight, bias = self.layers[index]
            residual = residual - 2 * (c * (delta * outputs[index]).sum(dim=-1)).sum(dim=-1)
            residual = residual + _quadratic_form(c, delta, inputs[index], bias is not None)
            if index:
                delta = (delta @ weight) * slopes[index - 1]
        return residual

    def _slope(self, z: Tensor, slack: Tensor | None) -> Tensor:
        if self.steepness == float("inf"):
            return (z > 0).to(z)
        scaled = self.steepness * z
        return torch.sigmoid(scaled if slack is None else scaled + slack)


def _quadratic_form(c: Tensor, delta: Tensor, inputs: Tensor, bias: bool) -> Tensor:
    """Return ‖Σ_i c_i δ_i h_iᵀ‖², (R,), with a constant 1 appended to h where there is a bias."""
    gram = inputs @ inputs.mT  # (R, k, k)
    if bias:
        gram = gram + 1
    weighted = c.unsqueeze(-1) * delta
    return (gram * (weighted @ weighted.mT)).sum(dim=(-2, -1))


def autograd_residual(
    function: Callable[[dict[str, Tensor], Tensor], Tensor], parameters: dict[str, Tensor], x: Tensor, c: Tensor
) -> Tensor:
    """Return ‖θ − Σ_i c_i ∇_θ Φ(x_i; θ)‖² of every restart, (R,), for any network.

    Args:
        function: (parameters, images (k, C, H, W)) -> outputs (k,); its activations must have the wanted slopes.
        parameters: θ by name.
        x: candidates (R, k, C, H, W).
        c: signed multipliers (R, k).
    """

    def of_one(images: Tensor, multipliers: Tensor) -> Tensor:
        def weighted(theta: dict[str, Tensor]) -> Tensor:
            return (multipliers * function(theta, images)).sum()

        gradient = torch.func.grad(weighted)(parameters)
        return torch.stack([(parameters[name] - gradient[name]).square().sum() for name in parameters]).sum()

    return torch.vmap(of_one)(x, c)
