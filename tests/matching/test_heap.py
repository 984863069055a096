"""While a run lasts, freed memory stays with the process; afterwards it goes back."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from breaching_ext.matching import heap

PROBE = """
import resource, torch
from breaching_ext.matching import heap
from breaching_ext.matching.heap import keeping_freed_memory

torch.set_num_threads(1)


def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(16 * 2**20)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096


faults()
before = faults(), resident()
with keeping_freed_memory():
    with keeping_freed_memory():
        faults(), faults()  # blocks may change places once
    within = faults(), resident()
    heap.give_back()
    given = resident()
after = resident()
print(*before, *within, given, after)
"""


def probe(**environment: str) -> list[int]:
    found = subprocess.run(
        [sys.executable, "-c", PROBE], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return [int(number) for number in found.stdout.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_is_kept_within_and_given_back_afterwards():
    faults_before, resident_before, faults_within, resident_within, resident_given, resident_after = probe()
    if faults_before < 1000:
        pytest.skip("the system's pages are huge")
    assert faults_within < faults_before / 10  # no page is cleared again
    assert resident_within > resident_before + 50 * 2**20
    assert resident_given < resident_before + 16 * 2**20  # at once, where the block goes on
    assert resident_after < resident_before + 16 * 2**20


@pytest.mark.parametrize("tuned", [{"MALLOC_ARENA_MAX": "2"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1"}])
def test_a_users_own_settings_stay(monkeypatch, tuned):
    for name, value in tuned.items():
        monkeypatch.setenv(name, value)
    assert heap._glibc() is None
    with heap.keeping_freed_memory():
        assert heap._depth == 0


def test_an_error_ends_it_too(monkeypatch):
    calls = []
    monkeypatch.setattr(heap, "_set", lambda mallopt, values: calls.append(values))
    monkeypatch.setattr(
        heap,
        "_glibc",
        lambda: pytest.importorskip("types").SimpleNamespace(mallopt=None, malloc_trim=lambda pad: calls.append(pad)),
    )
    with pytest.raises(ZeroDivisionError), heap.keeping_freed_memory():
        1 / 0  # noqa: B018
    assert calls == [heap._KEEPING, heap._USUAL, 0]
