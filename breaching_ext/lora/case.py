"""One seed's problem: an untrained model, a client's photos, and public photos that share no pixel with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn
from torchvision.transforms.functional import to_tensor

from ..data.sample_photos import PHOTOS, SamplePhotos
from ..matching.client import client_update, matched_parameters
from .adapters import check_layers, full_ranks, layer_shapes, only_weights_of, random_factors, row_counts
from .decode import Factors
from .models import MODELS, build_model
from .observation import Batch, full_gradient

__all__ = ["MEAN", "SHAPE", "STD", "Case"]

#: per-channel normalisation of the sample photos (config/case/data/sample_photos.yaml)
MEAN, STD = (0.524, 0.373, 0.327), (0.297, 0.230, 0.227)
SHAPE = (3, 32, 32)
_BLOCK = 32  # public images whose gradients are computed at once


@dataclass(frozen=True)
class Case:
    """The parts of the experiment that depend on the seed, and on neither rank nor phase.

    Attributes:
        model_name: a key of `MODELS`.
        layers: names of the adapted layers; empty takes the model's own list.
        seed: of the model, the client's photos and the factors.
        batch: photos of the client.
        public: photos that the server simulates with.
    """

    model_name: str
    layers: tuple[str, ...]
    seed: int
    batch: int = 1
    public: int = 256

    @cached_property
    def model(self) -> nn.Module:
        """The plain model, in double precision."""
        return build_model(self.model_name, self.seed, SHAPE[0], len(PHOTOS))

    @cached_property
    def adapted_layers(self) -> tuple[str, ...]:
        """Names of the adapted layers, checked, in the order of the model."""
        names = self.layers or MODELS[self.model_name].layers
        check_layers(self.model, names)
        return tuple(name for name, _ in self.model.named_modules() if name in names)

    @cached_property
    def client(self) -> Batch:
        """The client's photos: middle thirds, another client for every seed; up to 8 photos have different classes."""
        first = self.seed * (len(PHOTOS) + 1) * self.batch  # another photo, and another crop of it, a seed
        return _photos(range(first, first + self.batch), training=False)

    @cached_property
    def gradient(self) -> dict[str, torch.Tensor]:
        """The client's full gradient, layer -> (o, i)."""
        return full_gradient(self.model, self.adapted_layers, self.client)

    @cached_property
    def rows(self) -> dict[str, int]:
        """How many rows enter each layer, which bounds the rank of its gradient."""
        return row_counts(self.model, self.adapted_layers, SHAPE, self.batch)

    @cached_property
    def public_gradients(self) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Gradients of public batches with the client's labels, layer -> (n, o, i); and which are held out, (n,).

        The labels are known to the server here, so it simulates with them. Public photos are training crops: outer
        thirds, of which the right ones are held out.
        """
        photos = _photos(range(self.public), training=True).images
        held_out = torch.arange(self.public) // len(PHOTOS) % 2 == 1
        batches = photos[_batches(held_out, self.batch)]  # (n, B, C, H, W)
        model = only_weights_of(self.model, self.adapted_layers)
        update = client_update(model, torch.nn.functional.cross_entropy)
        labels = self.client.labels
        per_batch = torch.func.vmap(lambda images: update(images, labels)[0])
        blocks = [per_batch(block) for block in batches.split(_BLOCK)]
        stacks = [torch.cat(column).detach() for column in zip(*blocks, strict=True)]
        named = dict(zip(matched_parameters(model), stacks, strict=True))
        gradients = {name: named[f"{name}.weight"].flatten(2) for name in self.adapted_layers}
        return gradients, held_out

    def ranks(self, rank: int | str) -> dict[str, int]:
        """Rank of each layer for a rank of the ladder, where `full` means max(o, i)."""
        if rank == "full":
            return full_ranks(self.model, self.adapted_layers)
        return dict.fromkeys(self.adapted_layers, int(rank))

    def factors(self, rank: int | str, start: str, scale: float) -> Mapping[str, Factors]:
        """Draw the factors for a rank; the same A for both starts."""
        shapes = layer_shapes(self.model, self.adapted_layers)
        return random_factors(shapes, self.ranks(rank), scale, start, 1000 + self.seed)


def _batches(held_out: torch.Tensor, size: int) -> torch.Tensor:
    """Return the photos of each public batch, (n, size): a photo and those that follow it on its side of the split."""
    batches = torch.empty(len(held_out), size, dtype=torch.long)
    for side in (held_out, ~held_out):
        members = side.nonzero().flatten()
        batches[members] = torch.stack([members.roll(-shift) for shift in range(size)], dim=1)
    return batches


def _photos(indices: Sequence[int], training: bool) -> Batch:
    dataset = SamplePhotos(size=SHAPE[1], training=training)
    points = [dataset[index % len(dataset)] for index in indices]
    mean, std = (torch.tensor(values, dtype=torch.double).view(-1, 1, 1) for values in (MEAN, STD))
    images = torch.stack([(to_tensor(image).double() - mean) / std for image, _ in points])
    return Batch(images, torch.tensor([label for _, label in points]))
