"""Longer measurements of benchmarks/matching.py: whole runs, and growth with the number of candidates."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from typing import Any

import torch
from machine import OtherProcesses, peak_rss
from matching_case import Case, fresh_caches, seconds_each


def measure_total(model: str, batch: int, candidates: int, device: torch.device, iterations: int) -> dict[str, Any]:
    """Run everything to the end, compilation included, and return the seconds."""
    seconds: dict[str, Any] = {"iterations": iterations, "candidates": candidates}
    with fresh_caches():
        case, others = Case(model, batch, candidates, device), OtherProcesses()
        for name in ("compile", "auto", "vmap"):
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(dir=os.environ["BREACHING_EXT_CACHE"])
            torch._dynamo.reset()
            start = time.perf_counter()
            built, _ = case.build(name)
            case.joint_run(built)(iterations)
            seconds[name] = time.perf_counter() - start
            seconds[f"{name}_engine"] = built.engine.name
        start = time.perf_counter()
        for _ in range(candidates):
            case.breaching_trial(iterations)
        seconds["breaching"] = time.perf_counter() - start
        seconds["other_processes"] = others.share()
    return seconds


def measure_growth(model: str, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Return time and memory of the vmap engine against N, in one stack and in chunks of 8 candidates."""
    points = []
    for candidates in (1, 2, 4, 8, 16, 32, 64):
        for chunk in (None, 8):
            case = Case(model, 1, candidates, device)
            built, _ = case.build("vmap")
            built.engine.evaluation.chunk = chunk
            runner = case.joint_run(built)
            runner(2)  # records the graph of a chunk
            memory = peak_rss(lambda runner=runner: runner(5), device)
            spent = statistics.median(seconds_each(runner, 10) for _ in range(rounds))
            points.append({"model": model, "candidates": candidates, "chunk": chunk, "peak_rss_bytes": memory})
            points[-1]["ms"] = 1000 * spent
    return points
