"""A small real colour dataset that needs no download: crops of the photos that scikit-image's wheel carries.

The class of a crop is its photo, or one drawn uniformly from any number of classes (for studies of labels: untrained
models do not care what a label means, only how often it repeats in a batch). Training crops come from the left and
right thirds of a photo, validation crops from the middle third, so the two splits share no pixel. Positions follow
the Halton sequence, which makes them deterministic, spread out from the first crop on, and as many as asked for. Its
points alternate between the lower and the upper half, as training crops do between the thirds: they show the lower half
of the left third and the upper half of the right one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from PIL import Image

from ..errors import ConfigError, unknown

#: The photos in class order (names of functions of skimage.data; all of them ship inside the wheel).
PHOTOS = (
    "astronaut",
    "chelsea",
    "coffee",
    "rocket",
    "stereo_motorcycle",
    "immunohistochemistry",
    "retina",
    "hubble_deep_field",
)

#: Valid values of case.data.labels.
LABELS = ("photo", "uniform")


class SamplePhotos(torch.utils.data.Dataset):
    """Square crops of eight photos, in class-alternating order (point i has class i mod 8).

    Args:
        size: side of a crop in pixels after resizing; images are (3, size, size).
        training: training crops (outer thirds of a photo) instead of validation crops (middle third).
        crops_per_photo: crops of each photo in this split.
        window: side of the square cut out of the photo, as a share of the photo's shorter side, in (0, 1/3].
        transform: applied to the PIL image, as in torchvision.
        labels: 'photo' (the class is the photo) or 'uniform' (drawn from `classes` classes, the same in every run).
        classes: number of classes; with labels='photo' that of the photos.

    Raises:
        ConfigError: when a value is out of range.
    """

    def __init__(
        self,
        size: int = 32,
        training: bool = False,
        crops_per_photo: int = 128,
        window: float = 0.3,
        transform: Callable | None = None,
        labels: str = "photo",
        classes: int = len(PHOTOS),
    ) -> None:
        if size < 1 or crops_per_photo < 1:
            raise ConfigError(f"sample_photos needs size >= 1 and crops_per_photo >= 1, got {size}, {crops_per_photo}.")
        if not 0 < window <= 1 / 3:
            raise ConfigError(f"case.data.window={window} is out of range; valid: above 0, up to 1/3.")
        self.size, self.training, self.window, self.transform = size, training, window, transform
        self.classes, self.targets = _labels(labels, classes, crops_per_photo * len(PHOTOS), training)
        self.lookup = dict(enumerate(self.targets))
        self.mean: Sequence[float] = [0]
        self.std: Sequence[float] = [1]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor | Image.Image, int]:
        index = int(index)
        number, photo = divmod(index, len(PHOTOS))
        crop = self._crop(PHOTOS[photo], number)
        return (self.transform(crop) if self.transform else crop), self.targets[index]

    def _crop(self, photo: str, number: int) -> Image.Image:
        image = _photo(photo)
        top, left, side = self._window(image.shape[0], image.shape[1], number)
        window = Image.fromarray(image[top : top + side, left : left + side])
        return window.resize((self.size, self.size), Image.Resampling.LANCZOS)

    def _window(self, height: int, width: int, number: int) -> tuple[int, int, int]:
        """Return top, left and side of the square that a crop shows."""
        left, right = self._strip(width, number)
        side = max(1, min(round(self.window * min(height, width)), right - left))  # never beyond its strip
        y, x = _positions(number + 1)[number]
        top = round(y * (height - side))
        return top, left + round(x * (right - left - side)), side

    def _strip(self, width: int, number: int) -> tuple[int, int]:
        """Return the columns this crop is taken from: the middle third, or the outer thirds in turn."""
        thirds = [0, width // 3, width - width // 3, width]
        third = (0, 2)[number % 2] if self.training else 1
        return thirds[third], thirds[third + 1]


def _labels(kind: str, classes: int, count: int, training: bool) -> tuple[list[str], list[int]]:
    """Return the names of the classes, and the class of every point."""
    if kind not in LABELS:
        raise unknown("case.data.labels", kind, LABELS)
    if kind == "uniform":
        if classes < 1:
            raise ConfigError(f"case.data.classes={classes} is out of range; valid: 1 or more.")
        generator = torch.Generator().manual_seed(int(training))
        return [str(c) for c in range(classes)], torch.randint(classes, (count,), generator=generator).tolist()
    if classes != len(PHOTOS):
        raise ConfigError(
            f"case.data.classes={classes} does not fit case.data.labels=photo; valid: {len(PHOTOS)}, or labels=uniform."
        )
    return list(PHOTOS), [i % len(PHOTOS) for i in range(count)]


def interleaved_indices(lookup: Mapping[int, int], length: int, clients: int, user_idx: int) -> list[int]:
    """Return the indices of one user's block after putting the classes of a dataset in turn.

    Args:
        lookup: index -> class, as Breaching's datasets carry it.
        length: number of points in use (the first `length` indices).
        clients: number of users; every user gets `length // clients` points.
        user_idx: which user, 0 to clients - 1.
    """
    rank: dict[int, int] = {}
    position = []
    for index in range(length):
        label = lookup[index]
        position.append((rank.get(label, 0), label, index))
        rank[label] = rank.get(label, 0) + 1
    order = [index for _, _, index in sorted(position)]
    share = length // clients
    return order[user_idx * share : (user_idx + 1) * share]


def _positions(count: int) -> np.ndarray:
    """Return at least `count` points of the two-dimensional Halton sequence, (n, 2) in [0, 1)."""
    return _halton(1 << max(7, count.bit_length()))


@functools.lru_cache(maxsize=2)
def _halton(count: int) -> np.ndarray:
    from scipy.stats.qmc import Halton

    return Halton(d=2, scramble=False).random(count + 1)[1:]  # the first point is the corner (0, 0)


@functools.lru_cache(maxsize=len(PHOTOS))
def _photo(name: str) -> np.ndarray:
    """Return a photo as an (H, W, 3) array of bytes."""
    import skimage.data

    image = getattr(skimage.data, name)()
    return image[0] if isinstance(image, tuple) else image  # stereo_motorcycle: left view, right view, disparity
