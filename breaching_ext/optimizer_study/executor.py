"""Choosing how the members of a grid are trained: stacked, stacked and compiled, or one after another.

The choice is measured, not guessed: a few steps of each way on the task itself. Compiling is tried where the
run is long against the seconds it takes; those are recorded, and the faster step is then taken, since they
are spent. Stacking wins where a step is mostly overhead (a small model on a CPU, any of these on a GPU) and
loses where one member keeps the processor busy on its own (the full convolutional autoencoder on a CPU).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..out_of_memory import is_out_of_memory
from ..values import is_whole
from .config import require, require_choice
from .memory import members_in_memory
from .stacked import flushed_denormals
from .task import Cell, TrainingTask
from .training import SequentialRun, StackedRun

log = logging.getLogger(__name__)

EXECUTORS: tuple[str, ...] = ("auto", "stacked", "sequential")
COMPILE_CHOICES: tuple[object, ...] = ("auto", True, False)

# Below this many seconds of training, compiling (10–30 s on a CPU, for a gain of up to two) is not worth
# trying.
COMPILE_FROM_SECONDS = 60.0
# A step of the stack should not take longer than about this: what is measured is the chunk that is then run.
_STEP_SECONDS = 1.0
# Smaller chunks that are tried too: what a step touches may stay in a processor's cache (16: the activations of a
# small convolutional model; 36: parameters and moments of a small MLP).
_CACHED_CHUNKS = (16, 36)
# Compiling takes away overhead, of which a small chunk has more: the smallest that is nearly the fastest is compiled.
_COMPILED_TOLERANCE = 1.15


@dataclass(frozen=True)
class Plan:
    """How a grid is trained, and what was measured to choose it.

    Attributes:
        executor: ``stacked`` or ``sequential``.
        compiled: Whether the stacked step is compiled.
        chunk: Members in a stack.
        sequential_ms: Milliseconds per member-step one after another (None: not measured).
        stacked_ms: The same stacked.
        compiled_ms: The same stacked and compiled, without the time to compile.
        compile_seconds: Time to compile.
    """

    executor: str
    compiled: bool
    chunk: int
    sequential_ms: float | None = None
    stacked_ms: float | None = None
    compiled_ms: float | None = None
    compile_seconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON types, for the record of a run."""
        return asdict(self)


def make_plan(
    task: TrainingTask,
    cells: Sequence[Cell],
    executor: str = "auto",
    compiled: object = "auto",
    chunk: int | None = None,
) -> Plan:
    """Decide how to train ``cells``.

    Args:
        task: What the members share.
        cells: Multipliers (lr, wd) of the members to train.
        executor: ``auto`` measures; ``stacked`` and ``sequential`` are taken as given.
        compiled: True, False, or ``auto``: compile a stack if the run is long enough for it to pay.
        chunk: Most members in a stack, where members are stacked: they are split evenly, and into smaller chunks where
            memory runs out. Default: the fastest of 16, 36 and as many as fit into half of the free memory and
            take about a second a step.

    Raises:
        ValueError: If ``executor``, ``compiled`` or ``chunk`` is not valid.
    """
    check_choices(executor, compiled, chunk)
    if executor == "sequential":
        return Plan("sequential", False, 1)
    given = chunk is not None
    chunk = even_chunks(len(cells), chunk or members_in_memory(task))
    if executor == "stacked" and compiled != "auto":
        return Plan("stacked", bool(compiled), chunk)
    with flushed_denormals():
        return _measure(task, cells, chunk, given, executor, compiled)


def check_choices(executor: str, compiled: object, chunk: int | None) -> None:
    """Check what `make_plan` takes (ValueError)."""
    require_choice("executor", executor, EXECUTORS)
    known = isinstance(compiled, bool) or compiled == "auto"
    require(known, "compile", compiled, "one of " + ", ".join(map(str, COMPILE_CHOICES)))
    require(chunk is None or (is_whole(chunk) and chunk >= 1), "chunk", chunk, "a whole number >= 1, or None")


def even_chunks(members: int, largest: int) -> int:
    """Size of the chunks when ``members`` are split as evenly as possible into chunks of at most
    ``largest``."""
    return -(-members // -(-members // largest))


def _measure(
    task: TrainingTask, cells: Sequence[Cell], chunk: int, given: bool, executor: str, compiled: object
) -> Plan:
    """Time the ways that are open and take the one with the least total time."""
    sequential = None
    steps = task.steps * len(cells) / 1e3
    if executor == "auto":
        sequential = time_step(lambda: SequentialRun(task, cells[:1]), task, repeats=20)
    sizes = {chunk}
    if not given:
        largest = min(chunk, max(4, int(_STEP_SECONDS / (sequential or 1e-3) * 1e3)))
        sizes = {even_chunks(len(cells), min(largest, n)) for n in (largest, *_CACHED_CHUNKS)}
    try:
        times = _stacked_times(task, cells, sizes)
    except (RuntimeError, ValueError) as error:  # buffers, random layers, an operation that cannot be batched
        if executor == "stacked":
            raise
        log.info("The model cannot be stacked (%s); training one after another.", error)
        return Plan("sequential", False, 1, sequential_ms=sequential)
    chunk = min(times, key=times.__getitem__)
    stacked = times[chunk]
    fast = min(stacked, sequential or stacked)
    if compiled is True or (compiled == "auto" and fast * steps > COMPILE_FROM_SECONDS):
        smaller = min(n for n, ms in times.items() if ms <= _COMPILED_TOLERANCE * stacked)
        try:
            return _measure_compiled(task, cells, smaller, sequential, times[smaller])
        except Exception as error:  # no working C++ compiler; inductor raises what it likes
            if compiled is True:
                raise
            log.info("The stacked step is not compiled (%s: %s).", type(error).__name__, str(error).split("\n")[0])
    choice = "sequential" if sequential is not None and sequential < stacked else "stacked"
    return Plan(choice, False, chunk if choice == "stacked" else 1, sequential, stacked)


def _stacked_times(task: TrainingTask, cells: Sequence[Cell], sizes: set[int]) -> dict[int, float]:
    """Milliseconds per member-step by size of the stack, without the sizes for which memory runs out.

    Where it runs out for all, the least is halved until it fits; one member that does not fit raises.
    """
    times: dict[int, float] = {}
    for size in sorted(sizes):
        try:
            times[size] = _stacked_time(task, cells[:size])
        except Exception as error:
            if not is_out_of_memory(error) or (not times and size == 1):
                raise
            log.info("Memory does not hold %d members in a stack.", size)
            break
    return times or _stacked_times(task, cells, {min(sizes) // 2})


def _stacked_time(task: TrainingTask, cells: Sequence[Cell]) -> float:
    return time_step(lambda: StackedRun(task, cells), task) / len(cells)


def _measure_compiled(
    task: TrainingTask, cells: Sequence[Cell], chunk: int, sequential: float | None, stacked: float
) -> Plan:
    """Compile, time, and choose the least milliseconds per member-step among all three."""
    started = time.perf_counter()
    _batch_step(StackedRun(task, cells[:chunk], compiled=True), task)()
    compile_seconds = time.perf_counter() - started
    fast = time_step(lambda: StackedRun(task, cells[:chunk], compiled=True), task) / chunk
    ways = {("stacked", False): stacked, ("stacked", True): fast}
    if sequential is not None:
        ways["sequential", False] = sequential
    executor, use = min(ways, key=ways.__getitem__)
    chunk = chunk if executor == "stacked" else 1
    return Plan(executor, use, chunk, sequential, stacked, fast, compile_seconds)


def time_step(build: Callable[[], StackedRun | SequentialRun], task: TrainingTask, repeats: int = 5) -> float:
    """Least milliseconds of a step, after two to warm up.

    The least, not the median, and on one CPU thread the processor's time, not the wall clock's: other
    processes only make a step seem slower, a long step more often than a short one, and the choice holds for
    the whole run.
    """
    single = task.train.device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if single else time.perf_counter
    step = _batch_step(build(), task)
    for _ in range(2):
        step()
    times = []
    for _ in range(repeats):
        started = clock()
        step()
        times.append(clock() - started)
    return min(times) * 1e3


def _batch_step(run: StackedRun | SequentialRun, task: TrainingTask) -> Callable[[], None]:
    """A step on the first batch that waits for the device."""
    batch, moment = next(task.batches(0)), task.moment(0, 0)

    def step() -> None:
        run.step(batch, moment)
        if batch.is_cuda:
            torch.cuda.synchronize()

    return step
