"""One stream of random numbers per candidate.

Candidate i draws everything (start, noise, augmentations) from a stream seeded with seed + i, so its path does not
depend on how many candidates there are, and equals a sequential trial that was started with that seed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch


class CandidateStreams:
    """The random states of N candidates on the CPU and, if the candidates live there, on one GPU (CUDA or MPS).

    Args:
        seeds: one for each candidate.
        device: where candidates live.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.device = device
        self.states: list[tuple[torch.Tensor, ...]] = []
        with self._restored():
            for seed in seeds:
                torch.manual_seed(seed)
                self.states.append(self._get())

    @contextlib.contextmanager
    def use(self, index: int) -> Iterator[None]:
        """Within the block the global generators are candidate `index`'s; they go on where it last stopped."""
        with self._restored():
            self._set(self.states[index])
            try:
                yield
            finally:
                self.states[index] = self._get()

    @contextlib.contextmanager
    def _restored(self) -> Iterator[None]:
        before = self._get()
        try:
            yield
        finally:
            self._set(before)

    def _get(self) -> tuple[torch.Tensor, ...]:
        cpu = torch.get_rng_state()
        if self.device.type == "cuda":
            return cpu, torch.cuda.get_rng_state(self.device)
        return (cpu, torch.mps.get_rng_state()) if self.device.type == "mps" else (cpu,)

    def _set(self, state: tuple[torch.Tensor, ...]) -> None:
        torch.set_rng_state(state[0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state[1], self.device)
        elif self.device.type == "mps":
            torch.mps.set_rng_state(state[1])
