"""What the benchmarks say about the machine: its description, its matrix-product rate, and memory peaks."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode

from breaching_ext.run import versions


def describe_machine(device: torch.device, threads: int) -> dict[str, Any]:
    """Return processor, cores, memory, device and versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "threads": threads,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "versions": versions(),
    }


def matmul_rate(device: torch.device, size: int = 1024) -> float:
    """Return the float32 matrix-product rate in Gflop/s with the threads in use, median of 9."""
    left, right = torch.rand(size, size, device=device), torch.rand(size, size, device=device)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times[1:]) / 1e9


def flops(function: Callable[[], Any]) -> float:
    """Return the floating-point operations of matrix products and convolutions in a call."""
    with FlopCounterMode(display=False) as counter:
        function()
    return float(counter.get_total_flops())


def operation_shares(function: Callable[[], Any], most: int = 8) -> dict[str, float]:
    """Return the operations that take most of a call's CPU time, and their shares of it."""
    function()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(3):
            function()
    events = sorted(profiler.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return {event.key: round(event.self_cpu_time_total / total, 3) for event in events[:most]}


def peak_rss(function: Callable[[], Any], device: torch.device) -> int | None:
    """Return the bytes by which a call raises the process's memory at most (on CUDA: the allocator's); None: unknown.

    Linux only. Memory that the C library holds back from earlier calls is given back first.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the high-water mark
        before = _status("VmRSS")
        function()
        return _status("VmHWM") - before
    except OSError:
        function()
        return None


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
