"""The stacked evaluation compiled once with torch.compile; everything else is the vmap engine."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch

from .vmap_engine import VmapEngine

log = logging.getLogger(__name__)

#: What a compiled evaluation may differ from the eager one by, relative: fused kernels round in another order.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}


class CompilationError(RuntimeError):
    """The evaluation could not be compiled, or the compiled one gives other numbers."""


class CompiledEngine(VmapEngine):
    """A `VmapEngine` whose objective and gradient are one compiled function.

    Compiling takes tens of seconds, so this pays from about a thousand iterations on. The group term does not cause
    a second compilation: its weight and its consensus are tensors that exist from the start.

    Args: as `VmapEngine`, and `backend`, torch.compile's.

    Raises:
        CompilationError: when torch cannot compile the evaluation, or the result differs from the eager one.
    """

    name = "compile"

    def __init__(self, *args: Any, backend: str = "inductor", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        eager = self._evaluate
        self._evaluate = torch.compile(eager, backend=backend, dynamic=False)
        start = time.perf_counter()
        log.info("Compiling the evaluation; this takes from ten seconds to a few minutes, once.")
        stacks = [stack.detach() for stack in self._stacks]
        try:
            gradients, values, _ = self._evaluate(*stacks)
        except Exception as error:  # dynamo and inductor raise what they like; the eager engine still works
            first = str(error).strip().splitlines() or ["no message"]
            raise CompilationError(f"torch.compile failed ({type(error).__name__}: {first[0][:160]})") from error
        expected, expected_values, _ = eager(*stacks)
        pairs = [*zip(gradients, expected, strict=True), (values, expected_values)]
        difference = max(((a - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in pairs)
        if difference > TOLERANCE.get(stacks[0].dtype, 1e-2):
            raise CompilationError(f"the compiled evaluation differs from the eager one by {difference:.1e}")
        log.info("Compiled in %.0f s.", time.perf_counter() - start)
