"""The images of a study: Fashion-MNIST, or the inputs of any dataset."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data.fashion_mnist_files import load_fashion_mnist, load_fashion_mnist_labels
from .config import require

__all__ = ["images_of", "load_fashion_mnist", "load_fashion_mnist_labels"]


def images_of(data: Dataset | Tensor) -> Tensor:
    """The inputs of a dataset (its items or their first entries), or a tensor as it is, as (n, …).

    Raises:
        ValueError: If there is no item, or items are no tensors.
    """
    if not isinstance(data, Tensor):
        items = [data[index] for index in range(len(data))]  # type: ignore[arg-type]
        require(bool(items), "data", "an empty dataset", "a dataset with at least one item")
        inputs = [item[0] if isinstance(item, (tuple, list)) else item for item in items]
        kinds = sorted({type(item).__name__ for item in inputs if not isinstance(item, Tensor)})
        require(not kinds, "data", f"a dataset of {', '.join(kinds)}", "one of tensors (give it transform=ToTensor())")
        data = torch.stack(inputs)
    require(len(data) > 0, "data", tuple(data.shape), "a tensor with at least one item")
    return data
