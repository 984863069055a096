"""Training images from the weights of a trained network alone, through the KKT conditions of the max-margin problem.

References:
    Haim, Vardi, Yehudai, Shamir and Irani, "Reconstructing training data from trained neural networks", NeurIPS 2022.
    Lyu and Li, "Gradient descent maximizes the margin of homogeneous neural networks", ICLR 2020.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from breaching.attacks.optimization_based_attack import OptimizationBasedAttacker
from torch import Tensor

from ..errors import ConfigError, SharedDataError
from ..kkt.candidates import draw_starts, stretch, strongest
from ..kkt.extraction import Extracted, Extraction
from ..kkt.models import HomogeneousNetwork
from ..kkt.nearest import nearest
from ..kkt.problem import Problem, build_problem
from ..values import check_seed, check_whole
from .checkpoint import Checkpoint, KeepsCheckpoint, fingerprint
from .config_keys import KKT_KEYS, ConfigKeys, check_keys, own_keys
from .kkt_input import labels_of_candidates, released_network, report_slopes, start_of
from .kkt_options import check_precision, check_search, check_span, extraction_options, report_span

log = logging.getLogger(__name__)

_DEFAULT_SETUP = {"dtype": torch.float, "device": torch.device("cpu")}


class KKTAttacker(KeepsCheckpoint, OptimizationBasedAttacker):
    """Search images and multipliers that satisfy the stationarity conditions of a trained network.

    Args:
        model: a :class:`~breaching_ext.kkt.models.HomogeneousNetwork`.
        loss_fn: not used; the conditions are those of the logistic loss on labels ±1.
        cfg_attack: an attack config, for example `breaching.get_attack_config("kkt")`.
        setup: dict(dtype=..., device=...) as Breaching's.

    Raises:
        ConfigError: for a network with more than one output, or a config value that cannot work.
    """

    cfg: Any
    attacks_weights = True  # it needs no gradient
    #: Names of the config's keys; see `JointCandidateAttacker`.
    config_keys: ConfigKeys | None = KKT_KEYS

    def __init__(
        self, model: torch.nn.Module, loss_fn: Any, cfg_attack: Any, setup: dict[str, Any] = _DEFAULT_SETUP
    ) -> None:
        if not isinstance(model, HomogeneousNetwork):
            raise ConfigError(
                f"attack_type=kkt needs a homogeneous network with one output, got {type(model).__name__}; valid: "
                "case=kkt_fashion_mnist with case.model=kkt-mlp-300, kkt-mlp-1000-1000, kkt-conv, ..., or a "
                "breaching_ext.kkt.HomogeneousNetwork of your own."
            )
        keys = own_keys(self)
        if keys is not None:
            check_keys(cfg_attack, keys)
        check_precision(cfg_attack.impl)
        super().__init__(model, loss_fn, cfg_attack, setup)
        self.options = extraction_options(cfg_attack)
        check_whole("restarts.num_trials", cfg_attack.restarts.num_trials, 1)
        check_seed("restarts.seed", cfg_attack.restarts.get("seed"))
        check_search(cfg_attack.extraction)
        check_span(cfg_attack.extraction.span, model)
        if cfg_attack.restarts.scoring != "kkt-loss":
            raise ConfigError(
                f"restarts.scoring={cfg_attack.restarts.scoring} is not possible for kkt; valid: kkt-loss."
            )

    def reconstruct(
        self,
        server_payload: Sequence[dict] | dict,
        shared_data: Sequence[dict] | dict,
        server_secrets: dict | None = None,
        initial_data: Tensor | None = None,
        dryrun: bool = False,
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Reconstruct images from weights (see :func:`breaching_ext.kkt.release`).

        Args:
            server_payload: `parameters`, `buffers` and `metadata` of the network.
            shared_data: `metadata` with the suspected number n of images as `num_data_points`, and their `labels` (n,)
                where they are known; `parameters` and `buffers`, where a user trained the server's network, take the
                place of the server's.
            server_secrets: not used.
            initial_data: images from which all restarts start, (m, C, H, W), or (R, m, C, H, W); m up to the number k
                of candidates. Fewer are taken again in turn: n of k = 2n start once with each label, and where labels
                are known each with its own. None draws restart i from seed + i.
            dryrun: stop after one step.

        Returns:
            A dict with `data` (B, C, H, W), `labels` (B,), `candidates` (R, B, C, H, W), `candidate_labels` (R, B),
            `candidate_scores` (R,): the relative KKT loss, which alone chooses; and of the chosen restart all k
            candidates, not stretched, as `pool` (k, C, H, W), with `multipliers` (k,) and `pool_labels` (k,), ±1; and
            statistics. Other labels are 0 and 1.

        Raises:
            SharedDataError: for weights that do not fit the network, or no number of images.
        """
        payload, shared = _first(server_payload), _first(shared_data)
        model = released_network(self.model_template, payload, shared, self.setup)
        labels = labels_of_candidates(self.cfg.extraction, shared["metadata"]).to(**self.setup)
        number, count = shared["metadata"]["num_data_points"], len(labels)
        steepness, chosen = self.cfg.extraction.steepness, self.cfg.extraction.span
        report_slopes(model, steepness, self.options.slack)
        problem = build_problem(model, float("inf") if steepness is None else float(steepness), chosen, count, number)
        report_span(problem, number, chosen, count)
        seed = self.cfg.restarts.get("seed")
        seed = torch.initial_seed() % 2**63 if seed is None else int(seed)
        seeds = [seed + index for index in range(self.cfg.restarts.num_trials)]
        starts, generators = draw_starts(problem, count, seeds, self.options.init_scale)
        if initial_data is not None:
            starts = start_of(initial_data, problem, starts)
        search = Extraction(problem, labels, starts, self.options, generators)
        found = self._search(search, model, dryrun)
        reconstruction = self._conclude(found, problem, labels, number, dryrun)
        stats = self._statistics(found, search, seed)
        self._finished(found.interrupted)
        return reconstruction, stats

    def report(self, reconstruction: dict[str, Tensor], true: Tensor, unseen: Tensor | None) -> dict[str, Any]:
        """Return metrics for metrics.json: the nearest candidates of training and of unseen images by NCC and SSIM.

        NCC is the paper's for grey images; its code measures SSIM in windows of 3 x 3, this package in 7 x 7.

        Args:
            reconstruction: what `reconstruct` returned.
            true: the training images (n, C, H, W).
            unseen: as many images that the network never saw, or None.
        """
        pool, mean = reconstruction["pool"], reconstruction["mean_image"]
        metrics = {"training": nearest(pool, true, mean).as_dict()}
        if unseen is not None:
            metrics["unseen"] = nearest(pool, unseen, mean).as_dict()
        return {"kkt": metrics}

    def __repr__(self) -> str:
        return (
            f"Attacker (of type {self.__class__.__name__}) with settings:\n    {self.cfg.type}: "
            f"{self.cfg.restarts.num_trials} restarts, steepness {self.cfg.extraction.steepness}, "
            f"span {self.cfg.extraction.span}\n    {self.options}"
        )

    def _search(self, search: Extraction, model: HomogeneousNetwork, dryrun: bool) -> Extracted:
        impl = self.cfg.impl
        progress = None if impl.get("progress", "auto") == "auto" else bool(impl.progress)
        checkpoint = self._kept = None
        if impl.get("checkpoint_every") and impl.get("checkpoint_path") and not dryrun:
            released = [{"gradients": list(model.parameters())}]
            key = fingerprint(self.cfg, released, [search.x, search.lam], "kkt", [search.labels, *model.buffers()])
            checkpoint = self._kept = Checkpoint(impl.checkpoint_path, impl.checkpoint_every, key)
            state = checkpoint.load()
            if state is not None:
                search.load_state_dict(state)

        def save(done: int) -> None:
            if checkpoint is not None and (checkpoint.due(done - 1) or done == self.options.steps):
                checkpoint.save(search.state_dict())  # the end as well: choosing and saving may fail

        found = search.run(progress, search.step_count + 1 if dryrun else None, save)
        if checkpoint is not None and found.nowhere:
            checkpoint.remove()  # another step size is needed, and that is another run
        return found

    def _conclude(
        self, found: Extracted, problem: Problem, labels: Tensor, number: int, dryrun: bool = False
    ) -> dict[str, Tensor]:
        if found.nowhere:
            if found.interrupted:  # before the first step was done
                raise KeyboardInterrupt
            raise SharedDataError(f"No restart stayed finite; lower attack.extraction.lr={self.options.lr}.")
        if self.options.steps > 1 and not (found.interrupted or dryrun) and not bool(found.best_steps.any()):
            log.warning("No restart came further than its start; lower attack.extraction.lr=%g.", self.options.lr)
        elif found.failures:
            log.warning(
                "%d of %d restarts did not stay finite; their best points before that count. A lower "
                "attack.extraction.lr=%g may help.",
                *(len(found.failures), len(found.losses), self.options.lr),
            )
        images = problem.pixels(found.coordinates)  # (R, k, C, H, W)
        best = int(found.losses.argmin())
        chosen = [
            strongest(x - problem.mean, lam, number) for x, lam in zip(images, found.multipliers, strict=True)
        ]  # R times (B,)
        candidates = torch.stack([stretch(x)[order] for x, order in zip(images, chosen, strict=True)])
        classes = torch.stack([(labels[order] > 0).long() for order in chosen])  # (R, B)
        return {
            "data": candidates[best],
            "labels": classes[best],
            "candidates": candidates,
            "candidate_labels": classes,
            "candidate_scores": found.losses,
            "pool": images[best],
            "pool_labels": labels.long(),
            "multipliers": found.multipliers[best],
            "mean_image": problem.mean,
        }

    def _statistics(self, found: Extracted, search: Extraction, seed: int) -> dict[str, Any]:
        problem = search.problem
        stats: dict[str, Any] = defaultdict(list)
        for index, history in enumerate(found.histories):
            stats[f"Trial_{index}_Val"] = history
        best = float(found.losses.min())
        stats.update(
            opt_value=best,
            kkt_loss=best,
            kkt_loss_absolute=best * problem.norm,
            engine="kkt, span of the data" if problem.span is not None else "kkt, all pixels",
            rank=None if problem.span is None else problem.span.rank,
            gradient_evaluations=search.step_count * len(found.losses),
            failed_restarts=found.failures,
            interrupted=found.interrupted,
            seed=seed,
        )
        if problem.span is not None:
            values = problem.span.singular_values
            stats["singular_values"] = values[: problem.span.rank + 3].tolist()
        return stats


def _first(data: Sequence[dict] | dict) -> dict:
    return data if isinstance(data, dict) else data[0]
