"""The update rules, each written once, on tensors with a leading member axis.

A tensor of shape (M, …) holds the same parameter of M independent runs. Everything here is a pure function of
its
arguments: nothing is written in place, no member sees another, and numbers that change from step to step
    arrive as
tensors, so that one compiled graph serves a whole run. `BaseOptimizer` is the rule with M = 1, a grid the
same rule with M = 144.

Sources: Kingma & Ba 2015 (Adam, Algorithm 1), Loshchilov & Hutter 2019 (AdamW, Algorithm 2), Shazeer & Stern
    2018
(Adafactor, Algorithms 4 and 5), Sutskever et al. 2013 in torch's form (momentum).
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor

from .config import AdafactorConfig, AdamWConfig, OptimizerConfig

State = dict[str, Tensor]


class StepScalars(NamedTuple):
    """The numbers of one step.

    Attributes:
        lr: (M,) η_t·lr; for Adafactor η_t·ρ_t.
        decay: (M,) λ after normalization.
        eta: () the schedule's factor.
        bias1: () 1 − β₁^t.
        bias2: () 1 − β₂^t.
        new_square: () 1 − β₂, or 1 − β̂₂ₜ for Adafactor: the newest square's weight (bfloat16 makes 1 of β₂).
    """

    lr: Tensor
    decay: Tensor
    eta: Tensor
    bias1: Tensor
    bias2: Tensor
    new_square: Tensor


def step_scalars(
    config: OptimizerConfig, lr: Tensor, weight_decay: Tensor, t: int, eta: float, decay_scale: float
) -> StepScalars:
    """Collect the numbers of step ``t``.

    Args:
        config: The optimizer.
        lr: (M,) base learning rate times multiplier.
        weight_decay: (M,) base λ (or λ_norm) times multiplier.
        t: Step, counted from 1.
        eta: The schedule's factor.
        decay_scale: √(b/(B·T)) for normalized decay, else 1.

    Returns:
        Tensors of the dtype and device of ``lr``.
    """

    def scalar(value: float) -> Tensor:
        return torch.tensor(value, dtype=lr.dtype, device=lr.device)

    beta2, cap = 0.0, 1.0
    if isinstance(config, AdamWConfig):
        beta2 = config.beta2
    elif isinstance(config, AdafactorConfig):
        beta2 = 1.0 - t**-config.beta2_exponent
        # multiplier·min(ρ, 1/√t) with multiplier = lr / ρ: the multiplier stands outside the minimum.
        cap = min(1.0, 1.0 / (config.lr * math.sqrt(t)))
    bias2 = 1.0 - beta2**t if isinstance(config, AdamWConfig) else 1.0
    return StepScalars(
        lr=lr * (eta * cap),
        decay=weight_decay * decay_scale,
        eta=scalar(eta),
        bias1=scalar(1.0 - config.beta1**t),
        bias2=scalar(bias2),
        new_square=scalar(1.0 - beta2),
    )


def per_member(values: Tensor, like: Tensor) -> Tensor:
    """View (M,) values so that they broadcast over ``like`` (M, …)."""
    return values.view(-1, *(1,) * (like.dim() - 1))


def rms(x: Tensor) -> Tensor:
    """Root mean square of every member of ``x`` (M, …), as (M,)."""
    return x.reshape(len(x), -1).square().mean(1).sqrt()


def factored_dims(shape: tuple[int, ...], choice: str) -> tuple[int, int] | None:
    """The two dimensions of a parameter (shape without the member axis) that are factored; None below two."""
    if len(shape) < 2:
        return None
    if choice == "last":
        return len(shape) - 2, len(shape) - 1
    first, second = sorted(range(len(shape)), key=lambda dim: -shape[dim])[:2]
    return min(first, second), max(first, second)


class UpdateRule:
    """One optimizer of the study as a pure function, in the four hooks that a variant may override.

    Attributes:
        config: The optimizer's settings.
    """

    config: OptimizerConfig

    def __init__(self, config: OptimizerConfig) -> None:
        """Keep the settings."""
        self.config = config

    def init_state(self, param: Tensor) -> State:
        """Zero moments for ``param`` (M, …)."""
        state: State = {}
        if self.config.beta1 > 0:
            state["first"] = torch.zeros_like(param)
        dims = self._factored(param)
        if self.config.second_moment == "none":
            return state
        if dims is None:
            state["second"] = torch.zeros_like(param)
        else:
            state["row"] = torch.zeros_like(param.narrow(dims[1], 0, 1))
            state["col"] = torch.zeros_like(param.narrow(dims[0], 0, 1))
        return {key: value.contiguous() for key, value in state.items()}

    def _factored(self, param: Tensor) -> tuple[int, int] | None:
        """Factored dimensions of ``param`` (M, …), counted with the member axis."""
        if not isinstance(self.config, AdafactorConfig):
            return None
        dims = factored_dims(tuple(param.shape[1:]), self.config.factored_dims)
        return None if dims is None else (dims[0] + 1, dims[1] + 1)

    def step_size(self, param: Tensor, scalars: StepScalars) -> Tensor:
        """α_t (M,): the scheduled rate, for Adafactor times max(ε₂, RMS(θ)) of the parameter before the
        step."""
        if isinstance(self.config, AdafactorConfig):
            return scalars.lr * rms(param).clamp(min=self.config.eps2)
        return scalars.lr

    def weight_decay_step(
        self, param: Tensor, grad: Tensor, size: Tensor, scalars: StepScalars
    ) -> tuple[Tensor, Tensor]:
        """Apply λ to the gradient (``l2``) or to the parameter, and return both (M, …)."""
        decay = per_member(scalars.decay, param)
        if self.config.decay == "l2":
            return param, grad + decay * param
        rate = scalars.eta if self.config.decay == "schedule" else per_member(size, param)
        return param * (1 - rate * decay), grad

    def compute_first_moment(self, value: Tensor, state: State) -> Tensor:
        """New first moment (M, …): momentum's running sum for SGD, an exponential average otherwise."""
        beta1 = self.config.beta1
        if self.config.second_moment == "none":
            return beta1 * state["first"] + value
        return torch.lerp(state["first"], value, 1 - beta1)

    def compute_second_moment(self, grad: Tensor, state: State, scalars: StepScalars) -> State:
        """New second moments: ``second`` (M, …), or ``row`` and ``col`` with one factored dimension of size
        1."""
        squared, weight = grad * grad, scalars.new_square
        if isinstance(self.config, AdafactorConfig):
            squared = squared + self.config.eps1
        dims = self._factored(grad)
        if dims is None:
            return {"second": torch.lerp(state["second"], squared, weight)}
        return {
            "row": torch.lerp(state["row"], squared.mean(dims[1], keepdim=True), weight),
            "col": torch.lerp(state["col"], squared.mean(dims[0], keepdim=True), weight),
        }

    def compute_update(self, value: Tensor, moments: State, size: Tensor, scalars: StepScalars) -> Tensor:
        """The amount (M, …) to subtract: ``value`` preconditioned by the second moments and scaled by α_t."""
        size = per_member(size, value)
        kind = self.config.second_moment
        if kind == "none":
            return size * value
        if kind == "full":
            config = cast(AdamWConfig, self.config)
            scale = (moments["second"] / scalars.bias2).sqrt() + config.eps
            return size / scalars.bias1 * (value / scale)
        config_f = cast(AdafactorConfig, self.config)
        update = value * self._inverse_root(moments, value)
        clip = (rms(update) / config_f.clip_threshold).clamp(min=1.0)
        return update * (size / per_member(clip, value))

    def _inverse_root(self, moments: State, like: Tensor) -> Tensor:
        """V̂^(−1/2) of Adafactor, broadcastable to ``like``.

        The roots of all three factors are taken before they are multiplied: they are of order ε₁ where the
        gradient is zero, and a product or ratio of them would underflow in float32.
        """
        if "second" in moments:
            return moments["second"].rsqrt()
        dims = cast(tuple[int, int], self._factored(like))
        mean = moments["row"].mean(dims[0], keepdim=True)
        return moments["row"].rsqrt() * mean.sqrt() * moments["col"].rsqrt()

    def apply(self, param: Tensor, grad: Tensor, state: State, scalars: StepScalars) -> tuple[Tensor, State]:
        """One step of every member.

        Args:
            param: (M, …).
            grad: (M, …).
            state: What `init_state` or the last step returned.
            scalars: The numbers of this step.

        Returns:
            The new parameter and the new state.
        """
        size = self.step_size(param, scalars)
        param, grad = self.weight_decay_step(param, grad, size, scalars)
        adafactor = self.config.second_moment == "factored"
        new: State = {}
        if self.config.beta1 > 0 and not adafactor:
            new["first"] = self.compute_first_moment(grad, state)
        if self.config.second_moment != "none":
            new |= self.compute_second_moment(grad, state, scalars)
        update = self.compute_update(new.get("first", grad), new, size, scalars)
        if self.config.beta1 > 0 and adafactor:  # momentum runs over clipped, scaled updates
            update = new["first"] = self.compute_first_moment(update, state)
        return param - update, new
