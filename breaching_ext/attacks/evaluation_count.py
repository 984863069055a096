"""How often an attack of Breaching's evaluates its objective and gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class EvaluationCount:
    """A number of evaluations, each of one candidate at all queries."""

    def __init__(self) -> None:
        self.number = 0


@contextmanager
def evaluations_counted(attacker: Any) -> Iterator[EvaluationCount | None]:
    """Within the block, count the calls of the closures by which Breaching's attacks go, in every trial.

    An optimizer may call one more than once a step (L-BFGS).

    Args:
        attacker: an attack.

    Yields:
        The count so far; None for an attack that has no such closures (Breaching's analytic ones).
    """
    name = "_compute_objective"
    original, own = getattr(attacker, name, None), vars(attacker).get(name)
    if original is None:
        yield None
        return
    count = EvaluationCount()

    def compute_objective(*args: Any, **kwargs: Any) -> Callable[[], Any]:
        closure = original(*args, **kwargs)

        def counted() -> Any:
            count.number += 1
            return closure()

        return counted

    setattr(attacker, name, compute_objective)
    try:
        yield count
    finally:
        delattr(attacker, name)
        if own is not None:
            setattr(attacker, name, own)
