"""What happens after a Hydra multirun: its results become one sheet and one table."""

from __future__ import annotations

import logging
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

log = logging.getLogger(__name__)


class MergeResults(Callback):
    """Merge once all jobs are done; a job alone could not know when it is the last."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Merge the results below the study's folder."""
        from .merging import folders_to_merge, merge_results

        try:
            files = merge_results(folders_to_merge(config.sources, config.out), config.out)
        except Exception as error:  # Hydra makes a warning of what a callback raises, and ends as if all were well
            log.error("The results are not merged: %s", error)
            raise SystemExit(1) from error
        log.info("Wrote %s.", ", ".join(map(str, files)))
