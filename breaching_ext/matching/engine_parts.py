"""What an attack hands over to have its candidates stepped, and each engine made from it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from . import calibration
from .augmented import Augmentation
from .calibration import Calibration
from .compiled_engine import CompiledEngine
from .engine import CandidateEngine, CandidateObjective, ClosureFactory, GradientRule, OptimizerFactory
from .list_engine import ListEngine
from .memory import MemoryPlan
from .randomness import CandidateStreams
from .tracing import SpecialisationError, replayed
from .track import Box
from .vmap_engine import VmapEngine

log = logging.getLogger(__name__)

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


def list_engine(parts: EngineParts) -> ListEngine:
    """Candidates one after another, through Breaching's closure."""
    streams = parts.streams if parts.random_steps else None
    return ListEngine(parts.starts, parts.make_closure, parts.make_optimizer, parts.task_loss, streams)


def vmap_engine(parts: EngineParts, memory: MemoryPlan) -> VmapEngine:
    """The stack at once; recorded and replayed where the run is long enough to pay for it."""
    specialise = replayed if parts.evaluations >= calibration.SHORT else None
    return VmapEngine(**_stacked_arguments(parts, memory), specialise=specialise)


def compiled_engine(parts: EngineParts, memory: MemoryPlan) -> CompiledEngine:
    """The stack at once, compiled.

    Raises:
        SpecialisationError: where it cannot be compiled, or is not the same function then.
    """
    arguments = _stacked_arguments(parts, memory)
    arguments["objective"] = parts.compiled_objective or parts.objective
    return CompiledEngine(**arguments, box=parts.box)


def stacked_engine(mode: str, parts: EngineParts, memory: MemoryPlan) -> VmapEngine:
    """Return the engine `mode` (vmap, compile); where compiling fails, vmap, and the log says why."""
    if mode == "compile":
        try:
            return compiled_engine(parts, memory)
        except SpecialisationError as error:
            log.warning("candidate_batching=compile: taking vmap, because %s.", error)
    log.info("Candidates are batched with vmap.")
    return vmap_engine(parts, memory)


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
