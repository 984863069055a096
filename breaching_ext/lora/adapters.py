"""Put peft's LoRA adapters on named layers of a model, and read and set their factors as matrices.

peft is an optional dependency (`pip install breaching-ext[lora]`); only this module imports it.

Convolutions are adapted as peft does it: A is a convolution to r channels with the layer's kernel, stride and padding,
B a 1 × 1 convolution after it. Flattened over input channels and kernel, A is (r, C·k·k), B (o, r), and the weight of
the composed convolution is B A, so that one set of formulas serves both kinds of layers.
"""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import BreachingExtError, ConfigError
from ..modes import evaluating
from .decode import Factors

log = logging.getLogger(__name__)

__all__ = [
    "MissingPeftError",
    "adapt",
    "check_layers",
    "factors_of",
    "full_ranks",
    "layer_shapes",
    "only_weights_of",
    "random_factors",
    "row_counts",
]


class MissingPeftError(BreachingExtError, ImportError):
    """peft is not installed."""


def check_layers(model: nn.Module, layers: Sequence[str]) -> None:
    """Check that the names are those of linear or convolutional layers that can be adapted.

    Raises:
        ConfigError: naming the first that is not, and the valid ones.
    """
    valid = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    named = list(model.named_parameters(remove_duplicate=False))
    for name in layers:
        if name not in valid:
            raise ConfigError(f"layers={name!r} is no linear or convolutional layer; valid: {', '.join(valid)}.")
        module = model.get_submodule(name)
        if isinstance(module, nn.Conv2d):
            _check_convolution(name, module)
        shared = sorted(other for other, parameter in named if parameter is module.weight)
        if len(shared) > 1:  # peft would move the weight in all places, the adapter only in one
            raise ConfigError(f"layers={name!r} shares its weight ({', '.join(shared)}); valid: layers with their own.")
    if not layers:
        raise ConfigError(f"layers=[] adapts nothing; valid: one or more of {', '.join(valid)}.")


def _check_convolution(name: str, layer: nn.Conv2d) -> None:
    """Refuse what peft's factors of a convolution leave out."""
    plain = {"groups": 1, "dilation": (1, 1), "padding_mode": "zeros"}
    for key, only in plain.items():
        value = getattr(layer, key)
        if value != only:
            raise ConfigError(f"layers={name!r} is a convolution with {key}={value}; valid: {key}={only}.")


def layer_shapes(model: nn.Module, layers: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Return (o, i) of each layer's weight as a matrix: i counts input channels times kernel entries."""
    weights: dict[str, torch.Tensor] = {name: model.get_parameter(f"{name}.weight") for name in layers}
    return {name: (len(weight), weight[0].numel()) for name, weight in weights.items()}


def full_ranks(model: nn.Module, layers: Sequence[str]) -> dict[str, int]:
    """Return max(o, i) of each layer: from that rank on either factor alone determines the layer's gradient."""
    return {name: max(shape) for name, shape in layer_shapes(model, layers).items()}


def row_counts(model: nn.Module, layers: Sequence[str], shape: Sequence[int], batch: int) -> dict[str, int]:
    """Return how many rows enter each layer: examples, times tokens or positions, over all its calls in a forward pass.

    No gradient has a larger rank: it is a sum of one outer product a row.

    Args:
        model: the model; it is not changed.
        layers: names of the layers.
        shape: shape of one image, (C, H, W).
        batch: images in the batch.

    Raises:
        ConfigError: for a layer that is not called: nothing is known of the rows of one whose weight is used otherwise.
    """
    counts = dict.fromkeys(layers, 0)
    shapes = layer_shapes(model, layers)

    def record(name: str) -> Any:
        def hook(module: nn.Module, _: Any, output: torch.Tensor) -> None:
            counts[name] += output.numel() // shapes[name][0]

        return hook

    handles = [model.get_submodule(name).register_forward_hook(record(name)) for name in layers]
    try:
        with torch.no_grad(), evaluating(model):
            model(next(model.parameters()).new_zeros(batch, *shape))
    finally:
        for handle in handles:
            handle.remove()
    for name in (name for name, count in counts.items() if not count):
        raise ConfigError(f"layers={name!r} is not called in a forward pass; valid: layers that the model calls.")
    return counts


def random_factors(
    shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int], scale: float, start: str, seed: int
) -> dict[str, Factors]:
    """Draw factors as peft initialises them, uniform in ±1/√fan_in; B is zero, or drawn in the same way.

    Args:
        shapes: layer -> (o, i).
        ranks: layer -> r.
        scale: s of every layer, peft's lora_alpha / r.
        start: `zero` (B = 0, the first round of a fine-tuning) or `random` (B ≠ 0, as in later rounds).
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, (outputs, inputs) in shapes.items():
        r = ranks[name]
        a = (2 * torch.rand(r, inputs, generator=generator, dtype=torch.double) - 1) * inputs**-0.5
        b = (2 * torch.rand(outputs, r, generator=generator, dtype=torch.double) - 1) * r**-0.5
        factors[name] = Factors(a, b if start == "random" else torch.zeros_like(b), scale)
    return factors


def adapt(model: nn.Module, factors: Mapping[str, Factors]) -> nn.Module:
    """Return a copy of the model with peft's adapters on some layers, which computes the same function.

    The adapters get the given A and B, and the frozen base weight becomes W − s·B A. So whatever the factors, the
    effective weight is the model's own W, and with it the outputs and the full gradient: experiments that differ in
    rank and factors differ in nothing else. Only A and B require a gradient. Every module keeps its mode, training or
    evaluation.

    Args:
        model: the plain model, with effective weights W.
        factors: layer -> A (r, i), B (o, r) and the scale s.

    Raises:
        MissingPeftError: when peft is not installed.
        ConfigError: for a name that is no layer, a rank below 1, or factors of other shapes.
    """
    check_layers(model, list(factors))
    for name, (outputs, inputs) in layer_shapes(model, list(factors)).items():
        a, b = tuple(factors[name].a.shape), tuple(factors[name].b.shape)
        if a[:1] == (0,):
            raise ConfigError(f"rank=0 of layer {name!r} is not possible; valid: 1, 2, 3, ... or 'full'.")
        if a != (*a[:1], inputs) or b != (outputs, *a[:1]):
            valid = f"A (r, {inputs}) and B ({outputs}, r)"
            raise ConfigError(f"factors of layer {name!r} have the shapes A {a} and B {b}; valid: {valid}.")
    adapted = _inject(copy.deepcopy(model), {name: len(factor.a) for name, factor in factors.items()})
    adapted.requires_grad_(False)
    with torch.no_grad():
        for name, factor in factors.items():
            layer: Any = adapted.get_submodule(name)
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            a.copy_(factor.a.reshape(a.shape))
            b.copy_(factor.b.reshape(b.shape))
            layer.scaling["default"] = factor.scale
            weight = layer.get_base_layer().weight
            weight.sub_((factor.scale * factor.b @ factor.a).reshape(weight.shape).to(weight))
            a.requires_grad_(True)
            b.requires_grad_(True)
    _take_modes(adapted, model)
    return adapted


def _take_modes(adapted: nn.Module, model: nn.Module) -> None:
    """Give every module the mode that it had in the plain model, and an adapter's parts that of the layer."""
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in adapted.named_modules():
        while name not in modes:
            name = name.rpartition(".")[0]
        module.training = modes[name]


def factors_of(model: nn.Module, layer: str) -> Factors:
    """Read A (r, i), B (o, r) and s of an adapted layer.

    Raises:
        ConfigError: for a layer without an adapter named "default", or one that is more than a product (DoRA).
    """
    adapted = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    if layer not in adapted:
        raise ConfigError(f"layer={layer!r} has no adapter; valid: {', '.join(adapted) or 'none, the model has none'}.")
    module: Any = model.get_submodule(layer)
    names = sorted(getattr(module, "lora_A", {}))
    if "default" not in names:
        raise ConfigError(f"layer={layer!r} has the adapters {names}; valid: one that is named 'default'.")
    if getattr(module, "use_dora", {}).get("default", False):
        raise ConfigError(f"layer={layer!r} has an adapter with use_dora=True; valid: False, W + s·B·A.")
    a, b = module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach()
    return Factors(a.flatten(1), b.flatten(1), float(module.scaling["default"]))


def only_weights_of(model: nn.Module, layers: Sequence[str]) -> nn.Module:
    """Return a copy of the plain model in which only the weights of these layers require a gradient."""
    check_layers(model, layers)
    copied = copy.deepcopy(model).requires_grad_(False)
    for name in layers:
        copied.get_submodule(name).weight.requires_grad_(True)
    return copied


def require_peft() -> None:
    """Raise :class:`MissingPeftError` where peft cannot be imported."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise MissingPeftError("The LoRA bridge needs peft: pip install 'breaching-ext[lora]'.") from error


def _inject(model: nn.Module, ranks: Mapping[str, int]) -> nn.Module:
    require_peft()
    from peft import LoraConfig, inject_adapter_in_model

    # peft reads a list of names as suffixes; a pattern that matches whole names cannot take in other layers
    pattern = "|".join(map(re.escape, ranks))
    by_name = {f"^{re.escape(name)}": rank for name, rank in ranks.items()}
    config = LoraConfig(r=1, rank_pattern=by_name, target_modules=f"({pattern})", lora_dropout=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return inject_adapter_in_model(config, model)
