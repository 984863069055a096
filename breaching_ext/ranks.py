"""Several processes that share the candidates of one run, through torch.distributed.

`torchrun --nproc_per_node=K -m breaching_ext ...` starts K processes with the same config. Candidate i is the same
whichever process owns it, because its random numbers depend on i alone. Processes meet where candidates do: in the
consensus, in the question whether anybody goes on, and in the choice at the end. Gloo connects CPUs, NCCL GPUs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .errors import ConfigError

#: How long a process waits for the others before it gives up. One that dies is noticed at once.
_PATIENCE = timedelta(hours=6)

log = logging.getLogger(__name__)


class Ranks:
    """The processes of one run; with `size` 1 every method is the plain thing.

    Args:
        rank, size: this process's number and how many there are.
        device: where tensors must lie to be exchanged.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.size, self.device = rank, size, device or torch.device("cpu")
        self.interrupted = False
        self._handlers: dict[signal.Signals, Any] = {}

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and talks."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Return the candidates, of `count`, that this process owns: a contiguous block, as equal as possible.

        Raises:
            ConfigError: when there are more processes than candidates.
        """
        if count < self.size:
            raise ConfigError(
                f"restarts.num_trials={count} is fewer than the {self.size} processes; valid: {self.size} or more."
            )
        starts = [-(-rank * count // self.size) for rank in (self.rank, self.rank + 1)]  # rounded up
        return range(*starts)

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over all processes."""
        if self.size == 1:
            return value
        summed = value.detach().to(self.device, copy=True)
        dist.all_reduce(summed)
        return summed.to(value.device)

    def number(self, value: int) -> int:
        """Return the sum of an integer over all processes."""
        return int(self.total(torch.tensor(value))) if self.size > 1 else value

    def collect(self, own: torch.Tensor, count: int) -> torch.Tensor:
        """Return all `count` rows from each process's own: their sum over zeros, so not a bit changes."""
        if self.size == 1:
            return own
        rows = own.new_zeros(count, *own.shape[1:])
        block = self.share(count)
        rows[block.start : block.stop] = own
        return self.total(rows)

    def gather(self, value: Any) -> list[Any]:
        """Return every process's value (anything that can be pickled), in order."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def gather_to_first(self, value: Any) -> list[Any]:
        """Return every process's value in order to the first process, and an empty list to the others."""
        if self.size == 1:
            return [value]
        found: list[Any] | None = [None] * self.size if self.first else None
        dist.gather_object(value, found, dst=0)
        return found or []

    def from_first(self, value: Any) -> Any:
        """Return the first process's value (anything that can be pickled)."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    @contextlib.contextmanager
    def interrupts_noted(self) -> Iterator[None]:
        """With several processes, Ctrl-C sets `interrupted` within the block, so that all of them stop together.

        torchrun passes the signal on to processes that have it already; once noted, it is ignored until they are done
        (see :func:`joined`), so that the second one does not end the saving of what the first one stopped.
        """
        if self.size == 1 or threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: Any) -> None:
            self.interrupted = True

        if not self._handlers:
            self._handlers = {kind: signal.signal(kind, note) for kind in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            if not self.interrupted:
                self.restore_handlers()

    def restore_handlers(self) -> None:
        """Let signals do again what they did before :meth:`interrupts_noted`."""
        for kind, handler in self._handlers.items():
            signal.signal(kind, handler)
        self._handlers = {}


@contextlib.contextmanager
def interrupts() -> Iterator[list[int]]:
    """Yield a list that gets an entry for every Ctrl-C within the block, which is raised as ever.

    It tells what code that swallows KeyboardInterrupt does not. Outside the main thread there are no signals to note.
    """
    noted: list[int] = []
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield noted
        return

    def note(number: int, frame: Any) -> None:
        noted.append(number)
        usual(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        if signal.getsignal(signal.SIGINT) is note:  # never throw away what somebody else has put there since
            signal.signal(signal.SIGINT, usual)


_joined: list[Ranks] = []


def current() -> Ranks:
    """Return the processes of this run: those within :func:`joined`, else this one alone.

    A process group that a user has made for something else is left alone.
    """
    return _joined[-1] if _joined else Ranks()


def started_by_torchrun() -> bool:
    """Whether torchrun started this process together with others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def local_processes() -> int:
    """Return how many processes torchrun started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if started_by_torchrun() else 1


def local_device(device: torch.device) -> torch.device:
    """Return this process's own GPU where a device is CUDA in general; other devices as they are."""
    if device.type == "cuda" and device.index is None and started_by_torchrun():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % max(1, torch.cuda.device_count()))
    return device


def _a_gpu_each(device: torch.device) -> bool:
    """Whether every process of this machine has a GPU of its own: NCCL refuses two on one, gloo does not."""
    return device.type == "cuda" and local_processes() <= torch.cuda.device_count()


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Within the block the processes that torchrun started share their runs' candidates; alone, nothing happens.

    Args:
        device: this process's device; it decides between gloo and NCCL, unless torch.distributed is already in use.
            CUDA in general is this process's own GPU.
    """
    own, device = started_by_torchrun() and not dist.is_initialized(), local_device(device)
    if own:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # the others wait while the first measures and compiles, and in a step for the slowest
        dist.init_process_group("nccl" if _a_gpu_each(device) else "gloo", timeout=_PATIENCE)
    if dist.is_available() and dist.is_initialized():
        place = device if dist.get_backend() == "nccl" else torch.device("cpu")
        _joined.append(Ranks(dist.get_rank(), dist.get_world_size(), place))
        log.info("%d processes share the candidates (%s).", dist.get_world_size(), dist.get_backend())
    else:
        _joined.append(Ranks())
    try:
        yield _joined[-1]
    finally:
        _joined.pop().restore_handlers()
        if own:
            dist.destroy_process_group()
