"""The updates of torch's elementwise optimizers as pure functions, so that they can be compiled into a step.

torch.optim reads step size and step count as Python numbers, which a compiler takes for constants of the program. Here
everything that changes from step to step comes in one tensor, so a step is compiled once. State is kept where the
optimizer itself keeps it: a checkpoint, and an optimizer that goes on by itself, find what they expect.

References:
    Kingma & Ba, "Adam", ICLR 2015; Loshchilov & Hutter, "Decoupled weight decay regularization", ICLR 2019.
"""

from __future__ import annotations

from typing import Any

import torch

Tensors = list[torch.Tensor]


class UpdateRule:
    """One step of an optimizer for one tensor.

    Args:
        optimizer: the optimizer whose options, step size and state are used.
    """

    #: what the optimizer's state holds for a parameter, besides its step count
    moments: tuple[str, ...] = ()
    #: how many numbers a step has
    count = 1

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._options = {key: value for key, value in self._group.items() if key not in ("params", "lr")}

    @property
    def _group(self) -> dict[str, Any]:
        return self._optimizer.param_groups[0]  # another dict after every load_state_dict

    @classmethod
    def fits(cls, group: dict[str, Any]) -> bool:
        """Whether the rule covers an optimizer's options."""
        raise NotImplementedError

    def numbers(self) -> list[float]:
        """Count the step, and return what the update needs to know of it."""
        raise NotImplementedError

    def update(
        self, parameter: torch.Tensor, gradient: torch.Tensor, moments: Tensors, numbers: Tensors
    ) -> tuple[torch.Tensor, Tensors]:
        """Return parameter and moments after the step; pure."""
        raise NotImplementedError

    def state(self) -> list[Tensors]:
        """Return the moments of every parameter: the optimizer's own tensors, made where there are none yet."""
        return [[self._slot(p, name) for name in self.moments] for p in self._group["params"]]

    def _slot(self, parameter: torch.Tensor, name: str) -> torch.Tensor:
        state = self._optimizer.state[parameter]
        if state.get(name) is None:
            state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state[name]


class AdamRule(UpdateRule):
    """torch.optim.Adam and AdamW."""

    moments = ("exp_avg", "exp_avg_sq")
    count = 3

    @classmethod
    def fits(cls, group: dict[str, Any]) -> bool:
        """See `UpdateRule`."""
        return not (group["amsgrad"] or group["maximize"] or group["differentiable"])

    def numbers(self) -> list[float]:
        """Step size over its bias correction, root of the second bias correction, factor of the weight decay."""
        (beta1, beta2), lr, steps = self._options["betas"], float(self._group["lr"]), 0
        for parameter in self._group["params"]:
            state = self._optimizer.state[parameter]
            state["step"] = state.get("step", torch.zeros((), dtype=torch.float32)) + 1
            steps = int(state["step"])
        return [lr / (1 - beta1**steps), (1 - beta2**steps) ** 0.5, 1 - lr * self._options["weight_decay"]]

    def update(
        self, parameter: torch.Tensor, gradient: torch.Tensor, moments: Tensors, numbers: Tensors
    ) -> tuple[torch.Tensor, Tensors]:
        """See `UpdateRule`."""
        first, second = moments
        step_size, correction, decay = numbers
        beta1, beta2 = self._options["betas"]
        if self._options["weight_decay"] != 0:
            if self._options.get("decoupled_weight_decay", False):
                parameter = parameter * decay
            else:
                gradient = gradient + self._options["weight_decay"] * parameter
        first = first.lerp(gradient, 1 - beta1)
        second = second * beta2 + (1 - beta2) * gradient * gradient
        return parameter - step_size * (first / (second.sqrt() / correction + self._options["eps"])), [first, second]


class MomentumRule(UpdateRule):
    """torch.optim.SGD, with momentum or without.

    torch copies the first gradient into the buffer; from a buffer of zeros, that is the same without dampening.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer)
        self.moments = ("momentum_buffer",) if self._options["momentum"] != 0 else ()

    @classmethod
    def fits(cls, group: dict[str, Any]) -> bool:
        """See `UpdateRule`."""
        return not (group["maximize"] or group["differentiable"] or group["dampening"] != 0)

    def numbers(self) -> list[float]:
        """Step size."""
        return [float(self._group["lr"])]

    def update(
        self, parameter: torch.Tensor, gradient: torch.Tensor, moments: Tensors, numbers: Tensors
    ) -> tuple[torch.Tensor, Tensors]:
        """See `UpdateRule`."""
        (step_size,), momentum = numbers, self._options["momentum"]
        if self._options["weight_decay"] != 0:
            gradient = gradient + self._options["weight_decay"] * parameter
        if momentum != 0:
            buffer = momentum * moments[0] + gradient
            moments = [buffer]
            gradient = gradient + momentum * buffer if self._options["nesterov"] else buffer
        return parameter - step_size * gradient, moments


_RULES: dict[type, type[UpdateRule]] = {
    torch.optim.Adam: AdamRule,
    torch.optim.AdamW: AdamRule,
    torch.optim.SGD: MomentumRule,
}


def update_rule(optimizer: torch.optim.Optimizer) -> UpdateRule | None:
    """Return an optimizer's rule; None for one that has none here. The exact type decides: a subclass may do more."""
    kind = _RULES.get(type(optimizer))
    if kind is None or len(optimizer.param_groups) != 1 or not kind.fits(optimizer.param_groups[0]):
        return None
    return kind(optimizer)
