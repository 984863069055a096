"""The finished cells of a grid that is being trained, in a file from which a later call goes on.

A line of JSON a chunk, appended as soon as the chunk is trained. Keeping a chunk costs what its own record costs,
however many were kept before, so none is ever held back: what a kill loses is the chunk in training. A line that a kill
cut short is no JSON and does not count.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .config import require
from .description import describe
from .records import GridSearchResult
from .storage import plain, to_json_floats, write_atomically
from .task import Cell, TrainingTask

VALID = (
    "a file of this run, or a new one: it holds an unfinished run of other settings, model or data, or of another "
    "version of this package (delete it)"
)


class Checkpoint:
    """The file of one run.

    Args:
        path: The file; it need not be there.
        task: What is trained.
    """

    def __init__(self, path: str | Path, task: TrainingTask) -> None:
        """Find out what tells this run from others."""
        self.path = Path(path)
        self._run = {"fingerprint": fingerprint(describe(task)), "start": to_json_floats(start_of(task))}
        self._tolerance = torch.finfo(task.train.dtype).eps ** 0.5

    def read(self) -> tuple[dict[Cell, GridSearchResult], dict[str, float]]:
        """Return the cells that are kept, also those that the grid does not ask for, and the seconds they took.

        Raises:
            ValueError: If the file is another run's.
        """
        if not self.path.exists():
            return {}, {}
        kept = [line for line in map(_parsed, self.path.read_bytes().splitlines()) if line is not None]
        require(bool(kept) and all(map(self._is_ours, kept)), "checkpoint", str(self.path), VALID)
        results = (GridSearchResult.from_dict(values) for line in kept for values in line["results"])
        return {result.cell: result for result in results}, kept[-1]["seconds"]

    def add(self, results: Sequence[GridSearchResult], seconds: dict[str, float]) -> None:
        """Append finished cells, and the seconds that the run has taken so far by their names in the records."""
        content = {**self._run, "seconds": seconds, "results": [result.to_dict() for result in results]}
        text = json.dumps(content, allow_nan=False, default=plain)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = f"\n{text}\n".encode()  # the first line break ends a line that was cut short
        if not self.path.exists():  # whole or not there: a file without a whole line is nobody's
            write_atomically(self.path, lambda file: file.write(line))
            return
        with self.path.open("ab") as file:
            file.write(line)

    def _is_ours(self, line: dict[str, Any]) -> bool:
        """Whether a line was kept by this run."""
        if line.get("fingerprint") != self._run["fingerprint"] or "start" not in line:
            return False
        pairs = zip(line["start"], self._run["start"], strict=True)
        return all(a == b or (a and b and math.isclose(a, b, rel_tol=self._tolerance)) for a, b in pairs)


def fingerprint(description: dict[str, Any]) -> str:
    """Hash of what decides the numbers of a run: all of its description but versions and threads."""
    kept = {key: value for key, value in description.items() if key not in ("versions", "threads")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=plain).encode()).hexdigest()


def start_of(task: TrainingTask) -> list[float]:
    """Loss and gradient norm of the initial model on the first batch.

    They tell models apart that have the same text and the same weights but other code. They are compared to half of
    the digits of the type, since other machines and numbers of threads round otherwise.
    """
    model, batch = copy.deepcopy(task.model), next(task.batches(0))  # a copy: batch norm counts what it sees
    with torch.random.fork_rng():  # a model that draws starts alike in every call
        torch.manual_seed(task.seed)
        loss = F.mse_loss(model(batch), batch)
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    norms = [gradient.detach().norm() for gradient in found if gradient is not None]
    return [float(loss.detach()), float(torch.stack(norms).norm()) if norms else 0.0]


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A line of the file, or None for one that is empty or was cut short."""
    try:
        content = json.loads(line)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None
