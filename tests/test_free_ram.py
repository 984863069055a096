"""Free memory as the kernel tells it, on made-up systems."""

from __future__ import annotations

from pathlib import Path

import pytest

from breaching_ext.free_ram import free_ram

GIB = 1024**3


def system(root: Path, cgroup: str, **groups: tuple[object, int, int]) -> Path:
    """A machine with 64 GiB free; groups: folder below sys/fs/cgroup -> (limit, used, of it in caches)."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {64 * GIB // 1024} kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, (limit, used, cached) in groups.items():
        folder = root / "sys/fs/cgroup" / name
        folder.mkdir(parents=True, exist_ok=True)
        old = name.startswith("memory")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if old else ("memory.max", "memory.current")
        for file, value in zip(names, (limit, used), strict=True):
            (folder / file).write_text(f"{value}\n")
        (folder / "memory.stat").write_text(f"anon 5\n{'total_' if old else ''}inactive_file {cached}\n")
    return root


def test_a_machine_without_limits(tmp_path):
    assert free_ram(system(tmp_path, "0::/user.slice\n")) == 64 * GIB


def test_a_jobs_limit_is_found_below_the_root_and_its_neighbours_count(tmp_path):
    """SLURM on a host without namespaces: the limit lies two groups up, and caches can be given back."""
    groups = {"job": (16 * GIB, 6 * GIB, GIB), "job/step/task": ("max", GIB, 0)}
    assert free_ram(system(tmp_path, "0::/job/step/task\n", **groups)) == 11 * GIB


@pytest.mark.parametrize(
    ("cgroup", "where"),
    [
        ("0::/\n", "."),  # a container with a namespace of its own
        ("4:memory:/docker/abc\n2:cpu:/docker/abc\n", "memory/docker/abc"),
        ("4:memory:/docker/abc\n", "memory"),  # the group's folder is not visible from inside, its root is
        ("", "."),
    ],
)
def test_containers_of_both_versions(tmp_path, cgroup, where):
    assert free_ram(system(tmp_path, cgroup, **{where: (8 * GIB, 3 * GIB, 0)})) == 5 * GIB


def test_a_group_above_its_limit_has_nothing_left(tmp_path):
    assert free_ram(system(tmp_path, "0::/\n", **{".": (GIB, 2 * GIB, 0)})) == 0


def test_a_system_that_does_not_say(tmp_path):
    assert free_ram(tmp_path) is None


def test_this_machine():
    found = free_ram()
    assert found is None or 0 < found < 2**50
