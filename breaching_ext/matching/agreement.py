"""Whether the batched objective is Breaching's: checked on the first candidate before any engine uses it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .evaluation import first_line
from .memory import peak_memory
from .vmap_engine import VmapEngine

if TYPE_CHECKING:
    from .engine_parts import EngineParts


def check_objective(parts: EngineParts) -> tuple[str, int]:
    """Compare the pure objective with Breaching's on the first candidate.

    Returns:
        What speaks against it ("": nothing), and the bytes that its evaluation took.
    """
    assert parts.objective is not None
    assert parts.make_stack_optimizer is not None
    probe = [start[:1] for start in parts.starts]
    try:
        factory, alone = parts.make_stack_optimizer, parts.alone
        plain = VmapEngine(probe, parts.objective, factory, parts.rule, parts.streams, alone=alone)
        (gradients, values, _), memory = peak_memory(plain.evaluate, probe[0].device)
    except Exception as error:  # whatever a user's model or loss throws under torch.func: the list engine still works
        return f"torch.func cannot transform this model or loss ({type(error).__name__}: {first_line(error)})", 0
    value, reference = parts.reference([start[0] for start in parts.starts])
    difference = max(_relative(values, value), *(_relative(g, r) for g, r in zip(gradients, reference, strict=True)))
    tolerance = 1e-6 if probe[0].dtype == torch.float64 else 5e-3
    if difference > tolerance:  # false for NaN: a start at which nothing is finite says nothing about the engine
        return f"the batched objective differs from Breaching's by {difference:.1e} (tolerance {tolerance:.0e})", 0
    return "", memory


def _relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    value, reference = value.detach().flatten(), reference.detach().flatten()
    scale = reference.norm().clamp_min(torch.finfo(reference.dtype).tiny)
    return ((value - reference).norm() / scale).item()
