"""The extraction problem of one network: its KKT residual, the coordinates of images, and the way back to pixels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .models import HomogeneousNetwork, is_plain_mlp
from .objective import GramResidual, autograd_residual
from .span import Span, span_of

#: (coordinates, signed multipliers, slacks) -> residual of every restart (R,)
Residual = Callable[[Tensor, Tensor, Sequence[Tensor]], Tensor]


@dataclass
class Problem:
    """What a search needs to know about a network.

    Attributes:
        residual: (coordinates (R, k, ...), signed multipliers (R, k), slacks) -> ‖θ − Σ c ∇Φ‖², (R,).
        norm: ‖θ‖².
        mean: mean image (C, H, W); coordinates are those of centred images.
        coordinate_shape: of one image.
        span: the space of the images, or None where all pixels are searched.
        slack_widths: units of the hidden layers, where the residual takes slacks.
    """

    residual: Residual
    norm: float
    mean: Tensor
    coordinate_shape: tuple[int, ...]
    span: Span | None = None
    slack_widths: list[int] = field(default_factory=list)

    def pixels(self, coordinates: Tensor) -> Tensor:
        """Return images (..., C, H, W) with the mean image added, from coordinates (..., *coordinate_shape)."""
        centred = coordinates if self.span is None else self.span.pixels(coordinates)
        lead = coordinates.shape[: coordinates.ndim - len(self.coordinate_shape)]
        return centred.reshape(*lead, *self.mean.shape) + self.mean

    def coordinates_of(self, images: Tensor) -> Tensor:
        """Return the coordinates (..., *coordinate_shape) nearest to images (..., C, H, W)."""
        centred = images.to(self.mean) - self.mean
        return centred if self.span is None else self.span.inside(centred.flatten(-3))


def build_problem(
    model: HomogeneousNetwork,
    steepness: float,
    span: str | int | Span = "auto",
    candidates: int | None = None,
    images: int | None = None,
) -> Problem:
    """Build the problem with the cheapest exact residual for the network.

    Args:
        model: the network; it is not changed.
        steepness: of the slopes σ(steepness · z); infinity is the plain ReLU.
        span: 'auto', 'full', a number (:func:`~breaching_ext.kkt.span.span_of`) or a space; only for an MLP.
        candidates, images: number of candidates, and suspected number of images (see `span_of`).
    """
    mean = model.mean.detach()
    if not is_plain_mlp(model):
        function, parameters = smooth_function(model, steepness)
        norm = float(torch.stack([p.square().sum() for p in parameters.values()]).sum())

        def of_pixels(x: Tensor, c: Tensor, slack: object = ()) -> Tensor:
            return autograd_residual(function, parameters, x + mean, c)

        return Problem(of_pixels, norm, mean, tuple(model.shape))
    layers = [(w.detach(), None if b is None else b.detach()) for w, b in model.linears]
    found = span if isinstance(span, Span) else span_of(layers[0][0], span, candidates, images)
    if found.full:
        full = GramResidual(layers, steepness)
        flat = _flattened(full)
        return Problem(flat, full.norm, mean, tuple(model.shape), None, full.slack_widths)
    first = (found.inside(layers[0][0]), layers[0][1])
    residual = GramResidual([first, *layers[1:]], steepness, found.outside(layers[0][0]))
    return Problem(residual, residual.norm, mean, (found.rank,), found, residual.slack_widths)


def _flattened(residual: GramResidual) -> Residual:
    def of_images(x: Tensor, c: Tensor, slack: Sequence[Tensor] = ()) -> Tensor:
        return residual(x.flatten(2), c, slack)

    return of_images


def smooth_function(
    model: HomogeneousNetwork, steepness: float
) -> tuple[Callable[[dict[str, Tensor], Tensor], Tensor], dict[str, Tensor]]:
    """Return the network with the given slopes as (parameters, images (k, C, H, W)) -> (k,), and its parameters."""
    smooth = copy.deepcopy(model)
    smooth.set_steepness(steepness)
    parameters = {name: p.detach() for name, p in smooth.named_parameters()}
    buffers = dict(smooth.named_buffers())

    def function(theta: dict[str, Tensor], images: Tensor) -> Tensor:
        return torch.func.functional_call(smooth, (theta, buffers), (images,))[:, 0]

    return function, parameters
