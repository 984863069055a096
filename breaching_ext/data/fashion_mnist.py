"""Fashion-MNIST with two classes, for networks with one output: the training sets of the KKT reconstruction."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ConfigError, unknown
from .fashion_mnist_files import load_fashion_mnist, load_fashion_mnist_labels

LABELINGS = ("permuted", "parity", "halves")
_CLASSES = 10


class BinaryFashionMNIST(torch.utils.data.Dataset):
    """Fashion-MNIST in blocks of ten images, one of each of its classes, five of them with label 1 and five with 0.

    Which image of a class stands in which block is drawn once, with a fixed seed, so that every consecutive block is an
    independent balanced draw and a user's index says which images the user owns.

    Args:
        training: the 60,000 training images instead of the 10,000 test images.
        labels: 'parity' (even classes have label 1), 'halves' (tops, trousers and coats 0 to 4 have label 1), or
            'permuted': the five ones of each block are dealt out at random, so that nothing but the image itself
            tells its label. That is the hardest problem to learn, and the one from which most can be reconstructed.
        folder: where the idx files are; None looks where :func:`load_fashion_mnist` says.
        size: use the first so many images only; None: all.

    Raises:
        ConfigError: for another labelling, or where the dataset is not at hand.
    """

    def __init__(
        self,
        training: bool = True,
        labels: str = "permuted",
        folder: str | Path | None = None,
        size: int | None = None,
    ) -> None:
        if labels not in LABELINGS:
            raise unknown("case.data.labels", labels, LABELINGS)
        images, classes = _load(None if folder is None else str(Path(folder).expanduser()))[0 if training else 1]
        generator = torch.Generator().manual_seed(0)
        columns = []
        for label in range(_CLASSES):
            own = (classes == label).nonzero().flatten()
            columns.append(own[torch.randperm(len(own), generator=generator)])
        blocks = min(len(column) for column in columns)
        self._order = torch.stack([column[:blocks] for column in columns], dim=1).flatten()[:size]  # (blocks * 10,)
        self._images, self._settings = images, (not training, labels, folder)
        self.targets = _binary(blocks, labels, generator).flatten().tolist()[:size]
        self.lookup = dict(enumerate(self.targets))
        self.classes = ["-1", "+1"]
        self.mean, self.std = [0.0], [1.0]

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return an image (1, 28, 28) in [0, 1] and its label, 0 or 1."""
        return self._images[self._order[int(index)]], self.targets[int(index)]

    def other_split(self) -> BinaryFashionMNIST:
        """Return the split that this one is not."""
        return BinaryFashionMNIST(*self._settings)

    def mean_image(self) -> Tensor:
        """Mean over all images of the split, (1, 28, 28)."""
        return self._images.mean(dim=0)


def _binary(blocks: int, labels: str, generator: torch.Generator) -> Tensor:
    """Labels 0 and 1, (blocks, 10); five of each in every block."""
    classes = torch.arange(_CLASSES)
    row = (classes < _CLASSES // 2).long() if labels == "halves" else 1 - classes % 2
    rows = row.expand(blocks, -1)
    if labels != "permuted":
        return rows
    dealt = torch.rand(blocks, _CLASSES, generator=generator).argsort(dim=1)
    return rows.gather(1, dealt)


@functools.lru_cache(maxsize=1)
def _load(folder: str | None) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    try:
        images = load_fashion_mnist(folder, key="case.data.path")
        classes = load_fashion_mnist_labels(folder, key="case.data.path")
    except FileNotFoundError as error:
        raise ConfigError(str(error)) from error
    return (images[0], classes[0]), (images[1], classes[1])
