"""Class maps as annotation tools keep them: clean, in connected instances, as outlines and runs.

Two pixels belong together if they share a side: what only touches at a corner is apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from nefkern.data.constants import VOID
from nefkern.runtime.errors import UserError

#: How far, in pixels, a polygon may pass from the outline that it stands for.
TOLERANCE = 0.5


@dataclass(frozen=True)
class Instance:
    """A connected region of one class.

    Attributes:
        label: the class's index.
        top, left: the first row and column of its box.
        mask: bool ``[h, w]``, of the box.
        area: in pixels.
    """

    label: int
    top: int
    left: int
    mask: np.ndarray
    area: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, width and height in pixels."""
        return (self.left, self.top, self.mask.shape[1], self.mask.shape[0])


def require_tools() -> tuple[ModuleType, ModuleType]:
    """The modules ``skimage`` and ``pycocotools.mask``.

    Raises:
        UserError: one isn't installed; says how to.
    """
    try:
        import skimage.measure
        import skimage.segmentation
        from pycocotools import mask
    except ImportError as error:
        raise UserError(
            f"--formats and --min-area need scikit-image and pycocotools ({error}): pip install "
            "scikit-image pycocotools"
        ) from None
    return skimage, mask


def without_specks(classes: np.ndarray, min_area: int) -> np.ndarray:
    """A class map whose regions all have ``min_area`` pixels at least: smaller ones, and holes no
    larger than that, go to the regions around them.

    Args:
        classes: uint8 ``[H, W]``; void is a class like the others here.
        min_area: in pixels.

    Returns:
        As ``classes``; a map without any region that large stays as it is.
    """
    skimage, _ = require_tools()
    regions = skimage.measure.label(classes, background=-1, connectivity=1)
    small = np.bincount(regions.ravel()) < min_area
    if small[1:].all() or not small[1:].any():
        return classes
    kept = np.where(small[regions], 0, regions)
    # On a level ground a watershed is a flood: it joins what it takes to where it comes from.
    level = np.zeros(classes.shape, np.uint8)
    flooded = skimage.segmentation.watershed(level, kept, connectivity=1)
    class_of = np.zeros(len(small), classes.dtype)
    class_of[regions.ravel()] = classes.ravel()
    return class_of[flooded]


def instances(classes: np.ndarray) -> list[Instance]:
    """The connected regions of every class, from the top; void has none.

    Args:
        classes: uint8 ``[H, W]``, 255 void.
    """
    skimage, _ = require_tools()
    shifted = np.where(classes == VOID, 0, classes.astype(np.int16) + 1)  # 0 is no region there
    regions = skimage.measure.label(shifted, connectivity=1)
    found = []
    for region in skimage.measure.regionprops(regions):
        top, left = region.bbox[:2]
        row, col = region.coords[0]
        label = int(classes[row, col])
        found.append(Instance(label, int(top), int(left), region.image, int(region.area)))
    return found


def polygon(instance: Instance, tolerance: float = TOLERANCE) -> list[tuple[float, float]]:
    """The outline as one polygon of (x, y), in pixels from the image's upper left corner.

    A hole is reached by a slit of no width, since formats know no holes: even-odd or not, what
    fills the polygon leaves the hole out.

    Args:
        tolerance: how far it may pass from the pixels' outline, which is full of steps.
    """
    skimage, _ = require_tools()
    mask = np.pad(instance.mask, 1).astype(np.float32)
    rings = skimage.measure.find_contours(mask, 0.5, fully_connected="low")
    rings = [_simplified(ring[:-1], tolerance) for ring in rings]
    rings.sort(key=lambda ring: -np.ptp(ring, axis=0).prod())
    joined = _joined(rings[0], rings[1:])
    # A pixel's centre is half a pixel from its corner; the padding is one.
    offset = (instance.top - 0.5, instance.left - 0.5)
    return [(float(x), float(y)) for y, x in (joined + offset).tolist()]


def _simplified(ring: np.ndarray, tolerance: float) -> np.ndarray:
    from skimage.measure import approximate_polygon

    closed = approximate_polygon(np.concatenate([ring, ring[:1]]), tolerance)
    return closed[:-1] if len(closed) > 3 else ring


def _joined(ring: np.ndarray, holes: list[np.ndarray]) -> np.ndarray:
    """The ring with all holes, the nearest to what is joined first: no slit then meets another
    hole."""
    if not holes:
        return ring
    vertices = np.concatenate(holes)
    hole_of = np.repeat(np.arange(len(holes)), [len(hole) for hole in holes])
    distance, end = _nearest(vertices, ring)
    for _ in holes:
        start = int(distance.argmin())
        of = hole_of == hole_of[start]
        hole = np.roll(vertices[of], -int(of[:start].sum()), axis=0)
        cut = int(np.flatnonzero((ring == end[start]).all(1))[0])
        ring = np.concatenate([ring[: cut + 1], hole, hole[:1], ring[cut:]])
        distance[of] = np.inf  # done
        left = np.flatnonzero(distance < np.inf)
        new, place = _nearest(vertices[left], hole)
        closer = new < distance[left]
        distance[left[closer]], end[left[closer]] = new[closer], place[closer]
    return ring


def _nearest(vertices: np.ndarray, ring: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far each vertex is from the ring's nearest one, and where that is."""
    from scipy.spatial import cKDTree

    distance, at = cKDTree(ring).query(vertices)
    return distance, ring[at]


def coco_rle(instance: Instance, size: tuple[int, int]) -> dict[str, Any]:
    """Exactly its pixels, as COCO's compressed run-length encoding of an image of ``size``."""
    _, coco = require_tools()
    whole = np.zeros(size, np.uint8, order="F")
    h, w = instance.mask.shape
    whole[instance.top : instance.top + h, instance.left : instance.left + w] = instance.mask
    encoded = coco.encode(whole)
    return {"size": list(size), "counts": encoded["counts"].decode("ascii")}


def box_runs(instance: Instance) -> list[int]:
    """Lengths of the runs in its box, row by row, outside and inside in turn, outside first."""
    flat = instance.mask.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    return [0, *runs] if flat[0] else runs
