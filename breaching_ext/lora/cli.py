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
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from ..cli import silence_upstream
from ..errors import BreachingExtError, ConfigError
from ..values import check_whole

log = logging.getLogger(__name__)

#: Exit status after Ctrl-C, as a shell gives it.
INTERRUPTED = 130


def run(cfg: Any) -> list[Path]:
    """Run the ladder that a composed config describes.

    Returns:
        The files of the report.

    Raises:
        BreachingExtError: for a config that cannot work, before anything is computed; for a cell that cannot be run,
            after the report of those before it.
        KeyboardInterrupt: after Ctrl-C, and the report.
    """
    from ..environment import resolve_device
    from .ladder import Ladder, run_ladder
    from .report import write_report
    from .settings import Settings

    check_whole("threads", cfg.threads, 1, may_be_empty=True)
    if not cfg.out:
        raise ConfigError(f"out={cfg.out} is not possible; valid: a folder, which need not be there.")
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    settings = Settings.from_config(cfg)
    device = resolve_device(cfg.device)
    before = Ladder.open(cfg.out, settings)  # of other settings: nothing of it is reported
    try:
        run_ladder(settings, cfg.out, device)
    finally:  # also where a cell fails: those before it are there
        ladder = Ladder.open(cfg.out, settings)
        if len(ladder.rows) > len(before.rows) or not ladder.missing():
            if ladder.lost_images:
                log.warning("pictures.png is not drawn anew: the images of earlier cells are not in %s.", cfg.out)
            images = {} if ladder.lost_images else ladder.images
            files = write_report(ladder.rows, cfg.out, settings.ceiling, images)
            log.info("Wrote %s.", ", ".join(map(str, files)))
    if ladder.missing():
        raise KeyboardInterrupt
    return files


@hydra.main(config_path="pkg://breaching.config", config_name="lora/ladder", version_base="1.3")
def _application(cfg: Any) -> None:
    silence_upstream()
    try:
        run(cfg)
    except BreachingExtError as error:
        log.error("%s", error)
        sys.exit(1)
    except KeyboardInterrupt:
        if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
            raise  # the jobs that follow would each have to be interrupted, too
        sys.exit(INTERRUPTED)


def main() -> None:
    """Entry point of the console command."""
    silence_upstream()
    for name in ("breaching", "breaching_ext.attacks", "breaching_ext.matching"):
        logging.getLogger(name).setLevel(logging.WARNING)  # a line a cell is enough: the bar's
    _application()


if __name__ == "__main__":
    main()
