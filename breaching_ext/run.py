"""One run from a config: case, shared gradient, attack, evaluation, files."""

from __future__ import annotations

import logging
import math
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf, open_dict

from .attacks.evaluation_count import evaluations_counted
from .candidate_sheet import save_candidate_sheet
from .environment import choose_kernels, describe_device, overrides, resolve_device, seed_everything, versions
from .errors import BreachingExtError
from .evaluation import Evaluation, evaluate, to_images
from .evaluation.figures import save_reconstruction
from .files import write_atomically, write_json
from .ranks import current as ranks_of_run
from .ranks import interrupts
from .registration import clean_data_of, register
from .run_checks import cannot_be_built, check_case, check_values, failures_named

log = logging.getLogger(__name__)

#: Pictures in a run's folder.
PICTURES = ("reconstruction.png", "candidates.png")


@dataclass
class RunResult:
    """What one run produced: the reconstruction, its evaluation, and the record that metrics.json holds."""

    reconstruction: dict[str, torch.Tensor]
    true_data: dict[str, torch.Tensor]
    evaluation: Evaluation
    stats: dict[str, Any]
    record: dict[str, Any]


def run(cfg: Any, output_dir: str | Path | None = None) -> RunResult:
    """Simulate a case, attack it and evaluate the result.

    Args:
        cfg: a full config as `breaching-ext` composes it (`case`, `attack`, `seed`, `device`, `dryrun`).
        output_dir: where reconstruction.png, candidates.png, metrics.json and candidates.pt go; None writes nothing.

    Raises:
        BreachingExtError: for a config or data that cannot work, before the long loop starts.
    """
    register()
    import breaching

    check_values(cfg)
    setup = {"device": resolve_device(cfg.device), "dtype": getattr(torch, cfg.case.impl.dtype)}
    seed_everything(cfg.seed)
    choose_kernels(cfg.case.impl)
    network = _place_checkpoint(cfg, output_dir)
    if cfg.dryrun and cfg.case.get("training") is not None:
        cfg.case.training.update(max_steps=1, cache_path=None, checkpoint_path=None)  # a loop, too, of another recipe
    try:
        user, server, model, loss_fn = breaching.cases.construct_case(cfg.case, setup)
        attacker = breaching.attacks.prepare_attack(model, loss_fn, cfg.attack, setup)
    except (ArithmeticError, AttributeError, LookupError, NameError, OSError, TypeError, ValueError) as error:
        if isinstance(error, BreachingExtError):
            raise
        log.debug("Where it happened:", exc_info=error)
        raise cannot_be_built(cfg, error) from error
    check_case(cfg, user, attacker)
    private = clean_data_of(user, setup["dtype"])
    shared_data, payloads, true_data = server.run_protocol(user)
    true_data.update(private)
    log.info(_what_is_attacked(cfg))

    attacker.keep_checkpoint = True  # until everything is written
    start = time.perf_counter()
    # Breaching's own attacks end with their best so far, and do not tell
    noting: AbstractContextManager[list[int]] = interrupts() if ranks_of_run().size == 1 else nullcontext([])
    with noting as noted, evaluations_counted(attacker) as count, failures_named(cfg, attacker):
        reconstruction, stats = attacker.reconstruct(payloads, shared_data, server.secrets, dryrun=cfg.dryrun)
    # an attack that never calls these closures has evaluations of its own, of which nobody knows
    stats.setdefault("gradient_evaluations", (count.number or None) if count else None)
    stats["interrupted"] = bool(stats.get("interrupted") or noted)
    seconds = time.perf_counter() - start + getattr(attacker, "seconds_before", 0.0)
    if output_dir is not None:  # before the evaluation, which may fail
        save_tensors(tensors_of(reconstruction, true_data), output_dir)

    mean, std = (cfg.case.data.mean, cfg.case.data.std) if cfg.case.data.normalize else (None, None)
    evaluation = evaluate(
        to_images(reconstruction["data"], mean, std),
        to_images(true_data["data"], mean, std),
        reconstruction["labels"],
        true_data["labels"],
    )
    record = _record(cfg, evaluation, stats, reconstruction, seconds, setup["device"])
    record.update(_attacks_own(attacker, user, reconstruction, true_data))
    result = RunResult(reconstruction, true_data, evaluation, dict(stats), record)
    if output_dir is not None:
        save(result, cfg, output_dir, mean, std)
    if hasattr(attacker, "forget_checkpoint"):
        attacker.forget_checkpoint()
    if network is not None and not stats["interrupted"] and not cfg.dryrun:  # a dry run did not take it
        network.unlink(missing_ok=True)
    return result


def tensors_of(reconstruction: dict[str, Any], true_data: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return what candidates.pt holds: the reconstruction and the truth, on the CPU."""
    tensors = {**reconstruction, "true_data": true_data["data"], "true_labels": true_data["labels"]}
    return {k: v.detach().cpu() for k, v in tensors.items() if v is not None}


def save_tensors(tensors: dict[str, torch.Tensor], output_dir: str | Path) -> None:
    """Write candidates.pt; the metrics of an earlier run in that folder go with its candidates."""
    folder = Path(output_dir)

    def write(target: Path) -> None:
        torch.save(tensors, target)
        (folder / "metrics.json").unlink(missing_ok=True)

    write_atomically(folder / "candidates.pt", write)


def save(result: RunResult, cfg: Any, output_dir: str | Path, mean: Any = None, std: Any = None) -> None:
    """Write config.yaml, metrics.json and the two pictures, each atomically; candidates.pt: :func:`save_tensors`."""
    folder, tensors = Path(output_dir), tensors_of(result.reconstruction, result.true_data)
    write_atomically(folder / "config.yaml", lambda target: OmegaConf.save(cfg, target))
    write_json(folder / "metrics.json", result.record)
    (folder / "error.json").unlink(missing_ok=True)  # of an earlier try

    true, data = (to_images(x, mean, std) for x in (tensors["true_data"], tensors["data"]))
    means = result.evaluation.means
    title = f"{cfg.attack.type} on {cfg.case.name}, {cfg.case.model}: mean PSNR {means['psnr']:.1f} dB"
    for name in PICTURES:
        (folder / name).unlink(missing_ok=True)  # of an earlier run, as well
    order, psnr = result.evaluation.order, result.evaluation.per_image["psnr"]
    try:
        save_reconstruction(folder / PICTURES[0], true, data[order], psnr, title)
        if "candidates" in tensors:
            consensus = cfg.attack.restarts.get("output", "best") == "consensus"
            save_candidate_sheet(folder / PICTURES[1], true, tensors, mean, std, title, consensus)
    except Exception as error:  # the run is not lost with a picture
        log.error("A picture could not be drawn (%s: %s).", type(error).__name__, error)


def _record(
    cfg: Any, evaluation: Evaluation, stats: dict, reconstruction: dict, seconds: float, device: torch.device
) -> dict[str, Any]:
    scores = reconstruction.get("candidate_scores")
    value = stats.get("opt_value")
    value = value if isinstance(value, float) else None  # attacks that do not optimise have none
    kept = (
        *("engine", "processes", "calibration", "memory", "gradient_evaluations", "full_gradients"),
        *("candidate_failures", "alignments", "alignment_failures", "interrupted", "out_of_memory"),
        *("kkt_loss", "kkt_loss_absolute", "rank", "singular_values", "failed_restarts"),
    )
    return {
        **evaluation.as_dict(),
        "candidate_scores": None if scores is None else scores.tolist(),
        "opt_value": value,
        "no_reconstruction": value is not None and not math.isfinite(value),  # then the result is zeros
        **{key: stats[key] for key in kept if key in stats},
        "seconds": seconds,
        "device": describe_device(device),
        "seed": cfg.seed,
        "attack": cfg.attack.type,
        "attack_type": cfg.attack.attack_type,
        "case": cfg.case.name,
        "model": cfg.case.model,
        "num_data_points": cfg.case.user.num_data_points,
        "labels_known": _labels_known(cfg),
        "buffers_known": _buffers_known(cfg),
        "user_idx": cfg.case.user.get("user_idx"),
        "command": " ".join(sys.argv),
        "overrides": overrides(),
        "versions": versions(),
        "config": OmegaConf.to_container(cfg, resolve=True),
    }


def _attacks_own(attacker: Any, user: Any, reconstruction: dict, true_data: dict) -> dict[str, Any]:
    """Return what an attack and a user of this package add to metrics.json."""
    added: dict[str, Any] = {}
    if hasattr(attacker, "report"):
        unseen = user.unseen() if hasattr(user, "unseen") else None
        added.update(attacker.report(reconstruction, true_data["data"], unseen))
    if getattr(user, "report", None) is not None:
        added["training"] = user.report
    return added


def _place_checkpoint(cfg: Any, output_dir: str | Path | None) -> Path | None:
    """Keep checkpoints in the run's folder, unless the config says where; Breaching's attacks have none.

    Returns:
        The file there that keeps the client's trained network until the run is over, if there is one.
    """
    impl, training, network = cfg.attack.impl, cfg.case.get("training"), None
    if output_dir is not None and training is not None and not training.get("cache_path"):
        training.checkpoint_path = training.get("checkpoint_path") or str(Path(output_dir) / "training.pt")
        if impl.get("checkpoint_every"):
            network = Path(output_dir) / "network.pt"  # so that it is not trained again
            training.cache_path = str(network)
    if output_dir is not None and impl.get("checkpoint_every") and not impl.get("checkpoint_path"):
        with open_dict(impl):  # a config of Breaching's has no such key
            impl.checkpoint_path = str(Path(output_dir) / "checkpoint.pt")
        log.info(
            "If this run is killed, the same command with hydra.run.dir=%s goes on from its checkpoint.", output_dir
        )
    return network


def _labels_known(cfg: Any) -> bool:
    """Whether the attack knows the labels: they are sent, with the local steps' settings, too, and it uses them."""
    user = cfg.case.user
    told = user.provide_labels or (user.user_type == "local_update" and user.get("provide_local_hyperparams"))
    attack = cfg.attack
    used = attack.attack_type != "kkt" or attack.extraction.get("candidate_labels", "auto") == "auto"
    return bool(told) and used and attack.attack_type != "magia"


def _buffers_known(cfg: Any) -> bool:
    user = cfg.case.user  # whoever releases a network releases all of it
    public = cfg.case.server.get("provide_public_buffers")
    return bool(user.provide_buffers or public or user.user_type == "trained_model")


def _what_is_attacked(cfg: Any) -> str:
    points = cfg.case.user.num_data_points
    labels = "known" if _labels_known(cfg) else "unknown"
    seen = "the weights they trained" if cfg.case.user.user_type == "trained_model" else "their shared update"
    return (
        f"{cfg.case.name}: {points} image{'s' if points > 1 else ''} of client {cfg.case.user.get('user_idx')} from "
        f"{seen}, model {cfg.case.model}, labels {labels}; attack {cfg.attack.type}."
    )
