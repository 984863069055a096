"""Random-subset gradient matching without label inference: images and soft labels are optimised together.

References:
    "MAGIA: Sensing Per-Image Signals from Single-Round Averaged Gradients for Label-Inference-Free Gradient
    Inversion", arXiv 2509.18170. What its released code leaves open is a guess here, and called one where it is
    made (`breaching_ext.matching.magia_objective`, `breaching_ext.selection`).
    Zhu et al., "Deep leakage from gradients", NeurIPS 2019 (labels as optimised logits).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import ConfigError, SharedDataError
from ..matching.client import matched_parameters, twice_differentiable, unscripted
from ..matching.heap import keeping_freed_memory
from ..matching.magia_engine import MagiaEngine
from ..matching.randomness import CandidateStreams
from ..matching.subset_matching import SubsetMatching
from ..matching.subset_matching import Target as MatchingTarget
from ..regularizers import GroupRegularization
from ..regularizers.any_order import GroupAnyOrder
from .candidate_choice import Target
from .checks import warn_of_scoring
from .config_keys import MAGIA_KEYS
from .joint_candidates import JointCandidateAttacker
from .joint_loop import JointLoop, LoopResult
from .magia_checks import check_loss, check_output, warn_of_grid, warn_of_sizes
from .magia_choice import MagiaChoice
from .magia_options import MagiaOptions
from .observation import own_copy
from .output_checks import check_direction, output_of, trial_images
from .shared_data_checks import check_initial_data, check_shared_data

log = logging.getLogger(__name__)


class MagiaAttacker(MagiaChoice, JointCandidateAttacker):
    """MAGIA on N candidates at once; labels are never inferred, never taken from the client, only optimised.

    Pixels are optimised in [0, 1] and normalised for the model, so that the start and the image prior mean the same
    for every dataset.

    Args:
        model: the model under attack.
        loss_fn: its loss; it must take label probabilities (B, classes), as torch.nn.CrossEntropyLoss does.
        cfg_attack: an attack config, for example `breaching.get_attack_config("magia")`.
        setup: dict(dtype=..., device=...) as Breaching's; `impl.dtype` of the config (float, double) decides.

    Raises:
        ConfigError: for a config value that cannot work, before anything is computed.
    """

    config_keys = MAGIA_KEYS

    def __init__(
        self,
        model: torch.nn.Module,
        loss_fn: Callable[..., torch.Tensor],
        cfg_attack: Any,
        setup: dict[str, Any] | None = None,
    ) -> None:
        given = {"dtype": torch.float, "device": torch.device("cpu")} if setup is None else setup
        super().__init__(model, loss_fn, cfg_attack, given)
        self.options = MagiaOptions.from_config(cfg_attack)
        unused = [r for r in self.regularizers if not isinstance(r, GroupRegularization)]
        if unused:
            raise ConfigError(
                f"regularization has {type(unused[0]).__name__}, which magia does not use; valid: "
                "group_regularization (the image prior is configured under image_prior)."
            )

    @property
    def shares_candidates(self) -> bool:
        """Every process would compute everything."""
        return False

    def _build_regularizer(self, key: str, options: Any) -> torch.nn.Module:
        if key == "group_regularization":
            return GroupAnyOrder(self.setup, **options)
        return super()._build_regularizer(key, options)

    @twice_differentiable()
    def reconstruct(
        self,
        server_payload: Sequence[dict] | dict,
        shared_data: Sequence[dict] | dict,
        server_secrets: dict | None = None,
        initial_data: torch.Tensor | None = None,
        dryrun: bool = False,
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Reconstruct images and labels from one shared gradient.

        Args:
            server_payload: what the server sent (one query).
            shared_data: what the client answered. It is not modified; labels in it are not looked at.
            server_secrets: Breaching's server.secrets; not used.
            initial_data: start (B, C, H, W) for all candidates or (N, B, C, H, W) for one each, in the network's
                normalisation; None draws starts, candidate i from seed + i. With pyramid.factors (4, 2, 1) it is
                averaged to the coarsest grid first.
            dryrun: stop after one outer step.

        Returns:
            A dict with `data` (B, C, H, W), `labels` (B,), `label_probabilities` (B, K), `candidates`
            (N, B, C, H, W), `candidate_labels` (N, B) and `candidate_scores` (N,), lower is better; and statistics as
            the joint attack's, with `full_gradients`: evaluations in units of one full-batch gradient.

        Raises:
            ConfigError: for a loss that does not take label probabilities.
            SharedDataError: for shared data that do not fit the model, several queries or local steps, or a start
                that is not finite, before the loop starts.
        """
        target, stats, classes = self._prepare(server_payload, shared_data)
        if initial_data is not None:
            check_initial_data(initial_data, self.cfg.restarts.num_trials, target.shape)
            warn_of_grid(self.options)
        warn_of_sizes(self.options, target.shape[0], self.cfg.optim.max_iterations)
        streams = self._streams()
        starts = self._starts(target, streams, initial_data)
        starts = [self._to_pixels(starts[0]), self._label_starts(streams, target.shape[0], classes)]
        candidates, probabilities = self._run(target, starts, stats, dryrun)
        reconstruction = self._finish(candidates, probabilities, target, stats)
        self._finished(stats["interrupted"])
        return reconstruction, stats

    # -- what is attacked ----------------------------------------------------------------------------------------

    def _prepare(
        self, server_payload: Sequence[dict] | dict, shared_data: Sequence[dict] | dict
    ) -> tuple[Target, dict[str, Any], int]:
        """Check everything that can be checked before the loop; returns the target, statistics and K."""
        payload = [server_payload] if isinstance(server_payload, dict) else list(server_payload)
        shared = [shared_data] if isinstance(shared_data, dict) else list(shared_data)
        if payload[0]["metadata"].get("modality", "vision") != "vision":
            raise SharedDataError("magia reconstructs images; valid: metadata modality 'vision'.")
        check_shared_data(self.model_template, payload, shared, labels=False)
        shape = tuple(payload[0]["metadata"]["shape"])
        if len(shape) != 3:
            raise SharedDataError(f"magia reconstructs images, not data of shape {shape}; valid: (C, H, W).")
        if len(shared) != 1:
            raise SharedDataError(f"magia attacks the gradient of one query, there are {len(shared)}.")
        if shared[0]["metadata"].get("local_hyperparams") is not None:
            raise SharedDataError("magia attacks one gradient, not the change after several local steps.")
        shared = own_copy(shared, self.setup["device"])
        shared[0]["metadata"]["labels"] = None
        models, _, stats = self.prepare_attack(payload, shared)
        size = [shared[0]["metadata"]["num_data_points"], *self.data_shape]
        device_shared = self._cast_shared_data(shared)
        labels = torch.zeros(size[0], dtype=torch.long, device=self.setup["device"])
        images = trial_images(size, **self.setup)  # as many as there are: batch norm may need several
        output = output_of(models[0], images)
        check_output(output)
        check_loss(self.loss_fn, output)
        if self.options.relative and not any(bool(g.any()) for g in device_shared[0]["gradients"]):
            raise SharedDataError("The shared gradient is zero: image_prior.relative=true has nothing to go by.")
        check_direction(device_shared[0]["gradients"], self.cfg.objective.type, self.cfg.restarts.scoring)
        warn_of_scoring(self.cfg.restarts)
        return Target(models, device_shared, labels, size), stats, output.shape[1]

    def _recover_label_information(self, *args: Any, **kwargs: Any) -> None:
        """Labels are optimised; Breaching must not infer them."""
        return

    # -- starts --------------------------------------------------------------------------------------------------

    def _initialize_data(self, data_shape: list[int]) -> torch.Tensor:
        """Uniform grey (0.4 ... 0.6 of the pixel range) for `init: grey`; else Breaching's starts."""
        if self.cfg.init != "grey":
            return super()._initialize_data(data_shape)
        pixels = 0.4 + 0.2 * torch.rand(data_shape, **self.setup)
        return (pixels - self.dm) / self.ds

    def _label_starts(self, streams: CandidateStreams, batch_size: int, classes: int) -> torch.Tensor:
        """Standard normal logits, each candidate's from its own stream: (N, B, K)."""
        starts = []
        for index in range(self.cfg.restarts.num_trials):
            with streams.use(index):
                starts.append(torch.randn(batch_size, classes, **self.setup))
        return torch.stack(starts)

    def _to_pixels(self, data: torch.Tensor) -> torch.Tensor:
        return data * self.ds + self.dm

    # -- the loop ------------------------------------------------------------------------------------------------

    @keeping_freed_memory()
    def _run(
        self, target: Target, starts: list[torch.Tensor], stats: dict[str, Any], dryrun: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All candidates to the end: images in the network's normalisation, and label probabilities (N, B, K)."""
        jointly = self.cfg.restarts.get("parallel_candidates", True)
        group = self.group if jointly else None
        if group is not None:
            group.initialize(None)
            self._prepare_group(group, starts[0])
        elif self.group is not None:
            log.warning("restarts.parallel_candidates=False: there is no group, so the group term is 0.")
        if not jointly:
            self._say_no_checkpoint()
        matching = self._matching(target, group)
        blocks = [slice(None)] if jointly else [slice(n, n + 1) for n in range(len(starts[0]))]
        results, engines = [], []
        for block in blocks:
            seeds = range(self._seed(), self._seed() + len(starts[0]))[block]
            engine = self._engine(matching, [start[block] for start in starts], list(seeds))
            checkpoint = self._checkpoint(target, starts, engine.name, dryrun) if jointly else None
            loop = JointLoop(engine, self.cfg, self._pixel_box(), group, checkpoint, offset=block.start or 0)
            results.append(loop.run(dryrun))
            engines.append(engine)
            if results[-1].interrupted:
                break  # of the candidates that were not run there is nothing to choose
        found = LoopResult.joined(results)
        self._record(stats, found, engines[0].name, sum(engine.gradient_evaluations for engine in engines))
        stats["full_gradients"] = sum(engine.full_gradients for engine in engines)
        pixels, logits = found.best
        return (pixels - self.dm) / self.ds, logits.softmax(dim=-1)

    def _matching(self, target: Target, group: GroupRegularization | None) -> SubsetMatching:
        model = target.models[0]
        normalised = self.dm.dim() > 0
        gradients = target.shared_data[0]["gradients"]
        what = MatchingTarget(
            model=model,
            loss_fn=unscripted(self.loss_fn),
            parameters={name: p.detach() for name, p in matched_parameters(model).items()},
            gradients=[g.to(**self.setup) for g in gradients],
            mean=self.dm.flatten() if normalised else None,
            std=self.ds.flatten() if normalised else None,
        )
        method = self.cfg.restarts.get("candidate_batching", "auto")
        options, steps = self.options, self.cfg.optim.max_iterations
        evaluations = steps * options.optimizer.inner_iterations
        first_size = options.schedule.size(0, target.shape[0], steps)
        return SubsetMatching(what, options.term, options.prior, group, method, evaluations, first_size)

    def _engine(self, matching: SubsetMatching, starts: list[torch.Tensor], seeds: list[int]) -> MagiaEngine:
        options = self.options
        return MagiaEngine(
            matching,
            starts,
            seeds,
            self.cfg.optim.max_iterations,
            options.schedule,
            options.annealing_for(matching.target.squared_norm()),
            options.optimizer,
            options.pyramid,
        )

    def _pixel_box(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        bounds = (torch.zeros((), **self.setup), torch.ones((), **self.setup))
        return bounds if self.cfg.optim.boxed else None

    def __repr__(self) -> str:
        return f"Attacker (of type {type(self).__name__}) with settings for {self.cfg.type}: {self.options}"


__all__ = ["MagiaAttacker"]
