"""Autoencoders of three sizes: the study's convolutional one, and two that a CPU trains in numbers."""

from __future__ import annotations

import math
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ..values import is_whole
from .config import require, require_choice

MODELS: tuple[str, ...] = ("autoencoder", "small_conv", "mlp")

#: Defaults that differ from those of the class.
_SMALL: dict[str, dict[str, Any]] = {"small_conv": {"channels": (8, 16), "latent": 32}}


class MLPAutoencoder(nn.Module):
    """Fully connected autoencoder with one hidden layer on each side of a linear code.

    Args:
        image_size: Side of the square one-channel image in pixels.
        hidden: Units of each hidden layer.
        latent: Units of the code.
    """

    def __init__(self, image_size: int = 14, hidden: int = 64, latent: int = 16) -> None:
        """Build the layers."""
        super().__init__()
        pixels = image_size**2
        self.encoder = nn.Sequential(nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, latent))
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, pixels), nn.Sigmoid())

    def forward(self, images: Tensor) -> Tensor:
        """Reconstruct ``images`` (B, 1, H, W), values in [0, 1]."""
        return self.decoder(self.encoder(images.flatten(1))).view_as(images)


class ConvAutoencoder(nn.Module):
    """Convolutional autoencoder: strided 3×3 convolutions, a linear code, and their mirror image.

    The default is the study's: Conv 1→32→64 (stride 2), Linear 3136→128→3136, ConvT 64→32→1, Sigmoid.

    Args:
        image_size: Side of the square one-channel image in pixels.
        channels: Output channels of each convolution.
        latent: Units of the code.
    """

    def __init__(self, image_size: int = 28, channels: tuple[int, ...] = (32, 64), latent: int = 128) -> None:
        """Build the layers."""
        super().__init__()
        sizes = [image_size]
        for _ in channels:
            sizes.append((sizes[-1] + 1) // 2)
        widths = (1, *channels)
        encoder: list[nn.Module] = []
        decoder: list[nn.Module] = []
        for level in range(len(channels)):
            encoder += [nn.Conv2d(widths[level], widths[level + 1], 3, stride=2, padding=1), nn.ReLU()]
        for level in reversed(range(len(channels))):
            extra = sizes[level] - (2 * sizes[level + 1] - 1)
            decoder.append(
                nn.ConvTranspose2d(widths[level + 1], widths[level], 3, stride=2, padding=1, output_padding=extra)
            )
            decoder.append(nn.ReLU() if level else nn.Sigmoid())
        shape = (widths[-1], sizes[-1], sizes[-1])
        self.encoder = nn.Sequential(*encoder, nn.Flatten(), nn.Linear(math.prod(shape), latent))
        self.decoder = nn.Sequential(nn.Linear(latent, math.prod(shape)), nn.ReLU(), nn.Unflatten(1, shape), *decoder)

    def forward(self, images: Tensor) -> Tensor:
        """Reconstruct ``images`` (B, 1, H, W), values in [0, 1]."""
        return self.decoder(self.encoder(images))


def model_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return all options of a model, those that are not given with their defaults.

    Raises:
        ValueError: If the name or an option is unknown, or its value not valid.
    """
    require_choice("model", name, MODELS)
    known = signature(MLPAutoencoder if name == "mlp" else ConvAutoencoder).parameters
    defaults = {key: known[key].default for key in tuple(known)[1:]} | _SMALL.get(name, {})
    require(isinstance(options, dict), "model_options", options, f"a mapping of {', '.join(defaults)}")
    for option, value in options.items():
        require_choice(f"model_options of {name}", option, tuple(defaults))
        if option == "channels":
            valid = isinstance(value, (list, tuple)) and len(value) > 0 and all(map(_counts, value))
            require(valid, option, value, "a list of whole numbers >= 1")
        else:
            require(_counts(value), option, value, "a whole number >= 1")
    return defaults | options


def _counts(value: object) -> bool:
    return is_whole(value) and value >= 1


def create_model(name: str, image_size: int, seed: int = 42, **options: Any) -> nn.Module:
    """Build an autoencoder by name, its weights drawn from ``seed`` without touching the global generator.

    Args:
        name: One of `MODELS`.
        image_size: Side of the image in pixels.
        seed: Seed of the initial weights.
        **options: The model's own arguments (``hidden``, ``latent``, ``channels``).

    Raises:
        ValueError: If the name or an option is unknown, or the image has no pixel.
    """
    options = model_options(name, options)
    require(image_size >= 1, "image_size", image_size, "a whole number >= 1")
    if "channels" in options:
        options["channels"] = tuple(options["channels"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return (MLPAutoencoder if name == "mlp" else ConvAutoencoder)(image_size, **options)
