"""Who trains and releases a network: Breaching's user for the threat model "weights alone"."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from breaching.cases.users import UserSingleStep
from omegaconf import OmegaConf
from torch import Tensor

from ..errors import ConfigError, SharedDataError
from ..values import is_number
from .models import HomogeneousNetwork
from .published import load_checkpoint
from .recipe import Recipe, initialise
from .span import singular_values_in_span
from .training import train, train_or_load
from .training_set import check_training_set

log = logging.getLogger(__name__)

#: keys of `case.training` that are the user's, not the recipe's
_OWN = {"weights", "untrained", "checkpoint_path", "cache_path"}


def release(
    model: HomogeneousNetwork, num_data_points: int, labels: Sequence[int] | Tensor | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Wrap a trained network for `attacker.reconstruct`: what the attacker of this threat model sees.

    Args:
        model: the network.
        num_data_points: the suspected number n of training images.
        labels: of these images, (n,), ±1 or 0 and 1, in any order, where the attacker knows them.

    Returns:
        (server_payload, shared_data), each a list with one entry; there are no gradients in it.
    """
    metadata = {"name": "released", "modality": "vision", "task": "classification", "shape": list(model.shape)}
    payload = {
        "parameters": [p.detach().clone() for p in model.parameters()],
        "buffers": [b.detach().clone() for b in model.buffers()],
        "metadata": OmegaConf.create({**metadata, "classes": 2}),
    }
    known = {"num_data_points": num_data_points, "labels": labels, "local_hyperparams": None}
    return [payload], [{"gradients": None, "buffers": None, "metadata": known}]


class TrainedModelUser(UserSingleStep):
    """A user who trains the server's network on its images to near-stationarity and releases the weights, nothing else.

    `cfg_training` holds the fields of :class:`~breaching_ext.kkt.training.Recipe` and

    * weights: path of a checkpoint to load instead of training;
    * untrained: release the start of the training (the control);
    * checkpoint_path: where a training that was stopped goes on;
    * cache_path: keep the trained weights there, or take them from there; for several attacks on one network.
    """

    def __init__(self, model: Any, loss: Any, dataloader: Any, setup: Any, idx: Any, cfg_user: Any, cfg_training: Any):
        if cfg_user.num_data_points < 1:
            raise ConfigError(f"case.user.num_data_points={cfg_user.num_data_points} is not possible; valid: 1, 2, ...")
        if not isinstance(model, HomogeneousNetwork):
            raise ConfigError(
                "case.user.user_type=trained_model needs case.model=kkt-mlp-300, kkt-conv, ... (one output)."
            )
        for name, value in (cfg_user.get("local_diff_privacy") or {}).items():
            if is_number(value) and value > 0:
                raise ConfigError(
                    f"case.user.local_diff_privacy.{name}={value}: a client that releases its weights does not apply "
                    "it, and the attack would be measured without that defence; valid: 0."
                )
        if cfg_training.get("untrained") and cfg_training.get("weights"):
            raise ConfigError(
                f"case.training.untrained=true releases no weights={cfg_training.weights}; valid: one of the two."
            )
        super().__init__(model, loss, dataloader, setup, idx, cfg_user)
        self.training_options = cfg_training
        self.recipe = recipe_from(cfg_training)
        self.report: dict[str, Any] | None = None

    def compute_local_updates(self, server_payload: dict, custom_data: dict | None = None) -> tuple[dict, dict]:
        """Train, and return the released weights as (shared_data, true_user_data)."""
        self.counted_queries += 1
        data = self._load_data() if custom_data is None else custom_data
        self.data_key = "inputs"
        images, labels = data["inputs"].to(**self.setup), data["labels"]
        wrong = sorted(set(labels.tolist()) - {0, 1})
        if wrong:
            raise SharedDataError(f"Labels {wrong} are not those of two classes; valid: 0 and 1.")
        with torch.no_grad():
            for mine, theirs in zip(self.model.parameters(), server_payload["parameters"], strict=True):
                mine.copy_(theirs)
        mean_image = getattr(getattr(self.dataloader.dataset, "dataset", None), "mean_image", None)
        if mean_image is not None:
            self.model.mean.copy_(mean_image())
        check_training_set(self.model, images, 2.0 * labels - 1)
        self._train(images, 2.0 * labels - 1)
        with torch.no_grad():
            margins = (2.0 * labels - 1) * self.model(images)[:, 0]
        if self.training_options.get("weights"):
            self._doubt(margins)
        metadata = {
            "num_data_points": self.num_data_points if self.provide_num_data_points else None,
            "labels": labels.sort()[0] if self.provide_labels else None,
            "local_hyperparams": None,
        }
        shared = {
            "parameters": [p.detach().clone() for p in self.model.parameters()],
            "buffers": [b.detach().clone() for b in self.model.buffers()],
            "gradients": None,
            "metadata": metadata,
        }
        return shared, {"data": images, "labels": labels, "buffers": None, "margins": margins.cpu()}

    def unseen(self) -> Tensor | None:
        """Return as many images of the other split, the control of an evaluation; None where there are none."""
        dataset = getattr(self.dataloader.dataset, "dataset", None)
        if dataset is None or not hasattr(dataset, "other_split"):
            return None
        other = dataset.other_split()
        room = len(other) - self.num_data_points
        if room < 0:
            return None
        start = int(self.user_idx or 0) * self.num_data_points % max(room, 1)
        return torch.stack([other[start + i][0] for i in range(self.num_data_points)]).to(**self.setup)

    def _train(self, images: Tensor, labels: Tensor) -> None:
        options = self.training_options
        if options.get("weights"):
            load_checkpoint(self.model, options.weights)
        elif options.get("untrained"):
            initialise(self.model, self.recipe)
        else:
            self._train_network(images, labels)

    def _doubt(self, margins: Tensor) -> None:
        """Say where loaded weights do not seem to be of these images: metrics would call them training images."""
        wrong = int((margins <= 0).sum())
        self.report = {"misclassified": wrong}
        if wrong:
            log.warning(
                "The loaded network misclassifies %d of the client's %d images: they are probably not its training "
                "images, or its mean image (the dataset's, or 'mean' in the file) is another.",
                *(wrong, len(margins)),
            )

    def _train_network(self, images: Tensor, labels: Tensor) -> None:
        options = self.training_options
        if options.get("cache_path"):
            checkpoint = options.get("checkpoint_path")
            report = train_or_load(self.model, images, labels, self.recipe, options.cache_path, checkpoint)
        else:
            report = train(self.model, images, labels, self.recipe, options.get("checkpoint_path"))
        log.info(
            "Trained for %d steps (%.1f s): loss %.1e, KKT residual of the training data %.4f.",
            *(report.steps, report.seconds, report.loss, report.residual),
        )
        self.report = report.as_dict()
        first = next(self.model.parameters()).detach()
        if first.ndim == 2:
            values = singular_values_in_span(first, (images - self.model.mean).flatten(1)).tolist()
            log.info("Singular values of the first layer in the span of the data: %s.", _joined(values))
            self.report["singular_values_in_span"] = values


def recipe_from(options: Mapping[str, Any]) -> Recipe:
    """Return the recipe among the options of `case.training`.

    Raises:
        ConfigError: for a key that is neither of the recipe nor of the user.
    """
    names = {f.name for f in fields(Recipe)}
    unknown = set(options) - names - _OWN
    if unknown:
        valid = ", ".join([*sorted(names), *sorted(_OWN)])
        raise ConfigError(f"Unknown case.training keys {sorted(unknown)}; valid: {valid}.")
    return Recipe(**{name: options[name] for name in names if name in options})


def _joined(values: list[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)
