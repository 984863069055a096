"""`breaching-ext-lora`: run what is missing of a ladder, then write its table and plot.

breaching-ext-lora                                        # the small convolutional model, all phases and ranks
breaching-ext-lora model=vit_tokens ranks=[1,4,16,full] out=outputs/lora_vit
breaching-ext-lora phases=[0] seeds=[0]                   # the cheapest falsifying experiment
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import hydra
import torch

from ..cli import _silence_upstream
from ..errors import BreachingExtError

log = logging.getLogger(__name__)


def run(cfg: Any) -> list[Path]:
    """Run the ladder that a composed config describes.

    Raises:
        BreachingExtError: for a config that cannot work, before anything is computed.
    """
    from ..run import resolve_device
    from .ladder import run_ladder
    from .report import write_report
    from .settings import Settings

    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    settings = Settings.from_config(cfg)
    ladder = run_ladder(settings, cfg.out, resolve_device(cfg.device))
    return write_report(ladder.rows, cfg.out, settings.ceiling, ladder.images)


@hydra.main(config_path="pkg://breaching.config", config_name="lora/ladder", version_base="1.3")
def _application(cfg: Any) -> None:
    _silence_upstream()
    try:
        files = run(cfg)
    except BreachingExtError as error:
        log.error("%s", error)
        sys.exit(1)
    log.info("Wrote %s.", ", ".join(map(str, files)))


def main() -> None:
    """Entry point of the console command."""
    _silence_upstream()
    for name in ("breaching", "breaching_ext.attacks", "breaching_ext.matching"):
        logging.getLogger(name).setLevel(logging.WARNING)  # a line a cell is enough: the bar's
    _application()


if __name__ == "__main__":
    main()
