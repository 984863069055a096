"""What a run has taken so far, over interruptions."""

from __future__ import annotations

import time


class Spent:
    """Seconds that a run has taken, interrupted calls before included: of the clock and of the processors."""

    def __init__(self) -> None:
        """Start counting."""
        self.before = {"wall_seconds": 0.0, "cpu_seconds": 0.0}
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def so_far(self) -> dict[str, float]:
        """Return both by their names in the records."""
        now = {"wall_seconds": time.perf_counter() - self._wall, "cpu_seconds": time.process_time() - self._cpu}
        return {name: self.before[name] + seconds for name, seconds in now.items()}
