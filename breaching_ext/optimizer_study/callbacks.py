"""What happens after a Hydra multirun: its results become one sheet and one table."""

from __future__ import annotations

from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class MergeResults(Callback):
    """Merge once all jobs are done; a job alone could not know when it is the last."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Merge the results below the study's folder."""
        from .study import merge_results

        merge_results([*(config.sources or []), config.out], config.out)
