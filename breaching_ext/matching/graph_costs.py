"""Where the time of a recorded evaluation goes, by what a compiler can do about it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from .graph_passes import VIEWS

#: Operations on tensors of more bytes than this read and write memory, not a cache.
LARGE = 2**19
#: A graph is run so many times at most.
REPEATS = 7
#: Where a convolution's weights stand among its arguments.
_CONVOLUTIONS = {torch.ops.aten.convolution.default: 1, torch.ops.aten.convolution_backward.default: 2}
_PRODUCTS = frozenset(getattr(torch.ops.aten, name).default for name in ("addmm", "baddbmm", "bmm", "mm"))


@dataclass(frozen=True)
class Costs:
    """Shares of an evaluation's time, of one run, so that they hold however fast the machine is at the moment.

    Attributes:
        light: of everything but convolutions, matrix products and operations on tensors of more than `LARGE` bytes.
            What they cost is mostly the call, which a compiler saves where it fuses them.
        large: of operations on larger tensors but convolutions and products. They read and write memory, fused or not,
            but fused less often.
        layout: what convolutions would take less with their tensors laid out channels-last, as compilers do.
        weights: what laying out their weights takes, once for each of them. Images stay laid out from one operation to
            the next; weights come as they are, and their gradients go back so.
        model: the part of it for the model's own weights, which no compiler can have computed laid out.
    """

    light: float = 0.0
    large: float = 0.0
    layout: float = 0.0
    weights: float = 0.0
    model: float = 0.0


def measure_costs(graph: GraphModule, stacks: list[torch.Tensor], seconds: float = float("inf")) -> Costs:
    """Run a graph with a clock beside every operation, and its convolutions in the other layout as well.

    It is run `REPEATS` times, or until so many seconds have passed; of every operation the median counts.
    """
    runs: list[dict[str, list[float]]] = []
    start = time.perf_counter()
    while len(runs) < REPEATS and (not runs or time.perf_counter() - start < seconds):
        clock = _Clock(graph, stacks[0].device)
        with torch.no_grad():
            clock.run(*stacks)
        runs.append(clock.spent)
    spent = {kind: sum(map(median, zip(*(run[kind] for run in runs), strict=True))) for kind in runs[0]}
    everything = spent["all"] or 1.0
    layout = max(spent["as it is"] - spent["laid out"], 0.0)
    shares = (spent["light"], spent["large"], layout, spent["weights"], spent["model"])
    return Costs(*(share / everything for share in shares))


class _Clock(Interpreter):
    """Runs a graph and keeps the seconds of its operations, by kind."""

    def __init__(self, graph: GraphModule, device: torch.device) -> None:
        super().__init__(graph)
        kinds = ("all", "light", "large", "as it is", "laid out", "weights", "model")
        self.spent: dict[str, list[float]] = {kind: [] for kind in kinds}
        self._device = device

    def run_node(self, n: Node) -> Any:
        self._node = n
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        result, spent = self._timed(target, args, kwargs)
        self.spent["all"].append(spent)
        if target in _CONVOLUTIONS:
            self._in_both_layouts(target, args, kwargs)
        elif target not in _PRODUCTS:
            self.spent["light" if _largest((args, result)) <= LARGE else "large"].append(spent)
        return result

    def _in_both_layouts(self, target: Any, args: Any, kwargs: Any) -> None:
        laid_out = [_channels_last(value) for value in args]
        self._timed(target, laid_out, kwargs)  # a library prepares itself for shapes and layouts that are new to it
        place = _CONVOLUTIONS[target]
        spent = self._timed(_channels_last, (args[place],), {})[1]
        self.spent["weights"].append(spent)
        self.spent["model"].append(spent if _is_constant(self._node.args[place]) else 0.0)
        for name, values in (("as it is", args), ("laid out", laid_out)):
            self.spent[name].append(self._timed(target, values, kwargs)[1])  # no result is kept: it may fill the memory

    def _timed(self, target: Any, args: Any, kwargs: Any) -> tuple[Any, float]:
        self._wait()
        start = time.perf_counter()
        result = target(*args, **kwargs)
        self._wait()
        return result, time.perf_counter() - start

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _is_constant(node: Any) -> bool:
    """Whether a value is a tensor that the recorded function closes over, or a view of one."""
    while node.op == "call_function" and node.target in VIEWS:
        node = node.args[0]
    return node.op == "get_attr"


def _channels_last(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dim() == 4:
        return value.contiguous(memory_format=torch.channels_last)
    return value


def _largest(values: Any) -> int:
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
    return max((tensor.numel() * tensor.element_size() for tensor in tensors), default=0)
