"""What an optimizer and its schedule need to go on bit for bit."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch.utils._pytree import tree_map_only


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return everything the optimizer remembers, step size included, to be written before the next step.

    Not a copy: L-BFGS's history alone is as large as 200 copies of the candidates.
    """
    return optimizer.state_dict()


def restore_optimizer(
    optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler, state: dict[str, Any], steps: int
) -> None:
    """Put a fresh optimizer and its fresh schedule where they were after `steps` steps.

    The schedule is replayed: Breaching's warm-up holds its inner schedule in a form that cannot be pickled. The
    tensors of torch's optimizers, kept by parameter number, are put back as they are, because their
    `load_state_dict` casts all of them to the parameter's type.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "scheduler.step() before optimizer.step()": on purpose
        for _ in range(steps):
            scheduler.step()
    state = copy.deepcopy(state)
    optimizer.load_state_dict(state)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, slots in state["state"].items():
        if isinstance(index, int):
            device = parameters[index].device
            kept = {name: on_device(value, device) for name, value in slots.items() if name != "step"}
            optimizer.state[parameters[index]].update(kept)


def on_device(value: Any, device: torch.device) -> Any:
    """Return a value with its tensors, in lists and dicts too, on a device; nothing is cast, and other values stay.

    Checkpoints are read onto the CPU. A step count (`step`) belongs where `load_state_dict` puts it.
    """
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), value)
