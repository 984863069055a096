"""Checks of Breaching's augmentations, made before the long loop starts; each error is one line."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
from breaching.attacks.auxiliaries.augmentations import augmentation_lookup
from omegaconf import OmegaConf

from ..errors import ConfigError, first_line
from ..matching.randomness import CandidateStreams
from .config_keys import check_arguments, check_option, is_section

log = logging.getLogger(__name__)


def check_augmentation_options(augmentations: Any) -> None:
    """Check the config's part `augmentations`: names, their arguments, and whether each can be built.

    Breaching takes a list, or a name alone, for no augmentations at all.

    Raises:
        ConfigError: naming the key, its value and the valid ones.
    """
    if augmentations is None or (OmegaConf.is_list(augmentations) and not augmentations):
        return
    if not is_section(augmentations):
        raise ConfigError(f"augmentations={augmentations} is not possible; valid: such as augmentations.flip.p=0.5.")
    for key, options in augmentations.items():
        check_option("augmentations key", key, augmentation_lookup)
        name, kind = f"augmentations.{key}", augmentation_lookup[key]
        if not is_section(options):
            raise ConfigError(f"{name}={options} is not possible; valid: its arguments, or {{}} for their defaults.")
        said = {k: v for k, v in options.items() if (k, v) != ("none", None)}  # so a config of Breaching's says {}
        check_arguments(name, kind, said, lists=True)
        try:
            kind(**said)
        except Exception as error:  # whatever is thrown there; Breaching's classes check nothing
            raise _refused(key, said, error) from error


def check_augmentations(
    augmentations: torch.nn.Sequential,
    options: Mapping[str, Any],
    start: torch.Tensor,
    differentiable: bool,
    group: Any,
) -> torch.Tensor:
    """Check that augmentations can be applied; of those that change the images' size, that everything goes with it.

    Also warns of doubtful company.

    Args:
        augmentations: Breaching's, in a row; they may be none.
        options: their arguments by their names, in the same order.
        start: images (B, C, H, W) of the size that is reconstructed.
        differentiable: whether the gradient flows through them; if not, they change the candidates themselves.
        group: the group term, or None.

    Returns:
        What the model gets: augmented images (B, C, H', W').

    Raises:
        ConfigError: naming what can be done.
    """
    images = start
    own = len(options) != len(augmentations)  # a subclass's, of which the config tells nothing
    keys = [type(module).__name__ for module in augmentations] if own else list(options)
    tried = copy.deepcopy(augmentations)  # some keep what they drew first
    with CandidateStreams([0], start.device).use(0):
        for module, key in zip(tried, keys, strict=True):
            try:
                images = module(images)
            except Exception as error:  # whatever is thrown there
                raise _refused(key, options.get(key, {}), error, f" images of {tuple(images.shape[1:])}") from error
    if images.shape == start.shape:
        if differentiable and group is not None and len(augmentations):
            log.warning(
                "differentiable_augmentations=true: the group term compares augmented images with a consensus of "
                "images that are not; regularization.group_regularization.scale=0 leaves it out."
            )
        return images
    sizes = f"augmentations make images of {tuple(images.shape[1:])} from {tuple(start.shape[1:])}"
    if not differentiable:
        raise ConfigError(f"{sizes}, which cannot take a candidate's place; valid: differentiable_augmentations=true.")
    if group is not None:
        raise ConfigError(
            f"{sizes}, which cannot be compared with the consensus; valid: regularization.group_regularization.scale=0."
        )
    return images


def _refused(key: Any, options: Any, error: Exception, what: str = "") -> ConfigError:
    reason = f"{type(error).__name__}: {first_line(error)}"
    return ConfigError(f"augmentations.{key}={dict(options)} does not take{what or ' these values'} ({reason}).")
