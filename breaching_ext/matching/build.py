"""Choose an engine, check it against the slow path, and say in the log when and why a slower one is taken."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from . import calibration, choices
from .agreement import check_objective
from .calibration import Calibration
from .compiled_engine import CompiledEngine
from .engine import CandidateEngine, CandidateObjective, ClosureFactory, GradientRule, OptimizerFactory
from .evaluation import first_line
from .list_engine import ListEngine
from .memory import MemoryPlan, plan_memory
from .randomness import CandidateStreams
from .tracing import LITTLE, SpecialisationError, record_a_little, replayed
from .track import Box, Track, advancing
from .vmap_engine import Augmentation, VmapEngine

log = logging.getLogger(__name__)

BATCHING_MODES = ("auto", "list", "vmap", "compile")

#: one candidate's parameters -> objective value and gradients, computed by Breaching's own code
Reference = Callable[[list[torch.Tensor]], tuple[torch.Tensor, list[torch.Tensor]]]


@dataclass
class EngineParts:
    """Everything an attack hands over to have its candidates stepped.

    Attributes:
        starts: start values, each (N, ...), images first.
        streams: the candidates' random streams.
        rule: what happens to a gradient before the optimizer sees it.
        make_closure, task_loss, make_optimizer: Breaching's way for one candidate (see `ListEngine`).
        objective: the same objective as a pure function, or None.
        compiled_objective: `objective` with its data laid out as compiled code wants them; None: `objective`.
        make_stack_optimizer: optimizer over stacks, or None where the optimizer couples the entries of a tensor.
        reference: Breaching's value and gradients for one candidate, to check `objective` against.
        why_not: why there is no `objective` or no `make_stack_optimizer`.
        augmentation, differentiable: see `VmapEngine`.
        random_steps: whether a step draws random numbers.
        box: least and largest valid image values, or None.
        iterations: iterations that the run will make.
        evaluations_each: evaluations of a candidate in one of them, about; more than one with a line search.
        alone: whether these are the whole run's one candidate (a process may have one of several).
        copies: of a candidate, that its optimizer keeps besides the usual ones (see `plan_memory`).
        memory_budget: most bytes that the run may take; None: what the device has.
        identity: what `auto` remembers its choice by, with shapes, device and versions; None: it does not.
    """

    starts: list[torch.Tensor]
    streams: CandidateStreams
    rule: GradientRule
    make_closure: ClosureFactory
    task_loss: Callable[[], torch.Tensor]
    make_optimizer: OptimizerFactory
    reference: Reference
    objective: CandidateObjective | None = None
    compiled_objective: CandidateObjective | None = None
    make_stack_optimizer: OptimizerFactory | None = None
    why_not: str = ""
    augmentation: Augmentation | None = None
    differentiable: bool = False
    random_steps: bool = False
    box: Box | None = None
    iterations: int = 1
    evaluations_each: int = 1
    alone: bool = False
    copies: int = 0
    memory_budget: int | None = None
    identity: str | None = None

    @property
    def evaluations(self) -> int:
        """Evaluations of a candidate that the run will make, about."""
        return self.iterations * self.evaluations_each


@dataclass
class BuiltEngine:
    """An engine, and how it was chosen."""

    engine: CandidateEngine
    calibration: Calibration | None = None
    memory: MemoryPlan = field(default_factory=MemoryPlan)


def build_engine(mode: str, parts: EngineParts) -> CandidateEngine:
    """Return the engine for `restarts.candidate_batching`; see :func:`choose_engine`."""
    return choose_engine(mode, parts).engine


def choose_engine(mode: str, parts: EngineParts) -> BuiltEngine:
    """Return the engine for `restarts.candidate_batching`, with what was measured on the way.

    Args:
        mode: `list`, `vmap`, `compile`, or `auto`: the fastest, by a calibration that counts compile time
            (see `calibration`). What does not work falls back, compile to vmap and vmap to list, and the log says why.
        parts: what the attack supplies.

    Raises:
        ConfigError: when one candidate alone is above a budget that the config gives.
    """
    single = len(parts.starts[0]) == 1
    if mode == "list" or (mode == "auto" and single and parts.evaluations < calibration.SHORT_ALONE):
        return BuiltEngine(_list_engine(parts))
    reason, per_candidate = parts.why_not, 0
    if not reason:
        reason, per_candidate = check_objective(parts)
    if reason:
        level = logging.INFO if mode == "auto" else logging.WARNING
        log.log(level, "candidate_batching=%s: stepping the candidates one by one (list), because %s.", mode, reason)
        return BuiltEngine(_list_engine(parts))
    memory = plan_memory(parts.starts, per_candidate, parts.memory_budget, parts.copies)
    if mode == "auto":
        engine, calibrated = _fastest(parts, memory)
        calibrated.log()
        return BuiltEngine(engine, calibrated, memory)
    return BuiltEngine(_stacked_engine(mode, parts, memory), None, memory)


# -- the engines -----------------------------------------------------------------------------------------------------


def _list_engine(parts: EngineParts) -> ListEngine:
    streams = parts.streams if parts.random_steps else None
    return ListEngine(parts.starts, parts.make_closure, parts.make_optimizer, parts.task_loss, streams)


def _vmap_engine(parts: EngineParts, memory: MemoryPlan) -> VmapEngine:
    specialise = replayed if parts.evaluations >= calibration.SHORT else None
    return VmapEngine(**_stacked_arguments(parts, memory), specialise=specialise)


def _compiled_engine(parts: EngineParts, memory: MemoryPlan) -> CompiledEngine:
    arguments = _stacked_arguments(parts, memory)
    arguments["objective"] = parts.compiled_objective or parts.objective
    return CompiledEngine(**arguments, box=parts.box)


def _stacked_engine(mode: str, parts: EngineParts, memory: MemoryPlan) -> VmapEngine:
    if mode == "compile":
        try:
            return _compiled_engine(parts, memory)
        except SpecialisationError as error:
            log.warning("candidate_batching=compile: taking vmap, because %s.", error)
    log.info("Candidates are batched with vmap.")
    return _vmap_engine(parts, memory)


def _stacked_arguments(parts: EngineParts, memory: MemoryPlan) -> dict[str, Any]:
    return {
        "starts": parts.starts,
        "objective": parts.objective,
        "make_optimizer": parts.make_stack_optimizer,
        "rule": parts.rule,
        "streams": parts.streams,
        "augmentation": parts.augmentation,
        "differentiable": parts.differentiable,
        "chunk": memory.chunk,
        "alone": parts.alone,
    }


# -- auto ------------------------------------------------------------------------------------------------------------


def _fastest(parts: EngineParts, memory: MemoryPlan) -> tuple[CandidateEngine, Calibration]:
    if parts.evaluations < calibration.SHORT:
        return _vmap_engine(parts, memory), Calibration("vmap", "the run is too short to measure", parts.iterations)
    path = choices.choice_file(_identity(parts, memory)) if parts.identity is not None else None
    known = choices.remembered(path, BATCHING_MODES[1:]) if path is not None else None
    if known is not None:
        return _as_remembered(known, parts, memory)
    found, calibrated = _measure(parts, memory)
    kept = choices.remember(path, calibrated, BATCHING_MODES[1:]) if path is not None else None
    if kept is not None and kept.engine != found.name:  # another process has measured meanwhile: its choice holds
        return _as_remembered(kept, parts, memory)
    return found, calibrated


def _as_remembered(known: Calibration, parts: EngineParts, memory: MemoryPlan) -> tuple[CandidateEngine, Calibration]:
    if known.engine == "list":
        return _list_engine(parts), known
    engine = _stacked_engine(known.engine, parts, memory)
    known.engine = engine.name
    return engine, known


def _identity(parts: EngineParts, memory: MemoryPlan) -> list[Any]:
    """What a remembered choice holds for; the number of steps to do counts, because compiling takes a fixed time."""
    shapes = [tuple(start.shape) for start in parts.starts]
    start = parts.starts[0]
    step = [parts.augmentation is not None, parts.random_steps, parts.alone, start.dtype, memory.chunk]
    return [parts.identity, shapes, *step, parts.iterations, *choices.machine(start.device)]


def _measure(parts: EngineParts, memory: MemoryPlan) -> tuple[CandidateEngine, Calibration]:
    states = list(parts.streams.states)
    first = replace(parts, starts=[start[:1] for start in parts.starts])  # of `list`, one candidate says all
    engine, device = _vmap_engine(parts, memory), parts.starts[0].device
    engines = {"vmap": _iteration(engine, parts), "list": _iteration(_list_engine(first), first)}
    spent = calibration.seconds(engines, device, parts.iterations, {"recording": record_a_little})
    times = {"list": spent["list"] * len(parts.starts[0]), "vmap": spent["vmap"]}
    best = "list" if times["list"] < calibration.CLEARLY * times["vmap"] else "vmap"
    tracing = spent["recording"] / LITTLE
    found = Calibration(best, "it is the fastest", parts.iterations, times, tracing_seconds=tracing)
    chosen: CandidateEngine = engine
    if _is_worth_compiling(engine, found):
        try:
            compiled = _compiled_engine(parts, memory)
        except SpecialisationError as error:
            found.reason = f"{error}"
        else:
            found.compile_seconds = compiled.compile_seconds
            pair = {"vmap": _iteration(engine, parts), "compile": _iteration(compiled, parts)}
            times.update(calibration.seconds(pair, device, parts.iterations))
            if times["compile"] < min(times["list"], times["vmap"]):
                found.engine = "compile"
                chosen = compiled
    parts.streams.states = states
    if found.engine == "list":
        return _list_engine(parts), found
    assert isinstance(chosen, VmapEngine)
    chosen.rewind()
    return chosen, found


def _is_worth_compiling(engine: VmapEngine, found: Calibration) -> bool:
    """Estimate what compiling takes and saves, from the recorded graph; says the reason where it is not worth it."""
    evaluation, replayed = engine.evaluation, found.step_seconds["vmap"]
    assert found.tracing_seconds is not None
    if not evaluation.operations:
        found.reason = "it is the fastest that works (no graph can be recorded, so nothing can be compiled)"
        return False
    found.recording_seconds, found.operations = evaluation.recording_seconds, evaluation.operations
    expected = calibration.expected_compile_seconds(evaluation.operations, found.tracing_seconds, replayed)
    found.expected_compile_seconds = expected
    if calibration.compiling_may_pay(found.step_seconds, found.iterations, expected):
        seconds = calibration.worth_measuring(found.iterations, replayed)
        try:
            costs = evaluation.costs(engine.parameters, seconds)
        except Exception as error:  # memory may run out (an operation is run in two layouts), or a layout be refused
            found.reason = f"its operations cannot be timed ({type(error).__name__}: {first_line(error)})"
            return False
        found.costs = asdict(costs)
        saved = calibration.saved_shares(engine.parameters[0].device)
        step = found.expected_step_seconds = calibration.expected_step(replayed, costs, saved)
        if calibration.compiling_pays(found.step_seconds, step, found.iterations, expected):
            return True
    found.reason = f"compiling would take about {expected:.0f} s, more than it saves"
    return False


def _iteration(engine: CandidateEngine, parts: EngineParts) -> Callable[[], Any]:
    """Return a whole iteration: evaluation, optimizer, projection, best point."""
    step, track = advancing(engine), Track.start(engine.parameters, parts.box)
    return lambda: step(0, track)
