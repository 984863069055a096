"""Where the time of a recorded evaluation goes, by what a compiler can do about it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter
from torch.utils._pytree import tree_leaves

#: Tensors of more bytes than this come from memory at every operation, not from a cache.
LARGE = 2**20
_CONVOLUTIONS = frozenset(getattr(torch.ops.aten, name).default for name in ("convolution", "convolution_backward"))
_PRODUCTS = frozenset(getattr(torch.ops.aten, name).default for name in ("addmm", "baddbmm", "bmm", "mm"))


@dataclass(frozen=True)
class Costs:
    """Seconds of one evaluation.

    Attributes:
        light: of everything but convolutions and matrix products on tensors that a cache holds. What they cost is
            mostly the call, which a compiler saves where it fuses them.
        large: the same on tensors of more than `LARGE` bytes, which are read and written, fused or not.
        layout: what convolutions would take less with their tensors laid out channels-last, as compilers do.
    """

    light: float = 0.0
    large: float = 0.0
    layout: float = 0.0

    def __mul__(self, factor: float) -> Costs:
        """Return the costs of so many evaluations."""
        return Costs(self.light * factor, self.large * factor, self.layout * factor)


def measure_costs(graph: GraphModule, stacks: list[torch.Tensor]) -> Costs:
    """Run a graph once with a clock beside every operation, and its convolutions in the other layout as well."""
    clock = _Clock(graph, stacks[0].device)
    with torch.no_grad():
        clock.run(*stacks)
    return Costs(clock.light, clock.large, max(clock.layout, 0.0))


class _Clock(Interpreter):
    """Runs a graph and adds up the time of its operations."""

    def __init__(self, graph: GraphModule, device: torch.device) -> None:
        super().__init__(graph)
        self.light = self.large = self.layout = 0.0
        self._cuda = device.type == "cuda"

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        result, spent = self._timed(target, args, kwargs)
        if target in _CONVOLUTIONS:
            self.layout += self._saved_by_layout(target, args, kwargs)
        elif target not in _PRODUCTS:
            if _largest((args, result)) > LARGE:
                self.large += spent
            else:
                self.light += spent
        return result

    def _saved_by_layout(self, target: Any, args: Any, kwargs: Any) -> float:
        laid_out = [_channels_last(value) for value in args]
        self._timed(target, laid_out, kwargs)  # a library prepares itself for shapes and layouts that are new to it
        plain = self._timed(target, args, kwargs)[1]  # results are dropped at once: a stack may fill the memory
        return plain - self._timed(target, laid_out, kwargs)[1]

    def _timed(self, target: Any, args: Any, kwargs: Any) -> tuple[Any, float]:
        if self._cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = target(*args, **kwargs)
        if self._cuda:
            torch.cuda.synchronize()
        return result, time.perf_counter() - start


def _channels_last(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dim() == 4:
        return value.contiguous(memory_format=torch.channels_last)
    return value


def _largest(values: Any) -> int:
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
    return max((tensor.numel() * tensor.element_size() for tensor in tensors), default=0)
