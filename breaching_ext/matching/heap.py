"""Keep the memory that a step frees for the next step (Linux with glibc).

A step of a large stack allocates and frees tensors of tens of megabytes. glibc maps a block of more than 32 MiB anew
every time, and gives free memory above 64 MiB at the heap's end back, so that the kernel has to clear the pages in
every step. For eight ResNet18 candidates that takes as long as the arithmetic. While a run lasts, freed memory
therefore stays with the process; afterwards it goes back, and glibc is left as it is after a program's first large
blocks. See mallopt(3).
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import platform
from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4  # names of malloc.h, without M_
_MIB = 2**20
_KEEPING = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 64 * _MIB}
#: The largest values that glibc comes to by itself, and its defaults for the other two.
_USUAL = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 32 * _MIB, _TRIM_THRESHOLD: 64 * _MIB, _TOP_PAD: 128 * 1024}

_depth = 0


@contextlib.contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """Within the block, freed memory stays with the process. Blocks may be nested; also usable as a decorator.

    Where the allocator is another one, or the user has set it up in the environment, nothing changes.
    """
    global _depth
    libc = _glibc()
    if libc is None:
        yield
        return
    _depth += 1
    if _depth == 1:
        _set(libc.mallopt, _KEEPING)
    try:
        yield
    finally:
        _depth -= 1
        if _depth == 0:
            _set(libc.mallopt, _USUAL)
            libc.malloc_trim(0)


def give_back() -> None:
    """Give what is free back to the system at once, within such a block, too.

    What comes next needs blocks of other sizes, and would otherwise take them beside those that are kept.
    """
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _set(mallopt: Callable[[int, int], int], values: dict[int, int]) -> None:
    refused = [name for name, value in values.items() if not mallopt(name, value)]
    if refused:
        log.debug("mallopt does not take %s.", refused)


def _glibc() -> ctypes.CDLL | None:
    """Return the C library where it is glibc and nobody has tuned it."""
    tuned = any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get(
        "GLIBC_TUNABLES", ""
    )
    if tuned or platform.libc_ver()[0] != "glibc":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
