"""What is attacked: models, data and labels as Breaching prepares them, checked against each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from breaching.attacks.optimization_based_attack import OptimizationBasedAttacker

from ..errors import ConfigError, first_line
from ..regularizers import GroupRegularization
from .augmentation_checks import check_augmentations
from .candidate_choice import Target
from .inferred_labels import infer_labels
from .output_checks import check_direction, check_labels_of_output, output_of, trial_images


class Preparation(OptimizationBasedAttacker):
    """The part of the joint attack that comes before its loop."""

    cfg: Any
    loss_fn: Callable[..., torch.Tensor]
    augmentations: torch.nn.Sequential

    def prepare_attack(self, server_payload: list[dict], shared_data: list[dict]) -> tuple[Any, Any, Any]:
        """Prepare as Breaching does, but without a mean and deviation that the case names and does not use."""
        prepared = super().prepare_attack(server_payload, shared_data)
        if server_payload[0]["metadata"].get("normalize") is False:
            self.dm, self.ds = torch.tensor(0, **self.setup), torch.tensor(1, **self.setup)
        elif self.dm.dim():  # Breaching shapes them for images, whatever the data are
            of_a_point = (1, -1, *[1] * (len(self.data_shape) - 1))
            self.dm, self.ds = self.dm.reshape(of_a_point), self.ds.reshape(of_a_point)
        return prepared

    def _construct_models_from_payload_and_buffers(self, *args: Any) -> list[torch.nn.Module]:
        """Construct the models as Breaching does; what TorchScript says of a model is one line."""
        try:
            return super()._construct_models_from_payload_and_buffers(*args)
        except Exception as error:
            if self.cfg.impl.get("JIT") not in ("script", "trace"):
                raise
            raise ConfigError(
                f"impl.JIT={self.cfg.impl.JIT} does not take this model ({type(error).__name__}: {first_line(error)}); "
                "valid: empty."
            ) from error

    def _check_evaluation(self, target: Target, group: GroupRegularization | None, modality: str) -> None:
        """Check that augmentations, model, loss, labels and gradients fit each other."""
        start = trial_images(target.shape, **self.setup)
        augmented = check_augmentations(
            self.augmentations, self.cfg.augmentations or {}, start, self.cfg.differentiable_augmentations, group
        )
        for model, data in zip(target.models, target.shared_data, strict=True):
            check_direction(data["gradients"], self.cfg.objective.type, self.cfg.restarts.scoring)
            if modality == "vision":
                output = output_of(model, augmented, "data" if augmented.shape == start.shape else "augmented data")
                check_labels_of_output(self.loss_fn, output, target.labels, target.local_hyperparams)

    def _recover_label_information(self, user_data: list[dict], server_payload: list[dict], rec_models: Any) -> Any:
        """Infer labels as Breaching does, unless the client said them with its local steps; the number is checked."""
        infer = super()._recover_label_information
        return infer_labels(
            lambda: infer(user_data, server_payload, rec_models), user_data, server_payload, self.cfg.label_strategy
        )
