"""How much of the machine's memory a process may still take: what is free, and what its control groups allow.

Schedulers (SLURM) and containers limit a group of processes. A process that takes more than its group has left is
killed, without an exception that could be caught, so a plan must know.

References:
    Linux, Documentation/admin-guide/cgroup-v2.rst (memory.max, memory.current) and cgroup-v1/memory.rst.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

#: Where the kernel says it.
ROOT = Path("/")
#: Files of the two versions of control groups: the limit, what is used, and the used part that can be given back.
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = ("memory.max", "memory.current", "inactive_file")


def free_ram(root: Path = ROOT) -> int | None:
    """Return the bytes that this process may still take, or None where the system does not say.

    Args:
        root: the file system's root, another one in tests.
    """
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    for folder, names in _groups(root):
        left = _left(folder, *names)
        free = free if left is None else min(free, left)
    return max(free, 0)


def _groups(root: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Yield every control group that limits this process's memory: its own and those around it."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in [*lines, "0::/", "0:memory:/"]:  # the last two: what a container sees as its root
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / ("sys/fs/cgroup/memory" if controllers else "sys/fs/cgroup")
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            yield base.joinpath(*parts[:depth]), _V1 if controllers else _V2


def _left(folder: Path, limit: str, used: str, reclaimable: str) -> int | None:
    """Return what a group may still take, or None where it has no limit."""
    try:
        most, taken = (int((folder / name).read_text(encoding="ascii")) for name in (limit, used))
    except (OSError, ValueError):  # "max", and groups that are not visible from inside
        return None
    try:
        statistics = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
        cached = sum(int(line.split()[1]) for line in statistics if line.split()[0] == reclaimable)
    except (OSError, ValueError, IndexError):
        cached = 0
    return most - max(taken - cached, 0)
