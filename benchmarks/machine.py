"""What the benchmarks say about the machine: its description, its rate, its other processes, and memory peaks."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode

import breaching_ext
from breaching_ext.environment import versions


def describe_machine(device: torch.device, threads: int) -> dict[str, Any]:
    """Return processor, cores, memory, device and versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "avx512": "avx512f" in flags,
        "memory_bytes": memory,
        "threads": threads,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "versions": versions(),
    }


def provenance() -> str:
    """Return the date, and the commit that is measured ("+": with changes), where the package is in a repository."""
    here = Path(breaching_ext.__file__).parent

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    try:
        return f"{date} {git('rev-parse', '--short', 'HEAD')}{'+' if git('status', '--porcelain', '.') else ''}"
    except (OSError, subprocess.CalledProcessError):
        return date


def compute_rates(device: torch.device) -> dict[str, float]:
    """Return float32 Gflop/s with the threads in use, the best of several sizes: matrix products and convolutions.

    The library behind torch.mm may leave a processor's widest instructions unused where the one behind convolutions
    does not (MKL and oneDNN on AMD), so neither alone is the machine's rate.
    """
    products, convolutions = [], []
    with torch.no_grad():
        for size in (256, 512, 1024, 2048):
            left, right = torch.rand(size, size, device=device), torch.rand(size, size, device=device)
            products.append(2 * size**3 / _least_seconds(lambda a=left, b=right: a @ b, device))
        for channels, pixels, images in ((64, 32, 8), (64, 56, 4), (128, 32, 8), (256, 16, 8)):
            x = torch.rand(images, channels, pixels, pixels, device=device).to(memory_format=torch.channels_last)
            w = torch.rand(channels, channels, 3, 3, device=device).to(memory_format=torch.channels_last)
            operations = 2 * images * channels**2 * 9 * pixels**2
            seconds = _least_seconds(lambda x=x, w=w: torch.nn.functional.conv2d(x, w, padding=1), device)
            convolutions.append(operations / seconds)
    return {"matrix products": max(products) / 1e9, "convolutions": max(convolutions) / 1e9}


def _least_seconds(function: Callable[[], Any], device: torch.device, repeats: int = 15) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def flops(function: Callable[[], Any]) -> float:
    """Return the floating-point operations of matrix products and convolutions in a call."""
    own = {torch.ops.aten.convolution_backward: _convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        function()
    return float(counter.get_total_flops())


def _convolution_backward(output: Any, x: Any, weight: Any, *more: Any, **_kwargs: Any) -> int:
    """Count as much for each gradient as for the convolution itself. torch counts a grouped weight's once a group."""
    _bias, _stride, _padding, _dilation, transposed, _output_padding, _groups, wanted = more
    places = x if transposed else output
    return sum(map(bool, wanted[:2])) * 2 * math.prod(weight) * places[0] * math.prod(places[2:])


def operation_shares(function: Callable[[], Any], most: int = 8) -> dict[str, float]:
    """Return the operations that take most of a call's CPU time, and their shares of it."""
    function()
    with _standard_error_closed(), torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(3):
            function()
    events = sorted(profiler.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return {event.key.split(" fx")[0][:40]: round(event.self_cpu_time_total / total, 3) for event in events[:most]}


@contextlib.contextmanager
def _standard_error_closed() -> Iterator[None]:
    """The profiler's library writes to the descriptor itself, whatever Python's sys.stderr is."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


class OtherProcesses:
    """What other processes take of the machine's processors while something is measured (Linux)."""

    def __init__(self) -> None:
        self._start = self._busy()

    def share(self) -> float | None:
        """Return their processor time over the time that passed, in processors; None where nobody knows."""
        if self._start is None or (now := self._busy()) is None:
            return None
        others, clock = (after - before for after, before in zip(now, self._start, strict=True))
        return round(max(0.0, others) / clock, 2)

    @staticmethod
    def _busy() -> tuple[float, float] | None:
        try:
            fields = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:]
        except OSError:
            return None
        user, nice, system, _idle, _waiting, interrupts, soft = (int(f) for f in fields[:7])
        own = os.times()
        ticks = (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")
        return ticks - sum(own[:4]), time.perf_counter()


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
