"""Two small models to adapt, with linear and convolutional layers, and the names of the layers that are adapted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import unknown

__all__ = ["MODELS", "ModelSpec", "SmallConv", "SmallViT", "build_model"]


class SmallConv(nn.Module):
    """Three convolutions and two linear layers with tanh between them, for images (B, C, 32, 32).

    Args:
        channels: C, colour channels of the images.
        classes: number of classes.
        width: channels of the convolutions.
    """

    def __init__(self, channels: int = 3, classes: int = 8, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 5, stride=2, padding=2)
        self.conv2 = nn.Conv2d(width, width, 5, stride=2, padding=2)
        self.conv3 = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.fc1 = nn.Linear(width * 4 * 4, 32)
        self.fc2 = nn.Linear(32, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (B, C, 32, 32) to logits (B, K)."""
        for conv in (self.conv1, self.conv2, self.conv3):
            x = torch.tanh(conv(x))
        return self.fc2(torch.tanh(self.fc1(x.flatten(1))))


class _Block(nn.Module):
    """A transformer block with normalisation in front (Dosovitskiy et al., ICLR 2021), written with plain layers.

    Query, key and value share one linear layer, so that every weight of the block belongs to an `nn.Linear` that
    peft can adapt; `nn.MultiheadAttention` keeps them in a bare parameter.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (B, T, D) to tokens (B, T, D)."""
        batch, tokens, width = x.shape
        split = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)  # each (B, heads, T, D / heads)
        scores = query @ key.transpose(-1, -2) * (width // self.heads) ** -0.5
        mixed = (scores.softmax(dim=-1) @ value).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.proj(mixed)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class SmallViT(nn.Module):
    """A vision transformer of two blocks for images (B, C, 32, 32), patches of 4 × 4 pixels.

    Args:
        channels: C, colour channels of the images.
        classes: number of classes.
        width: token width D.
        pool: what the classifier reads: `mean` (the mean token) or `tokens` (all tokens side by side).
    """

    def __init__(self, channels: int = 3, classes: int = 8, width: int = 48, pool: str = "mean") -> None:
        super().__init__()
        if pool not in ("mean", "tokens"):
            raise unknown("pool", pool, ("mean", "tokens"))
        self.pool, patch, tokens = pool, 4, (32 // 4) ** 2
        self.patch = nn.Conv2d(channels, width, patch, stride=patch)
        self.position = nn.Parameter(0.5 * torch.randn(1, tokens, width))
        self.blocks = nn.Sequential(_Block(width, 4), _Block(width, 4))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width * (tokens if pool == "tokens" else 1), classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (B, C, 32, 32) to logits (B, K)."""
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position  # (B, T, D)
        x = self.norm(self.blocks(x))
        return self.head(x.mean(dim=1) if self.pool == "mean" else x.flatten(1))


@dataclass(frozen=True)
class ModelSpec:
    """How to build a model, and which of its layers are adapted unless the config says otherwise."""

    build: Callable[..., nn.Module]
    layers: tuple[str, ...]
    options: dict[str, str] = field(default_factory=dict)


_VIT_LAYERS = ("patch", *(f"blocks.{n}.{layer}" for n in range(2) for layer in ("qkv", "proj", "fc1", "fc2")))

MODELS: dict[str, ModelSpec] = {
    "conv": ModelSpec(SmallConv, ("conv1", "conv2", "conv3", "fc1", "fc2")),
    "vit": ModelSpec(SmallViT, _VIT_LAYERS, {"pool": "mean"}),
    "vit_tokens": ModelSpec(SmallViT, _VIT_LAYERS, {"pool": "tokens"}),
}


def build_model(name: str, seed: int, channels: int = 3, classes: int = 8) -> nn.Module:
    """Return an untrained model in evaluation mode and in double precision, initialised from `seed`.

    The global random state is left as it was.

    Raises:
        ConfigError: for an unknown name.
    """
    if name not in MODELS:
        raise unknown("model", name, MODELS)
    spec = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = spec.build(channels, classes, **spec.options)
    return model.double().eval()
