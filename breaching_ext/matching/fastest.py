"""`candidate_batching=auto`: time the engines on the run's own step, weigh compiling, remember the choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from ..errors import first_line
from . import calibration, choices
from .calibration import Calibration
from .engine import CandidateEngine
from .engine_parts import EngineParts, compiled_engine, list_engine, stacked_engine, vmap_engine
from .heap import give_back
from .memory import MemoryPlan
from .tracing import LITTLE, SpecialisationError, record_a_little
from .track import Track, advancing
from .vmap_engine import VmapEngine

#: What `auto` chooses from.
ENGINES = ("list", "vmap", "compile")


def fastest(parts: EngineParts, memory: MemoryPlan) -> tuple[CandidateEngine, Calibration]:
    """Return the fastest engine for this run, and what was measured to find it (or remembered).

    Candidates and random streams are afterwards as they were. A run too short to measure takes vmap.
    """
    if parts.evaluations < calibration.SHORT:
        return vmap_engine(parts, memory), Calibration("vmap", "the run is too short to measure", parts.iterations)
    path = choices.choice_file(_identity(parts, memory)) if parts.identity is not None else None
    known = choices.remembered(path, ENGINES) if path is not None else None
    if known is not None:
        return _as_remembered(known, parts, memory)
    found, calibrated = _measure(parts, memory)
    kept = choices.remember(path, calibrated, ENGINES) if path is not None else None
    if kept is not None and kept.engine != found.name:  # another process has measured meanwhile: its choice holds
        return _as_remembered(kept, parts, memory)
    return found, calibrated


def _as_remembered(known: Calibration, parts: EngineParts, memory: MemoryPlan) -> tuple[CandidateEngine, Calibration]:
    if known.engine == "list":
        return list_engine(parts), known
    engine = stacked_engine(known.engine, parts, memory)
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
    engine, device = vmap_engine(parts, memory), parts.starts[0].device
    engines = {"vmap": _iteration(engine, parts), "list": _iteration(list_engine(first), first)}
    spent = calibration.seconds(engines, device, parts.iterations, {"recording": record_a_little})
    times = {"list": spent["list"] * len(parts.starts[0]), "vmap": spent["vmap"]}
    best = "list" if times["list"] < calibration.CLEARLY * times["vmap"] else "vmap"
    tracing = spent["recording"] / LITTLE
    found = Calibration(best, "it is the fastest", parts.iterations, times, tracing_seconds=tracing)
    chosen: CandidateEngine = engine
    if _is_worth_compiling(engine, found):
        give_back()
        try:
            compiled = compiled_engine(parts, memory)
        except SpecialisationError as error:
            found.reason = f"{error}"
        else:
            found.compile_seconds = compiled.compile_seconds
            pair = {"vmap": _iteration(engine, parts), "compile": _iteration(compiled, parts)}
            times.update(calibration.seconds(pair, device, parts.iterations, until_decided=True))
            if times["compile"] < min(times["list"], times["vmap"]):
                found.engine = "compile"
                chosen = compiled
    parts.streams.states = states
    if found.engine == "list":
        return list_engine(parts), found
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
