"""`breaching-ext`: a Hydra application over Breaching's config tree and ours."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException

from .errors import BreachingExtError, ConfigError, first_line
from .files import write_json

log = logging.getLogger(__name__)


def _task(cfg: Any) -> float | None:
    """Run one job; returns its mean PSNR, which Hydra's sweepers can optimise."""
    silence_upstream()  # here too: a launcher may run this in a process of its own
    from .environment import resolve_device
    from .ranks import joined, started_by_torchrun
    from .run import run

    if not started_by_torchrun():
        return _run_and_tell(cfg, run)
    first = os.environ["RANK"] == "0"
    try:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise ConfigError(
                "torchrun shares one run's candidates; a sweep runs through launchers (launch=joblib, slurm)."
            )
        device = resolve_device(cfg.device)
    except BreachingExtError as error:
        if first:
            _note_failure(Path(HydraConfig.get().runtime.output_dir), error, cfg.get("seed"))
            log.error("%s", error)
        sys.exit(1)
    with joined(device):
        if first:
            return _run_and_tell(cfg, run)
        try:
            return run(cfg).record["psnr"]
        except BreachingExtError:  # the first process finds the same and says it
            sys.exit(1)


def _run_and_tell(cfg: Any, run: Any) -> float | None:
    from .ranks import interrupts

    folder, sweep = Path(HydraConfig.get().runtime.output_dir), HydraConfig.get().mode == RunMode.MULTIRUN
    noting: AbstractContextManager[list[int]] = interrupts() if sweep else nullcontext([])
    with noting as interrupted:  # attacks end with their best so far
        try:
            result = run(cfg, folder)
        except Exception as error:
            _note_failure(folder, error, cfg.get("seed"))
            if not isinstance(error, (BreachingExtError, OmegaConfBaseException)) or sweep:
                raise
            log.debug("Where it happened:", exc_info=error)
            log.error("%s", error if isinstance(error, BreachingExtError) else _about_the_config(error))
            sys.exit(1)
    print(summary(result.record))
    from .run import PICTURES

    pictures = [name for name in PICTURES if (folder / name).exists()]
    print(f"\nSaved to {folder}: {', '.join([*pictures, 'metrics.json', 'candidates.pt', 'config.yaml'])}")
    if interrupted:
        raise KeyboardInterrupt  # the jobs that follow would each have to be interrupted, too
    return result.record["psnr"]


def _about_the_config(error: OmegaConfBaseException) -> str:
    """Return one line for a value that is missing (`???`), or refers to nothing, or a key that was taken out."""
    return f"{error.full_key or 'The config'}: {first_line(error)}; hydra.verbose=true shows where."


def _note_failure(folder: Path, error: Exception, seed: Any) -> None:
    """Write why a run failed into metrics.json, or, beside those of an earlier run that did not, into error.json."""
    from .environment import overrides

    try:
        finished = "error" not in json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        finished = False
    name = "error.json" if finished else "metrics.json"
    content = {"error": f"{type(error).__name__}: {error}", "seed": seed, "overrides": overrides()}
    write_json(folder / name, content)


def summary(record: dict[str, Any]) -> str:
    """Return the table that a run prints: one row an image, then the means."""
    columns = [name for name in ("psnr", "ssim", "lpips", "mse", "label_acc") if name in record["per_image"]]
    digits = {"psnr": "{:.2f}", "mse": "{:.5f}", "label_acc": "{:.0%}"}
    lines = ["", "image" + "".join(f"{'PSNR [dB]' if c == 'psnr' else c:>11}" for c in columns)]
    images = len(record["per_image"]["psnr"])
    for index in range(images):
        cells = (digits.get(c, "{:.3f}").format(record["per_image"][c][index]) for c in columns)
        lines.append(f"{index:<5}" + "".join(f"{cell:>11}" for cell in cells))
    lines.append("mean " + "".join(f"{digits.get(c, '{:.3f}').format(record[c]):>11}" for c in columns))
    if record.get("lpips") is None:
        lines.append(record.get("lpips_reason", ""))
    if record.get("no_reconstruction"):
        lines.append("No candidate stayed finite: the result is zeros. A smaller attack.optim.step_size may help.")
    lines += _shares(record["kkt"], record["kkt_loss"]) if "kkt" in record else []
    lines.append(f"{record['seconds']:.1f} s on {record['device']}, engine {record.get('engine', 'Breaching')}")
    return "\n".join(lines)


def _shares(shares: dict[str, Any], loss: float) -> list[str]:
    """Return what a reconstruction from weights recovered, the paper's way: each image with its nearest candidate."""
    lines = [f"KKT loss {loss:.4f} of the squared norm of the weights"]
    for name, found in shares.items():
        lines.append(
            f"{name} images with NCC > 0.8 to their nearest candidate: {found['ncc_share']:.0%}; with SSIM > 0.4: "
            f"{found['ssim_share']:.0%}"
        )
    return lines


_application = hydra.main(config_path="pkg://breaching.config", config_name="breaching_ext", version_base="1.3")(_task)


def main() -> None:
    """Entry point of the console command `breaching-ext` and of `python -m breaching_ext`."""
    silence_upstream()
    if int(os.environ.get("RANK", "0")) > 0:  # one of torchrun's: the first process writes all files
        sys.argv += [
            "hydra.run.dir=.",
            "hydra.output_subdir=null",
            "hydra/job_logging=none",
            "hydra/hydra_logging=none",
        ]
    try:
        _application()
    except KeyboardInterrupt:
        log.error("Interrupted.")
        sys.exit(130)  # as shells say it


def silence_upstream() -> None:
    """Keep to itself what no user could act on: what Breaching calls and torch deprecates, a font cache."""
    import torch  # noqa: F401 - before the filter, because torch puts filters of its own in front

    warnings.filterwarnings("ignore", message=r".*torch\.jit\.script")
    warnings.filterwarnings("ignore", message=r".*(parameter 'pretrained'|weight enum)")
    logging.getLogger("matplotlib.font_manager").setLevel(logging.WARNING)


if __name__ == "__main__":
    main()
