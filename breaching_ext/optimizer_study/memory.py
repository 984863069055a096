"""How many members of a grid fit into memory at once."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ..free_ram import free_ram
from .task import TrainingTask

MEMORY_SHARE = 0.5
"""Of the free memory, for what a stack is estimated to hold."""


def members_in_memory(task: TrainingTask) -> int:
    """How many members fit into half of the free memory (at least one).

    A member holds parameters, gradients, two moments and about as many temporaries, and the activations of a
    batch, of which the widest layer is estimated from one forward pass.
    """
    device = task.train.device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free_memory()
    size = task.train.element_size()
    weights = 6 * sum(p.numel() for p in task.model.parameters()) * size
    activations = 3 * _activation_numbers(task) * size
    return max(1, int(free * MEMORY_SHARE / (weights + activations)))


def _activation_numbers(task: TrainingTask) -> int:
    """How many numbers the layers put out for one batch."""
    count = 0

    def add(_module: Any, _inputs: Any, output: Any) -> None:
        nonlocal count
        count += output.numel() if isinstance(output, Tensor) else 0

    model = copy.deepcopy(task.model)  # batch normalisation counts what it sees
    leaves = [m for m in model.modules() if not list(m.children())]
    hooks = [leaf.register_forward_hook(add) for leaf in leaves]
    try:
        with torch.no_grad():
            model(task.train[: task.budget.batch_size])
    finally:
        for hook in hooks:
            hook.remove()
    return count


def _free_memory() -> int:
    """Free memory of the machine in bytes (a guess of 4 GiB where the system does not say)."""
    free = free_ram()
    return 4 * 2**30 if free is None else free
