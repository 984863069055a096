"""Record an evaluation as a graph of tensor operations once, and replay that graph in every iteration.

torch.func builds its nested transforms and an autograd graph anew at every call. For the small models of this field
that bookkeeping takes longer than the arithmetic. The recorded graph has no transforms left in it, and operations
that nobody needs are dropped (see `graph_passes`). What remains are the same operations on the same numbers, so on a
CPU the results are equal to the last bit; that is checked before a graph is used.
"""

from __future__ import annotations

import contextlib
import logging
import time
from contextlib import AbstractContextManager

import torch
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from ..errors import first_line
from ..out_of_memory import is_out_of_memory
from .evaluation import Evaluate
from .graph_costs import Costs, measure_costs
from .graph_passes import shorten

log = logging.getLogger(__name__)

#: What a specialised evaluation may differ from the plain one by where bits are not asked for, relative.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}

#: Operations of `record_a_little`.
LITTLE = 20


class SpecialisationError(RuntimeError):
    """The evaluation could not be recorded or compiled, or the faster form gives other numbers."""


def record(evaluate: Evaluate, stacks: list[torch.Tensor]) -> GraphModule:
    """Return the graph of `evaluate` for stacks of these shapes.

    It is recorded with tensors that have shapes and no numbers: nothing is computed, and no memory is taken, of which
    recording with numbers takes half as much again as an evaluation, in pieces that the heap does not get back.

    Raises:
        SpecialisationError: when the evaluation cannot be recorded.
    """
    mode = FakeTensorMode(allow_fallback_kernels=True, allow_non_fake_inputs=True)  # weights are real
    try:
        return _graph(evaluate, [mode.from_tensor(stack) for stack in stacks], mode, mode)
    except Exception as error:  # whatever a user's model does that a graph cannot hold
        raise SpecialisationError(f"it cannot be recorded ({type(error).__name__}: {first_line(error)})") from error


def _graph(
    evaluate: Evaluate, stacks: list[torch.Tensor], describing: FakeTensorMode, inside: AbstractContextManager
) -> GraphModule:
    # with a context, one mode describes all results; without, torch makes a mode for every operation: twice the time
    with torch.random.fork_rng(devices=[]), tracing(TracingContext(describing)):
        with inside:
            graph = make_fx(evaluate)(*stacks)
        shorten(graph.graph)
    graph.graph.eliminate_dead_code()  # out of the context, in which torch would drop random operations, too
    graph.recompile()
    return graph


def operations(graph: GraphModule) -> int:
    """Return how many operations a graph has."""
    return sum(node.op == "call_function" for node in graph.graph.nodes)


class Replay:
    """A recorded evaluation, replayed; autograd's bookkeeping is left out, because derivatives are part of it.

    Attributes:
        operations: how many operations the graph has.
        recording_seconds: what recording it took.
    """

    def __init__(self, graph: GraphModule, recording_seconds: float = 0.0) -> None:
        self._graph, self.recording_seconds = graph, recording_seconds
        self.operations = operations(graph)

    def __call__(self, *stacks: torch.Tensor) -> tuple:
        """Return what the evaluation returns."""
        with torch.no_grad():
            return self._graph(*stacks)

    def costs(self, stacks: list[torch.Tensor], seconds: float) -> Costs:
        """Return where one call's time goes, measured for about so many seconds; see `measure_costs`."""
        return measure_costs(self._graph, stacks, seconds)


def record_a_little() -> None:
    """Record `LITTLE` operations: how long it takes says how fast this machine traces.

    With numbers, for which `calibration` knows how compiling compares. Where it fails it fails in silence: then no
    graph can be recorded either, and nothing is compiled.
    """

    def chain(stack: torch.Tensor) -> tuple:
        value = stack
        for _ in range(LITTLE):
            value = value.sin()
        return [value], stack, stack

    with contextlib.suppress(Exception):
        _graph(chain, [torch.zeros(1)], FakeTensorMode(allow_fallback_kernels=True), contextlib.nullcontext())


def replayed(evaluate: Evaluate, stacks: list[torch.Tensor]) -> Evaluate:
    """Return the replay of `evaluate`'s graph, or `evaluate` itself where the replay's numbers are not the same."""
    start = time.perf_counter()
    try:
        graph = record(evaluate, stacks)
        replay = Replay(graph, time.perf_counter() - start)
        difference = _difference(replay, evaluate, stacks)
        if difference > (0 if stacks[0].device.type == "cpu" else TOLERANCE.get(stacks[0].dtype, 1e-2)):
            raise SpecialisationError(f"its replay differs by {difference:.1e}")
    except SpecialisationError as error:
        log.info("The evaluation is not replayed from a graph, because %s.", error)
        return evaluate
    log.debug("Recorded the evaluation (%d operations) in %.1f s.", replay.operations, replay.recording_seconds)
    return replay


def _difference(replay: Replay, evaluate: Evaluate, stacks: list[torch.Tensor]) -> float:
    """Return the largest relative difference of a replay with the same random numbers; see `between`."""
    expected = results(evaluate, stacks)
    try:
        found = results(replay, stacks)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise SpecialisationError(f"its replay fails ({type(error).__name__}: {first_line(error)})") from error
    return between(found, expected).max().item()


def results(evaluate: Evaluate, stacks: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return gradients and objectives, each (N, ...); the random numbers that it takes are given back."""
    with torch.random.fork_rng(devices=[s.device for s in stacks[:1] if s.device.type == "cuda"]):
        gradients, values, _ = evaluate(*stacks)
        return [result.detach() for result in (*gradients, values)]


def between(found: list[torch.Tensor], expected: list[torch.Tensor]) -> torch.Tensor:
    """Return each candidate's largest relative difference, (N,), of two `results`."""
    pairs = list(zip(found, expected, strict=True))
    each = [max(relative_difference(a[n], b[n]) for a, b in pairs) for n in range(len(expected[0]))]
    return torch.tensor(each, dtype=torch.float64)


def relative_difference(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the norm of the difference over the reference's; entries that are finite in neither do not count."""
    if torch.equal(value.isfinite(), reference.isfinite()):  # a start at which nothing is finite says nothing
        value, reference = value.nan_to_num(0.0, 0.0, 0.0), reference.nan_to_num(0.0, 0.0, 0.0)
    scale = reference.norm().clamp_min(torch.finfo(reference.dtype).tiny)
    difference = ((value - reference).norm() / scale).item()
    return difference if difference == difference else float("inf")
