"""Checkpoints of a joint run: written atomically every so often, picked up by the next run of the same attack."""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from ..errors import ConfigError
from ..files import write_atomically
from ..matching.state import on_device
from ..ranks import Ranks
from ..tensor_files import raw_bytes, read_tensors

log = logging.getLogger(__name__)

#: Raised where a state changes its form or its meaning, so that older checkpoints are refused.
_FORMAT = 4
_NOT_PART_OF_THE_RUN = ("checkpoint_every", "checkpoint_path", "progress", "memory_budget")


def saved_engine(path: str | Path | None) -> str | None:
    """Return the engine of the run whose checkpoint lies there, or None where there is no checkpoint."""
    if path is None or not Path(path).expanduser().exists():
        return None
    return _read(Path(path).expanduser())["engine"]


def _read(path: str | Path) -> dict[str, Any]:
    return read_tensors(path, "impl.checkpoint_path", "a checkpoint", ("fingerprint", "engine", "states"))


class Checkpoint:
    """The file in which a run keeps its state.

    Args:
        path: the file.
        every: iterations between two checkpoints.
        engine: the engine's name; a resumed run takes the same one.
        ranks: the processes of the run; the first one writes the states of all.
        fingerprint: identifies config, shared gradients and engine (see :func:`fingerprint`); a checkpoint of
            another run is refused rather than continued.
        seed: the run's, which may be empty in its config; for the error where another process drew another.

    Attributes:
        seconds_before: what the run had taken up to the checkpoint that it goes on from; 0 for a new run.
    """

    def __init__(
        self,
        path: str | Path,
        every: int,
        fingerprint: str,
        engine: str = "",
        ranks: Ranks | None = None,
        seed: int | None = None,
    ) -> None:
        self.seed = seed
        self.path, self.every, self.fingerprint, self.engine = Path(path).expanduser(), every, fingerprint, engine
        self.ranks = ranks or Ranks()
        self.seconds_before, self._clock = 0.0, time.perf_counter()

    def load(self) -> dict[str, Any] | None:
        """Return this process's saved state, or None where there is no checkpoint.

        Raises:
            ConfigError: when the file belongs to another run.
        """
        states = self.ranks.from_first(self._states() if self.ranks.first else None)
        return None if states is None else states[self.ranks.rank]

    def _states(self) -> list[dict[str, Any]] | None:
        if not self.path.exists():
            return None
        content = _read(self.path)
        if content["fingerprint"] != self.fingerprint:
            other = content.get("seed")
            if other not in (None, self.seed):
                raise ConfigError(
                    f"impl.checkpoint_path={self.path} belongs to a run with restarts.seed={other}, and this one has "
                    f"{self.seed}; valid to go on: restarts.seed={other}. Otherwise choose another path."
                )
            raise ConfigError(
                f"impl.checkpoint_path={self.path} belongs to a run with another config, model, gradient or engine, "
                "or of another version of this package; remove it or choose another path."
            )
        self.seconds_before = content.get("seconds", 0.0)
        log.info("Resuming after iteration %d from %s.", content["states"][0]["iteration"], self.path)
        return content["states"]

    def due(self, iteration: int) -> bool:
        """Whether to save after this 0-based iteration."""
        return (iteration + 1) % self.every == 0

    def save(self, state: dict[str, Any]) -> None:
        """Write the state; a run that is killed meanwhile leaves the previous checkpoint whole.

        A file that cannot be written is an error in the log, not the end of the run.
        """
        if self.ranks.size > 1:  # what is sent from a GPU would be put on that GPU by the process that gets it
            state = on_device(state, torch.device("cpu"))
        states = self.ranks.gather_to_first(state)
        if not self.ranks.first:
            return
        seconds = self.seconds_before + time.perf_counter() - self._clock
        about = {"fingerprint": self.fingerprint, "engine": self.engine, "seed": self.seed}
        content = {**about, "states": states, "seconds": seconds}
        try:
            write_atomically(self.path, lambda target: torch.save(content, target))
        except (OSError, RuntimeError) as error:  # torch's writer raises the latter where the disk is full
            log.error("The checkpoint %s could not be written (%s); the run goes on.", self.path, error)

    def remove(self) -> None:
        """Forget the checkpoint of a run that is finished."""
        if self.ranks.first:
            self.path.unlink(missing_ok=True)


class KeepsCheckpoint:
    """An attack whose checkpoint stays until its results are safe: returned, or, for `run`, written.

    Attributes:
        keep_checkpoint: leave it there when `reconstruct` returns; the caller calls :meth:`forget_checkpoint`.
        seconds_before: what the run had taken in earlier processes, once `reconstruct` has returned.
    """

    keep_checkpoint = False
    seconds_before = 0.0
    _kept: Checkpoint | None = None

    def forget_checkpoint(self) -> None:
        """Remove the checkpoint of the run that is finished."""
        if self._kept is not None:
            self._kept.remove()
        self._kept = None

    def _finished(self, interrupted: bool) -> None:
        """Call where `reconstruct` returns; the checkpoint of an interrupted run stays, for the next one to go on."""
        self.seconds_before = self._kept.seconds_before if self._kept is not None else 0.0
        if interrupted:
            self._kept = None
        elif not self.keep_checkpoint:
            self.forget_checkpoint()


def fingerprint(
    cfg: Any,
    shared_data: Sequence[dict[str, Any]],
    starts: Sequence[torch.Tensor],
    engine: str,
    also: Iterable[torch.Tensor] = (),
) -> str:
    """Return a digest of everything that decides a run: config, engine, gradients, starts and what `also` is known.

    The latter are the labels (given or inferred), the models' parameters and their buffers, which also say whether
    these were sent. `engine` says more than its name, the seed in effect among it (the
    config's may be empty); addresses in it, which no two processes share, do not count.
    """
    settings = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(settings, dict)
    settings["impl"] = {k: v for k, v in settings["impl"].items() if k not in _NOT_PART_OF_THE_RUN}
    settings["restarts"] = {k: v for k, v in (settings.get("restarts") or {}).items() if k != "seed"}  # see `engine`
    engine = re.sub(r" at 0x[0-9a-f]+", "", engine)
    sha = hashlib.sha256(f"{_FORMAT}\n{engine}\n{OmegaConf.to_yaml(OmegaConf.create(settings))}".encode())
    for tensor in [*starts, *(g for data in shared_data for g in data["gradients"]), *also]:
        sha.update(raw_bytes(tensor))
    return sha.hexdigest()
