"""A compiled evaluation in several threads at once, each with candidates and processors of its own.

Candidates do not depend on each other until the step. With all processors inside one operation, every operation ends
with the slower of them, and what lies between two operations runs on one. With a share of the candidates each, they
meet once an evaluation. Two threads with a processor each take 4 to 12 % less than one with both (docs/speed.md).

Only compiled code that calls torch's operators from C++ gains: while Python runs between operations, it runs one
thread at a time.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait

import torch

from .evaluation import Evaluate, in_parts

log = logging.getLogger(__name__)

#: A share is at least so many candidates: what an operation costs beside its arithmetic is paid once a share.
LEAST = 4


def shares(count: int, device: torch.device) -> int:
    """Return among how many threads `count` candidates are shared: 1 leaves them together."""
    return max(1, min(torch.get_num_threads(), count // LEAST)) if device.type == "cpu" else 1


def in_parallel(compiled: Callable[[list[torch.Tensor]], Evaluate], stacks: list[torch.Tensor]) -> Evaluate:
    """Return an evaluation of stacks of these shapes, shared among threads where that pays.

    Args:
        compiled: compiles an evaluation for stacks of the shapes that it is given.
        stacks: each (N, ...).
    """
    count = len(stacks[0])
    number = shares(count, stacks[0].device)
    if number == 1:
        return compiled(stacks)
    size, threads = -(-count // number), torch.get_num_threads() // number
    with _threads(threads):  # the number is compiled into the code
        function = compiled([stack[:size] for stack in stacks])
    if getattr(function, "taken", 0):  # torch's usual form, whose operators are called from Python
        return compiled(stacks)
    log.debug("%d candidates are shared among %d threads.", count, number)
    return InParallel(function, size, number, threads)


class InParallel:
    """Evaluates stacks in parts of `size` candidates, all at once.

    Args:
        function: evaluates a part.
        size: candidates in a part.
        number: how many threads there are.
        threads: how many threads torch's operations may use in each of them.
    """

    def __init__(self, function: Evaluate, size: int, number: int, threads: int = 1) -> None:
        self._function, self._size = function, size
        self._pool = ThreadPoolExecutor(number, "candidates", initializer=_use, initargs=(threads,))
        together, before = threading.Barrier(number), torch.get_num_threads()
        wait([self._pool.submit(together.wait) for _ in range(number)])
        torch.set_num_threads(before)  # a thread sets what later threads begin with, too

    def __call__(self, *stacks: torch.Tensor) -> tuple:
        """Return what the function returns; an error of a part is raised when all have ended."""
        return in_parts(list(stacks), self._size, self._all)

    def _all(self, parts: list[list[torch.Tensor]]) -> list[tuple]:
        futures = [self._pool.submit(self._function, *part) for part in parts]
        wait(futures)
        return [future.result() for future in futures]


def _use(threads: int) -> None:
    torch.get_num_threads()  # the first use of torch in a thread sets it to the process's number; after that it stays
    torch.set_num_threads(threads)


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
