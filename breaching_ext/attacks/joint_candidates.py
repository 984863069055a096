"""N candidate reconstructions in one loop, with group consistency.

References:
    Yin et al., "See through gradients: Image batch recovery via GradInversion", CVPR 2021 (group consistency).
    Geiping et al., "Inverting gradients: How easy is it to break privacy in federated learning?", NeurIPS 2020, and
    the Breaching framework, whose sequential trials every candidate follows exactly when the group term is off.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from breaching.attacks.auxiliaries.regularizers import TotalVariation, regularizer_lookup
from omegaconf import OmegaConf, open_dict

from ..errors import ConfigError, SharedDataError
from ..matching.client import twice_differentiable
from ..matching.heap import keeping_freed_memory
from ..ranks import Ranks
from ..ranks import current as ranks_of_run
from ..registration import REGULARIZERS, load
from ..regularizers import AnyChannelTotalVariation, GroupRegularization
from . import checks
from .candidate_choice import CandidateChoice, Target
from .candidate_engines import CandidateEngines, record_choice
from .candidate_objective import match_only_trainable
from .config_keys import JOINT_KEYS, ConfigKeys, own_keys
from .inferred_labels import labels_of_steps
from .joint_loop import JointLoop, LoopResult
from .observation import own_copy
from .preparation import Preparation
from .sequential_trials import SequentialTrials
from .shared_data_checks import check_initial_data, check_shared_data

log = logging.getLogger(__name__)

_DEFAULT_SETUP = {"dtype": torch.float, "device": torch.device("cpu")}


class JointCandidateAttacker(SequentialTrials, CandidateEngines, CandidateChoice, Preparation):
    """Optimise N candidates jointly; everything else is Breaching's OptimizationBasedAttacker.

    Args:
        model: the model under attack.
        loss_fn: its loss, (outputs, labels) -> scalar.
        cfg_attack: an attack config, for example `breaching.get_attack_config("joint_candidates")`.
        setup: dict(dtype=..., device=...) as Breaching's.

    Raises:
        ConfigError: for a config value that cannot work, before anything is computed.
    """

    #: Names of the config's keys, which are checked; a subclass that does not say its own may have any.
    config_keys: ConfigKeys | None = JOINT_KEYS
    cfg: Any
    augmentations: torch.nn.Sequential
    regularizers: list[Any]

    def __init__(
        self,
        model: torch.nn.Module,
        loss_fn: Callable[..., torch.Tensor],
        cfg_attack: Any,
        setup: dict[str, Any] = _DEFAULT_SETUP,
    ) -> None:
        checks.check_config(cfg_attack, own_keys(self))
        # Breaching builds regularizers from its lookup, which knows ours only after register(); build them here, so
        # that an attack imported into a project works either way.
        without = copy.deepcopy(cfg_attack)
        with open_dict(without):
            without.regularization = None
        super().__init__(model, loss_fn, without, setup)
        self.cfg = cfg_attack
        self.augmentations.to(**self.setup)  # Breaching leaves them in the case's type
        self.regularizers = [self._build_regularizer(key, value) for key, value in _switched_on(cfg_attack)]

    @property
    def shares_candidates(self) -> bool:
        """Whether several processes can share a run (see `breaching_ext.ranks`)."""
        return self.cfg.restarts.get("parallel_candidates", True)

    def _build_regularizer(self, key: str, options: Any) -> torch.nn.Module:
        kind = load(REGULARIZERS[key]) if key in REGULARIZERS else regularizer_lookup[key]
        regularizer = kind(self.setup, **options)
        return AnyChannelTotalVariation.like(regularizer) if type(regularizer) is TotalVariation else regularizer

    @twice_differentiable()
    def reconstruct(
        self,
        server_payload: Sequence[dict] | dict,
        shared_data: Sequence[dict] | dict,
        server_secrets: dict | None = None,
        initial_data: torch.Tensor | None = None,
        dryrun: bool = False,
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Reconstruct a client's data from what it shared.

        Args:
            server_payload: what the server sent, one dict a query (see :func:`~breaching_ext.attacks.observe`).
            shared_data: what the client answered, one dict a query. It is not modified.
            server_secrets: Breaching's server.secrets; None and {} are the same.
            initial_data: start (B, C, H, W) for all candidates or (N, B, C, H, W) for one each, in the network's
                normalisation; None draws starts, candidate i from seed + i.
            dryrun: stop after one iteration.

        Returns:
            A dict with `data` (B, C, H, W), `labels` (B,), `candidates` (N, B, C, H, W), `candidate_scores` (N,), lower
            is better, and statistics: Breaching's keys (`Trial_0_Val`, ..., `opt_value`) and `engine`, `seed`,
            `gradient_evaluations`, `interrupted`, `candidate_failures` and `alignment_failures`; where candidates run
            jointly also `out_of_memory`, `calibration` and `memory`.

        Raises:
            SharedDataError: for shared data that do not fit the model, before the loop starts.
            ConfigError: for a config that does not go together with them.
        """
        payload, shared = _as_list(server_payload), _as_list(shared_data)
        modality = payload[0]["metadata"].get("modality", "vision")
        check_shared_data(self.model_template, payload, shared, labels=modality == "vision")
        shared = own_copy(shared, self.setup["device"])
        rec_models, labels, stats = self.prepare_attack(payload, shared)
        told = labels_of_steps(shared, payload)
        labels = labels if told is None else told
        if labels is None:
            raise SharedDataError("No labels: the client provided none and label_strategy is None.")
        labels = labels.to(self.setup["device"])
        shape = [shared[0]["metadata"]["num_data_points"], *self.data_shape]
        if initial_data is not None:
            check_initial_data(initial_data, self.cfg.restarts.num_trials, shape)
        target = Target(rec_models, shared, labels, shape)
        checks.check_local_steps(self.regularizers, target.local_hyperparams)
        checks.check_total_variation(self.regularizers, self.cfg.restarts.scoring, self.data_shape)
        jointly = self.cfg.restarts.get("parallel_candidates", True)
        self._check_evaluation(target, self.group if jointly else None, modality)
        checks.warn_of_repeated_labels(self.cfg.restarts, target.labels, self.group)
        checks.warn_of_scoring(self.cfg.restarts)
        candidates = (self._run_jointly if jointly else self._run_sequentially)(target, stats, initial_data, dryrun)
        reconstruction = self._conclude(candidates, target, stats)
        if modality == "text":
            reconstruction = self._postprocess_text_data(reconstruction, rec_models)
        self._finished(stats["interrupted"])
        return _fill_in_class_attack(reconstruction, server_secrets or {}), stats

    # -- the joint loop ------------------------------------------------------------------------------------------

    @keeping_freed_memory()
    def _run_jointly(
        self, target: Target, stats: dict, initial_data: torch.Tensor | None, dryrun: bool
    ) -> torch.Tensor:
        """Return the best point of every candidate, (N, B, C, H, W)."""
        for regularizer in self.regularizers:
            regularizer.initialize(target.models, target.shared_data, target.labels)
        self.objective.initialize(self.loss_fn, self.cfg.impl, target.local_hyperparams)
        match_only_trainable(self.objective, target.models, self.loss_fn, target.shared_data)
        ranks, trials = ranks_of_run(), self.cfg.restarts.num_trials
        own = ranks.share(trials)
        streams = self._streams(own)
        if initial_data is not None:
            initial_data = initial_data.expand(trials, *target.shape)[own.start : own.stop]
        starts = self._starts(target, streams, initial_data)
        self._draw_once(target, streams, own)
        if self.group is not None:
            self._prepare_group(self.group, starts[0])
            self.group.ranks = ranks
        parts = self._engine_parts(target, starts, streams, dryrun)
        built = self._choose_engine(parts, ranks, dryrun)
        engine = built.engine
        checkpoint = self._checkpoint(target, starts, engine.name, dryrun, ranks)
        result = JointLoop(engine, self.cfg, self._box(), self.group, checkpoint, ranks, own.start).run(dryrun)
        result = result.of_all(ranks, trials)
        self._record(stats, result, engine.name, ranks.number(engine.gradient_evaluations), ranks)
        record_choice(stats, built)
        return result.best[0]

    def _prepare_group(self, group: GroupRegularization, start: torch.Tensor) -> None:
        if group.aligner != "none" and start.dim() != 5:
            raise ConfigError(
                f"regularization.group_regularization.aligner={group.aligner} aligns images, and candidates have "
                f"{start.dim() - 1} dimensions; valid: none."
            )
        if group.warmup_iters >= self.cfg.optim.max_iterations > 1:
            log.warning(
                "The group term never sets in: regularization.group_regularization.warmup_iters=%d, but "
                "optim.max_iterations=%d.",
                *(group.warmup_iters, self.cfg.optim.max_iterations),
            )
        group.prepare(start)

    # -- small things --------------------------------------------------------------------------------------------

    def _record(
        self, stats: dict, result: LoopResult, engine: str, gradient_evaluations: int, ranks: Ranks | None = None
    ) -> None:
        for index, values in enumerate(result.histories):
            stats[f"Trial_{index}_Val"] = values
        group, ranks = self.group, ranks or Ranks()
        stats.update(
            engine=engine,
            seed=self._seed(),
            gradient_evaluations=gradient_evaluations,
            candidate_failures=result.failures,
            interrupted=result.interrupted,
            out_of_memory=result.out_of_memory,
            alignment_failures=ranks.number(group.alignment_failures) if group else 0,
            alignments=ranks.number(group.alignments) if group else 0,
            processes=ranks.size,
        )


def _switched_on(cfg: Any) -> list[tuple[str, dict]]:
    """Return (key, options) of every regularizer whose scale is above 0, in the config's order."""
    options = OmegaConf.to_container(cfg.regularization, resolve=True) if cfg.regularization else {}
    assert isinstance(options, dict)
    return [(str(key), value) for key, value in options.items() if value and value["scale"] > 0]


def _as_list(value: Sequence[dict] | dict) -> list[dict]:
    return [value] if isinstance(value, dict) else list(value)


def _fill_in_class_attack(reconstruction: dict, secrets: dict) -> dict:
    """Put the images that a fishing server (Breaching's ClassAttack) singled out back into their batch."""
    if "ClassAttack" not in secrets:
        return reconstruction
    secret = secrets["ClassAttack"]
    filled = {}
    for name, axis in (("data", 0), ("candidates", 1)):
        images = reconstruction[name].transpose(0, axis)
        all_of_them = images.new_zeros(secret["true_num_data"], *images.shape[1:])
        all_of_them[secret["target_indx"]] = images
        filled[name] = all_of_them.transpose(0, axis)
    return {**reconstruction, **filled, "labels": secret["all_labels"]}
