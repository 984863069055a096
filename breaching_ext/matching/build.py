"""Choose an engine, check it against the slow path, and say in the log when and why a slower one is taken."""

from __future__ import annotations

import logging

from . import calibration
from .agreement import check_objective
from .engine_parts import BuiltEngine, EngineParts, list_engine, stacked_engine
from .fastest import ENGINES, fastest
from .memory import plan_memory

log = logging.getLogger(__name__)

BATCHING_MODES = ("auto", *ENGINES)


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
        return _one_by_one(parts)
    reason, per_candidate = parts.why_not, 0
    if not reason:
        reason, per_candidate = check_objective(parts)
    if reason:
        level = logging.INFO if mode == "auto" else logging.WARNING
        log.log(level, "candidate_batching=%s: stepping the candidates one by one (list), because %s.", mode, reason)
        return _one_by_one(parts)
    memory = plan_memory(parts.starts, per_candidate, parts.memory_budget, parts.copies)
    if mode == "auto":
        engine, calibrated = fastest(parts, memory)
        calibrated.log()
        return BuiltEngine(engine, calibrated, memory)
    return BuiltEngine(stacked_engine(mode, parts, memory), None, memory)


def _one_by_one(parts: EngineParts) -> BuiltEngine:
    if parts.memory_budget is not None:
        log.warning("impl.memory_budget has no effect: the engine list evaluates one candidate at a time as it is.")
    return BuiltEngine(list_engine(parts))
