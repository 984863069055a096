"""How much memory an evaluation takes, and how much there is."""

from __future__ import annotations

import contextlib
import logging
import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import ConfigError
from ..free_ram import free_ram
from ..ranks import local_processes

log = logging.getLogger(__name__)

#: Share of the free memory that a run takes by itself; the rest is for workspaces and for the neighbours.
SHARE = 0.8
#: What an evaluation takes with workspaces, reordered copies and gaps in the heap, relative to the tensors that can be
#: counted (benchmarks/results/matching: at most 1.6).
_WORKSPACE = 1.75
#: Copies of a candidate that exist besides an evaluation: itself, best, gradient, moments, box, frozen.
_COPIES = 8
_UNITS = {"": 1, **{p + u: f**e for u, f in (("B", 1000), ("iB", 1024)) for e, p in enumerate("KMGT", 1)}, "B": 1}


def parse_bytes(value: int | str | None) -> int | None:
    """Return bytes for `impl.memory_budget`: a number of bytes, or text such as "4GiB", "1.5 GB" or "500MiB".

    Raises:
        ConfigError: for anything else, or nothing above 0.
    """
    if value is None:
        return None
    found = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([A-Za-z]*)", str(value).strip())
    units = {name.lower(): factor for name, factor in _UNITS.items()}
    if found is None or found[2].lower() not in units or float(found[1]) <= 0:
        raise ConfigError(f"impl.memory_budget={value} is not possible; valid: empty, bytes, or as 500MB, 4GiB.")
    return int(float(found[1]) * units[found[2].lower()])


def show_bytes(value: float) -> str:
    """Return bytes as text for a log line: 12.3 MiB."""
    power = next((e for e in (3, 2, 1) if value >= 1024**e), 0)
    shown = value / 1024**power
    return f"{round(shown, 1 if shown < 100 else None):g} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that this process may still take on a device; None where nobody knows.

    Processes that torchrun started on this machine share its memory, or a GPU's, equally.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        ours = free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return ours // -(-local_processes() // torch.cuda.device_count())  # where processes outnumber the GPUs
    if device.type != "cpu":
        return None
    ram = free_ram()
    return None if ram is None else ram // local_processes()


class _LiveTensors(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {id(storage) for storage in _storages((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for storage in _storages(result):
            if id(storage) not in given:
                self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size


def _storages(values: Any) -> list[torch.UntypedStorage]:
    found = []
    for value in tree_leaves(values):
        if isinstance(value, torch.Tensor):
            with contextlib.suppress(NotImplementedError, RuntimeError):  # wrappers and sparse tensors have none
                found.append(value.untyped_storage())
    return found


def peak_memory(function: Callable[[], Any], device: torch.device) -> tuple[Any, int]:
    """Run a function; returns its result and the most bytes that its tensors took at one time.

    On CUDA the allocator says it; elsewhere tensors are counted as eager operations make and drop them. What a
    library takes inside one operation (a convolution's workspace) is not seen there.
    """
    if device.type == "cuda":
        function()  # the first call also takes what libraries keep, and what kernels are chosen with
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = function()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    with _LiveTensors() as counter:
        result = function()
    return result, counter.peak


@dataclass(frozen=True)
class MemoryPlan:
    """How many candidates are evaluated at a time, and why.

    Attributes:
        per_candidate: bytes that one candidate's evaluation takes, measured on the first one (0: not measured).
        budget: bytes for the whole run; None where neither the config nor the device says.
        chunk: candidates at a time; None: all.
    """

    per_candidate: int = 0
    budget: int | None = None
    chunk: int | None = None


def plan_memory(starts: Sequence[torch.Tensor], per_candidate: int, given: int | None, copies: int = 0) -> MemoryPlan:
    """Return how many candidates fit at a time into a given budget, or into what the device has.

    Args:
        starts: the candidates, each (N, ...).
        per_candidate: bytes that one candidate's evaluation takes.
        given: the config's budget in bytes, for this process; None: :data:`SHARE` of what is free.
        copies: copies of every candidate that its optimizer keeps beyond Adam's two moments: L-BFGS's history.

    Raises:
        ConfigError: when one candidate alone is above the config's budget.
    """
    free = free_memory(starts[0].device)
    budget = given if given is not None else (None if free is None else int(SHARE * free))
    if budget is None:
        return MemoryPlan(per_candidate)
    states = (_COPIES + copies) * sum(s.numel() * s.element_size() for s in starts)
    fitting = int((budget - states) / max(1.0, _WORKSPACE * per_candidate))
    if fitting < 1 and given is not None:
        needed = int(states + _WORKSPACE * per_candidate) + 1
        raise ConfigError(
            f"impl.memory_budget={given} is below what one candidate at a time takes; valid: {needed} "
            f"({show_bytes(needed)}) or more."
        )
    count = len(starts[0])
    if fitting >= count:
        return MemoryPlan(per_candidate, budget)
    log.info(
        "Memory: %s for a candidate, %s in all, so at most %d of %d candidates are evaluated at a time.",
        *(show_bytes(per_candidate), show_bytes(budget), max(1, fitting), count),
    )
    return MemoryPlan(per_candidate, budget, max(1, fitting))
