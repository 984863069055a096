"""Homogeneous networks with one output: fully connected, and a small convolutional one.

Their images are pixels in [0, 1]; the public mean image is subtracted by the network itself and travels with it as
a buffer, so that a release of the weights says what was subtracted. Only the first layer has a bias: a network with
biases in deeper layers is not homogeneous in its parameters, and the KKT conditions do not hold for it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn

from ..errors import ConfigError, unknown
from ..values import is_whole

_BIASES = ("first", "none", "hidden", "all")


class SmoothBackwardReLU(nn.Module):
    """ReLU whose derivative is σ(steepness · z), in every order ("ModifiedReLU" of Haim et al.); infinity is plain."""

    def __init__(self, steepness: float = float("inf")) -> None:
        super().__init__()
        self.steepness = steepness

    def forward(self, z: Tensor) -> Tensor:
        """Return the ReLU of z; only derivatives are smooth."""
        relu = torch.relu(z)
        if self.steepness == float("inf"):
            return relu
        # its derivative is the wanted one; torch's threshold of 20 would cut the slope off at 1 - 2e-9
        smooth = nn.functional.softplus(z, beta=self.steepness, threshold=40)
        return relu.detach() + smooth - smooth.detach()

    def extra_repr(self) -> str:
        """Return the steepness."""
        return f"steepness={self.steepness:g}"


class HomogeneousNetwork(nn.Module):
    """Base class: mean image, activations, and the outputs (B, 1) that Breaching expects of a model."""

    mean: Tensor

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.register_buffer("mean", torch.zeros(self.shape))

    def set_steepness(self, steepness: float) -> None:
        """Choose the derivative of all activations."""
        for module in self.modules():
            if isinstance(module, SmoothBackwardReLU):
                module.steepness = steepness


class MLP(HomogeneousNetwork):
    """Fully connected D-h₁-…-1; the keys of its state are those of the paper's checkpoints (`layers.0.weight`, ...).

    Args:
        shape: of an image, (C, H, W).
        widths: units of the hidden layers.
        biases: 'first' (only the first layer has one), 'none', or 'hidden' and 'all' (all but the last, and all; not
            homogeneous; for such checkpoints).
    """

    def __init__(
        self, shape: Sequence[int] = (1, 28, 28), widths: Sequence[int] = (300,), biases: str = "first"
    ) -> None:
        super().__init__(shape)
        if not isinstance(widths, Sequence) or not widths or not all(is_whole(width) and width > 0 for width in widths):
            raise ConfigError(f"widths={widths} is not possible; valid: one or more whole numbers above 0, as (300,).")
        if biases not in _BIASES:
            raise unknown("biases", biases, _BIASES)
        sizes = [int(torch.Size(self.shape).numel()), *widths, 1]
        self.layers = nn.ModuleList(
            nn.Linear(a, b, bias=index < {"none": 0, "first": 1, "hidden": len(widths), "all": len(sizes)}[biases])
            for index, (a, b) in enumerate(itertools.pairwise(sizes))
        )
        self.activation = SmoothBackwardReLU()

    @property
    def linears(self) -> list[tuple[Tensor, Tensor | None]]:
        """Weights and biases, first layer first."""
        return [(layer.weight, layer.bias) for layer in self.layers]  # type: ignore[misc]

    def forward(self, inputs: Tensor, **_: object) -> Tensor:
        """Return outputs (B, 1) for images (B, C, H, W)."""
        return self.after_first(self.layers[0]((inputs - self.mean).flatten(1)))

    def after_first(self, z: Tensor) -> Tensor:
        """Return outputs (B, 1) from the first layer's pre-activations (B, h₁)."""
        for layer in list(self.layers)[1:]:
            z = layer(self.activation(z))
        return z


def is_plain_mlp(model: nn.Module) -> TypeGuard[MLP]:
    """Return whether a network computes what :class:`MLP` does: its formulas hold for no other `forward`."""
    same = all(getattr(type(model), name, None) is getattr(MLP, name) for name in ("forward", "after_first"))
    return isinstance(model, MLP) and same and type(model.activation) is SmoothBackwardReLU


class SmallConv(HomogeneousNetwork):
    """Two convolutions of stride 2 and a linear layer, a few thousand parameters.

    Args:
        shape: of an image, (C, H, W).
        widths: channels of the two convolutions.
    """

    def __init__(self, shape: Sequence[int] = (1, 28, 28), widths: Sequence[int] = (16, 32)) -> None:
        super().__init__(shape)
        if not isinstance(widths, Sequence) or len(widths) != 2 or not all(is_whole(w) and w > 0 for w in widths):
            raise ConfigError(f"widths={widths} is not possible; valid: two whole numbers above 0, as (16, 32).")
        channels, height, width = self.shape
        self.features = nn.Sequential(
            nn.Conv2d(channels, widths[0], 5, stride=2, padding=2),
            SmoothBackwardReLU(),
            nn.Conv2d(widths[0], widths[1], 5, stride=2, padding=2, bias=False),
            SmoothBackwardReLU(),
            nn.Flatten(),
        )
        size = widths[1] * ((height + 3) // 4) * ((width + 3) // 4)
        self.head = nn.Linear(size, 1, bias=False)

    def forward(self, inputs: Tensor, **_: object) -> Tensor:
        """Return outputs (B, 1) for images (B, C, H, W)."""
        return self.head(self.features(inputs - self.mean))


def build_network(name: str, shape: Sequence[int]) -> HomogeneousNetwork:
    """Return a network by the name that `case.model` gives: kkt-mlp-300, kkt-mlp-1000-1000, kkt-conv, kkt-conv-8-16.

    Raises:
        ConfigError: for any other name.
    """
    match = re.fullmatch(r"kkt-(mlp|conv)((?:-\d+)*)", name)
    if match is None:
        raise ConfigError(f"Unknown case.model={name!r}; valid: kkt-mlp-WIDTH[-WIDTH...], kkt-conv[-WIDTH-WIDTH].")
    widths = tuple(int(w) for w in match[2].split("-")[1:])
    if match[1] == "mlp":
        return MLP(shape, widths or (300,))
    return SmallConv(shape, widths or (16, 32))
