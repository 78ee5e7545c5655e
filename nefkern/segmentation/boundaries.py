"""Boundary F-score: how near predicted boundaries lie to annotated ones.

BF of Csurka, Larlus and Perronnin, *What is a good evaluation measure for semantic segmentation?*,
BMVC 2013: a boundary point is right if the other segmentation has a boundary of the same class
within 0.75% of the image's diagonal. Of each class of an image, precision (of predicted points) and
recall (of annotated ones) give F = 2PR / (P + R); an image has the mean over the classes that are
annotated or predicted in it, a data set the mean over its images.

They do not speak of void pixels. Here those take the class of the nearest annotated pixel, so that
a boundary under a thin void band, as Pascal VOC draws them, runs along its middle; deeper in void
than the tolerance no point counts.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.ndimage import distance_transform_edt
from scipy.spatial import cKDTree

from nefkern.segmentation.metrics import VOID

TOLERANCE = 0.0075
"""Of the diagonal: the authors'."""


def boundary_f(predicted: np.ndarray, annotated: np.ndarray, tolerance: float = TOLERANCE) -> float:
    """The boundary F-score of one image.

    Args:
        predicted: integers ``[H, W]``, 0 to 254; 255 or less than 0: no class.
        annotated: integers ``[H, W]``, 0 to 254, or 255: void.
        tolerance: how far apart boundaries may lie, as a share of the diagonal.

    Returns:
        0 to 1; NaN where nothing is annotated. A class without any boundary, in both, counts as 1
        if it is in both.

    Raises:
        ValueError: shapes that differ, or not ``[H, W]``.
    """
    if predicted.ndim != 2 or predicted.shape != annotated.shape:
        raise ValueError(
            "predicted and annotated must be [H, W] of one shape, got "
            f"{list(predicted.shape)} and {list(annotated.shape)}"
        )
    if (annotated == VOID).all():
        return math.nan
    reach = tolerance * math.hypot(*annotated.shape)
    annotated, near = _filled(annotated, reach)
    predicted = np.where((predicted < 0) | (predicted > VOID), VOID, predicted).astype(np.int64)
    mine, theirs = boundary(predicted), boundary(annotated)
    precision = _within(predicted, mine & near, annotated, theirs & near, reach)
    recall = _within(annotated, theirs & near, predicted, mine, reach)
    return float(
        _f_of_classes(_present(predicted, near), _present(annotated, near), precision, recall)
    )


def boundary(labels: np.ndarray) -> np.ndarray:
    """Pixels ``[H, W]`` with a neighbour, above, below, left or right, of another label; the
    image's frame is no boundary."""
    found = np.zeros(labels.shape, bool)
    for axis in (0, 1):
        changes = np.diff(labels, axis=axis) != 0
        first, second = [slice(None)] * 2, [slice(None)] * 2
        first[axis], second[axis] = slice(None, -1), slice(1, None)
        found[tuple(first)] |= changes
        found[tuple(second)] |= changes
    return found


def _filled(annotated: np.ndarray, reach: float) -> tuple[np.ndarray, np.ndarray]:
    """The annotation without void, and which pixels are near enough to what was annotated."""
    void = annotated == VOID
    if not void.any():
        return annotated.astype(np.int64), np.ones(void.shape, bool)
    distance, index = distance_transform_edt(void, return_indices=True)
    return annotated[tuple(index)].astype(np.int64), distance <= reach


def _within(
    labels: np.ndarray,
    points: np.ndarray,
    other_labels: np.ndarray,
    other_points: np.ndarray,
    reach: float,
) -> np.ndarray:
    """Of each class's points, the share that has one of the other's within reach, ``[256]``; NaN
    of a class without points."""
    # Classes lie in planes farther apart than anything can reach: one search serves them all.
    apart = 2 * reach + 1
    mine, theirs = (
        np.column_stack([*np.nonzero(at), apart * of[at]])
        for of, at in ((labels, points), (other_labels, other_points))
    )
    near = np.zeros(len(mine), bool)
    if len(mine) and len(theirs):
        # The bound excludes itself; squared distances of pixels are whole numbers.
        bound = math.sqrt(math.floor(reach**2 + 1e-9) + 0.5)
        near = np.isfinite(cKDTree(theirs).query(mine, distance_upper_bound=bound)[0])
    classes = labels[points]
    with np.errstate(invalid="ignore"):
        return np.bincount(classes, near, VOID + 1) / np.bincount(classes, minlength=VOID + 1)


def _present(labels: np.ndarray, near: np.ndarray) -> np.ndarray:
    return np.bincount(labels[near], minlength=VOID + 1) > 0


def _f_of_classes(
    predicted: np.ndarray, annotated: np.ndarray, precision: np.ndarray, recall: np.ndarray
) -> float:
    """The mean over the classes of an image; all ``[256]``."""
    both = np.nan_to_num(precision) + np.nan_to_num(recall)
    f = np.nan_to_num(2 * precision * recall / np.maximum(both, 1e-12))
    whole = np.isnan(precision) & np.isnan(recall) & predicted & annotated
    f[whole] = 1.0
    of = (predicted | annotated)[:VOID]
    return f[:VOID][of].mean()
