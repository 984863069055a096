"""Registration of one image to another, for the consensus of group consistency.

Yin et al. (CVPR 2021, "See through gradients", section 3.3) register every candidate to the candidates' pixel mean
with RANSAC-flow (Shen et al., ECCV 2020): a coarse homography from matched features, then a dense flow. Its learned
features are not distributed as a package, so the two stages here come from scikit-image without learning (SIFT
matches and RANSAC, then TV-L1 optical flow), together with cheaper alternatives.

An aligner maps (moving, reference), two (H, W, C) arrays, to sampling coordinates (2, H, W): pixel (r, c) of the
aligned image is read from the moving image at coordinates[:, r, c]. None says that it found no alignment.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import torch
from scipy import ndimage, signal
from skimage import measure, registration, transform
from skimage.feature import SIFT, match_descriptors

from ..errors import unknown

Coordinates = np.ndarray  # (2, H, W)

_RANSAC_SIDE = 128  # features are looked for at this size at least: SIFT finds next to none in a 32 x 32 image
_RANSAC_TRIALS = 300
_MINIMAL_INLIERS = 6
_FINEST, _COARSEST = 0.7, 3.0  # pixels (standard deviations) between which structure is correlated
_PASSES = 4
_LARGEST_SHIFT = 0.5  # of the image side; anything larger is a false match


def _identity(shape: tuple[int, ...]) -> Coordinates:
    return np.mgrid[: shape[0], : shape[1]].astype(float)  # (2, H, W)


def _gray(image: np.ndarray) -> np.ndarray:
    """Return the channel mean stretched to [0, 1]; constant images stay constant."""
    gray = image.mean(axis=-1)
    span = gray.max() - gray.min()
    return (gray - gray.min()) / span if span > 0 else np.zeros_like(gray)


def phase_correlation(moving: np.ndarray, reference: np.ndarray) -> Coordinates | None:
    """Translation from the cross-correlation of the gray images, to a twentieth of a pixel.

    Refined as Guizar-Sicairos et al. (2008), and of what is neither noise nor slow shading. Whitened in full, the phase
    correlation of Kuglin & Hines (1975) finds a shifted copy as well, but any one of several ghosts where the reference
    is the mean of shifted copies, as a consensus is.
    """
    shift = _translation(reference, moving)
    return None if shift is None else _identity(reference.shape) + shift[:, None, None]


def _translation(reference: np.ndarray, moving: np.ndarray) -> np.ndarray | None:
    """Return by how much (rows, columns) `moving` lies further down and right; None for constant or far images."""
    first, second = _gray(reference), _gray(moving)
    if not first.any() or not second.any():
        return None
    target, shift = _structure(first), np.zeros(2)
    for _ in range(_PASSES):  # what has come nearer shares more of the window
        place = _identity(first.shape) + shift[:, None, None]
        found = _structure(ndimage.map_coordinates(second, place, order=1, mode="nearest"))
        if not (target.any() and found.any()):  # flat but for shading
            return None
        shift = shift - registration.phase_cross_correlation(target, found, upsample_factor=20, normalization=None)[0]
    return shift if np.abs(shift).max() <= _LARGEST_SHIFT * min(first.shape) else None


def _structure(gray: np.ndarray) -> np.ndarray:
    """Return what of an image (H, W) is about one to three pixels wide, faded out towards the borders.

    The Fourier transform takes an image for periodic: the edge between opposite borders would not move with it.
    """
    window = np.outer(*(signal.windows.tukey(side + 2, 0.5)[1:-1] for side in gray.shape))  # nowhere 0
    band = ndimage.gaussian_filter(gray, _FINEST) - ndimage.gaussian_filter(gray, _COARSEST)
    return (band - np.average(band, weights=window)) * window


def ransac(moving: np.ndarray, reference: np.ndarray) -> Coordinates | None:
    """Affine map (or, where that is not plausible, translation, rotation and scale) from SIFT matches by RANSAC.

    Returns None where there are too few matches or inliers, or where the fitted map is not a plausible camera move.
    """
    factor = max(1.0, _RANSAC_SIDE / min(reference.shape[:2]))
    in_reference, in_moving = _sift(reference, factor), _sift(moving, factor)
    if in_reference is None or in_moving is None:
        return None
    (points_ref, desc_ref), (points_mov, desc_mov) = in_reference, in_moving
    matches = match_descriptors(desc_ref, desc_mov, cross_check=True, max_ratio=0.85)
    if len(matches) < _MINIMAL_INLIERS:
        return None
    source, target = points_ref[matches[:, 0]], points_mov[matches[:, 1]]  # (M, 2) as (x, y)
    for model_class in (transform.AffineTransform, transform.SimilarityTransform):
        model = _fit(model_class, source, target, factor)
        if model is not None and _plausible(model, reference.shape):
            rows, columns = _identity(reference.shape)
            moved = model(np.stack([columns.ravel(), rows.ravel()], axis=-1))  # (H * W, 2)
            return moved[:, ::-1].T.reshape(2, *reference.shape[:2])
    return None


def _sift(image: np.ndarray, factor: float) -> tuple[np.ndarray, np.ndarray] | None:
    """Return keypoints (K, 2) as (x, y) in pixels of `image`, and their descriptors; None if there are none."""
    gray = _gray(image)
    if factor > 1.0:
        gray = transform.resize(gray, [round(side * factor) for side in gray.shape], order=3, mode="reflect")
    detector = SIFT(upsampling=1)
    try:
        detector.detect_and_extract(gray)
    except RuntimeError:  # scikit-image's way to say that it found no feature
        return None
    keypoints, descriptors = np.asarray(detector.keypoints), np.asarray(detector.descriptors)
    # Pixel centres: index i of the enlarged image lies at (i + 0.5) / factor - 0.5 of the original.
    return (keypoints[:, ::-1] + 0.5) / factor - 0.5, descriptors


def _fit(
    model_class: type[transform.ProjectiveTransform], source: np.ndarray, target: np.ndarray, factor: float
) -> transform.ProjectiveTransform | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "no inliers": said by returning None
        model, inliers = measure.ransac(
            (source, target),
            model_class,
            min_samples=3,
            residual_threshold=2.0 / factor,
            max_trials=_RANSAC_TRIALS,
            rng=0,  # the same images always give the same alignment
        )
    if model is None or inliers is None or inliers.sum() < _MINIMAL_INLIERS:
        return None
    return _estimated(model_class, source[inliers], target[inliers]) or model


def _estimated(
    model_class: type[transform.ProjectiveTransform], source: np.ndarray, target: np.ndarray
) -> transform.ProjectiveTransform | None:
    if hasattr(model_class, "from_estimate"):  # scikit-image 0.26, which needs Python 3.11 and deprecates the other way
        return model_class.from_estimate(source, target) or None
    model = model_class()
    return model if model.estimate(source, target) else None


def _plausible(model: transform.ProjectiveTransform, shape: tuple[int, ...]) -> bool:
    """Reject maps that no two reconstructions of one image differ by: mirrored, collapsed or far away."""
    linear = np.asarray(model.params)[:2, :2]
    corners = np.array([[0, 0], [shape[1] - 1, 0], [0, shape[0] - 1], [shape[1] - 1, shape[0] - 1]], dtype=float)
    moved = np.abs(model(corners) - corners).max()
    return bool(0.5 < np.linalg.det(linear) < 2.0 and moved <= _LARGEST_SHIFT * min(shape[:2]))


def optical_flow(moving: np.ndarray, reference: np.ndarray) -> Coordinates | None:
    """Dense TV-L1 optical flow (Zach, Pock & Bischof 2007; Wedel et al. 2009) between the gray images.

    It begins at the translation that phase correlation finds, where that brings the images nearer: an image of 32
    pixels has hardly any coarser levels on which the flow itself could find a shift of several pixels.
    """
    shape = reference.shape[:2]
    target = reference.mean(axis=-1)
    span = np.ptp(target)
    if min(shape) < 2 or span == 0 or np.ptp(moving.mean(axis=-1)) == 0:
        return None

    def scaled(image: np.ndarray) -> np.ndarray:  # both alike: the flow takes brightness for constant
        return (image.mean(axis=-1) - target.min()) / span

    shift = _translation(reference, moving)
    start = _identity(shape) if shift is None else _identity(shape) + shift[:, None, None]
    shifted = resample(moving, start)
    if np.square(shifted - reference).mean() > np.square(moving - reference).mean():
        start, shifted = _identity(shape), moving
    flow = registration.optical_flow_tvl1(scaled(reference), scaled(shifted), attachment=10.0)  # (2, H, W)
    found = start + flow
    if not np.isfinite(found).all() or np.abs(found - _identity(shape)).max() > _LARGEST_SHIFT * min(shape):
        return None
    return found


def ransac_flow(moving: np.ndarray, reference: np.ndarray) -> Coordinates | None:
    """Coarse RANSAC transform, then dense flow on its result: the two stages of the paper's RANSAC-flow."""
    coarse = ransac(moving, reference)
    if coarse is None:
        return optical_flow(moving, reference)
    fine = optical_flow(resample(moving, coarse), reference)
    if fine is None:
        return coarse
    # The flow reads from the coarsely aligned image, which itself reads from the moving one: compose the two maps.
    return np.stack([ndimage.map_coordinates(axis, fine, order=1, mode="nearest") for axis in coarse])


def no_alignment(moving: np.ndarray, reference: np.ndarray) -> Coordinates | None:
    """Leave the image where it is: the consensus is the pixel mean."""
    return _identity(reference.shape)


ALIGNERS: dict[str, Callable[[np.ndarray, np.ndarray], Coordinates | None]] = {
    "none": no_alignment,
    "phase_correlation": phase_correlation,
    "ransac": ransac,
    "optical_flow": optical_flow,
    "ransac_flow": ransac_flow,
}


def resample(image: np.ndarray, coordinates: Coordinates) -> np.ndarray:
    """Read an (H, W, C) image at coordinates (2, H, W), linearly; outside, the border continues."""
    channels = [
        ndimage.map_coordinates(image[..., c], coordinates, order=1, mode="nearest") for c in range(image.shape[-1])
    ]
    return np.stack(channels, axis=-1)


def align(moving: torch.Tensor, reference: torch.Tensor, aligner: str) -> tuple[torch.Tensor, bool]:
    """Align one image to another.

    Args:
        moving: image (C, H, W).
        reference: image (C, H, W).
        aligner: a key of :data:`ALIGNERS`.

    Returns:
        The aligned image (C, H, W), without gradient, and whether an alignment was found; where none was, the image
        comes back as it is.

    Raises:
        ConfigError: for an unknown aligner.
    """
    if aligner not in ALIGNERS:
        raise unknown("aligner", aligner, ALIGNERS)
    moving = moving.detach()
    if aligner == "none":
        return moving, True
    image, target = (x.permute(1, 2, 0).cpu().double().numpy() for x in (moving, reference.detach()))
    coordinates = ALIGNERS[aligner](image, target)
    if coordinates is None:
        return moving, False
    aligned = torch.from_numpy(resample(image, coordinates)).permute(2, 0, 1)
    return aligned.to(dtype=moving.dtype, device=moving.device), True
