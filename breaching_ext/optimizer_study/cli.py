"""The command ``breaching-ext-optimizer-study``: run the study, or merge what many runs left.

breaching-ext-optimizer-study                                   # all variants, reduced protocol
breaching-ext-optimizer-study variant=[A1,B3] seed=[42,43,44]
breaching-ext-optimizer-study -m +launch=joblib variant=A1,B3 seed=42,43,44
breaching-ext-optimizer-study -m +launch=slurm  variant=A1,B3 seed=42,43,44
breaching-ext-optimizer-study action=merge sources=[DIR1,DIR2]
"""

from __future__ import annotations

import logging
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ..errors import BreachingExtError
from ..values import check_switches, check_whole
from .config import require_choice
from .merging import folders_to_merge, merge_results
from .protocol import PROTOCOL_KEYS, Protocol, select_variants
from .study import run_study

log = logging.getLogger(__name__)

ACTIONS = ("run", "merge")
#: Exit status after Ctrl-C, as a shell gives it.
INTERRUPTED = 130


def _config_folder() -> str:
    """The folder of the packaged configs, also where the package is used from its source tree."""
    try:
        spec = find_spec("breaching_ext.config.optimizer_study")
    except ModuleNotFoundError:
        spec = None
    if spec is not None and spec.submodule_search_locations:
        return str(Path(next(iter(spec.submodule_search_locations))).resolve())
    return str(Path(__file__).resolve().parents[2] / "config" / "optimizer_study")


@hydra.main(version_base="1.3", config_path=_config_folder(), config_name="config")
def main(cfg: DictConfig) -> None:
    """Run the study that the configuration describes."""
    # The jobs of a multirun leave merging to `callbacks.MergeResults`, which sees the results of all.
    one_of_many = HydraConfig.get().mode is RunMode.MULTIRUN
    try:
        run(cfg, merge=not one_of_many)
    except (BreachingExtError, FileNotFoundError) as error:
        if one_of_many:
            raise
        log.error("%s", error)
        sys.exit(1)
    except KeyboardInterrupt:
        if one_of_many:
            raise  # the jobs that follow would each have to be interrupted, too
        log.warning("Interrupted: what is finished is kept; the same command goes on from there.")
        sys.exit(INTERRUPTED)


def run(cfg: DictConfig, merge: bool = True) -> list[Path]:
    """Do what ``cfg`` asks for.

    Args:
        cfg: See config/optimizer_study/config.yaml.
        merge: Whether to draw the sheet and write the table afterwards.

    Returns:
        The files of the sheet and table, if they were made.

    Raises:
        ValueError: If a value is not valid.
        FileNotFoundError: If Fashion-MNIST, or a result to merge, is not at hand.
    """
    require_choice("action", cfg.action, ACTIONS)
    check_switches(cfg, ["progress"])
    folders = folders_to_merge(_plain(cfg.sources), cfg.out)
    check_whole("threads", cfg.threads, 1, may_be_empty=True)
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    if cfg.action == "run":
        variants = select_variants(_plain(cfg.variant))
        seeds = _plain(cfg.seed)
        run_study(cfg.out, variants, seeds if isinstance(seeds, list) else [seeds], protocol_of(cfg), cfg.progress)
    if not merge:
        return []
    files = merge_results(folders, cfg.out)
    log.info("Wrote %s.", ", ".join(map(str, files)))
    return files


def protocol_of(cfg: DictConfig) -> Protocol:
    """The shared settings of a configuration; options that are left empty are none."""
    values = _plain(cfg.protocol)
    for key in values:
        require_choice("protocol key", key, PROTOCOL_KEYS)
    mappings = ("model_options", "schedule_options", "settings")
    empty: dict[str, Any] = {key: {} for key in mappings if values.get(key) is None}
    return Protocol(**values | empty, data_folder=OmegaConf.select(cfg, "data.folder"))


def _plain(value: Any) -> Any:
    """Containers of the configuration as Python's own."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
