"""What the atlas shows of each cluster: its patches, its size, its place among the others."""

from __future__ import annotations

import heapq
import itertools
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import resize

from nefkern.data.dataset import ImageDataset
from nefkern.runtime.errors import UserError
from nefkern.segmentation.segmenter import Segmenter
from nefkern.segmentation.windows import window_starts

log = logging.getLogger(__name__)

#: Patches of either kind, and images, that are shown of a cluster.
PATCHES, IMAGES = 12, 6

#: Sides in pixels: of a patch's picture, which spans ``CONTEXT`` patches, and of an image's.
TILE, CONTEXT, THUMBNAIL = 64, 5, 192

#: Cells along the longer side of the map that shows where clusters lie in an image.
MAP = 64

_OUTLINE = (255, 255, 0)


@dataclass(frozen=True)
class Patch:
    """A patch of an image.

    Attributes:
        image: index in the data set.
        box: top, left, bottom, right in the image's pixels.
        rival: the cluster that is second there.
    """

    image: int
    box: tuple[float, float, float, float]
    rival: int


@dataclass
class Cluster:
    """What is known of a cluster.

    Attributes:
        patches: how many it wins; where windows of a long image overlap, in each of them.
        images: in how many images.
        margin: by how much its logit leads where it wins, over the mean of all patches; 0 where
            it never does.
        typical: the patches where it leads most, the best first.
        doubtful: those that are nearest to belonging to another cluster, the nearest first.
        where: images in which it has most patches, and its share of them.
    """

    patches: int = 0
    images: int = 0
    margin: float = 0.0
    typical: list[Patch] = field(default_factory=list)
    doubtful: list[Patch] = field(default_factory=list)
    where: list[tuple[int, float]] = field(default_factory=list)


@dataclass
class Survey:
    """All clusters over a data set.

    Attributes:
        clusters: K of them.
        similarity: float32 ``[K, K]``: cosines of the clusters' mean unit features; 0 with one
            that never wins.
        maps: of each image that ``where`` names, the winning clusters, int32 ``[gh, gw]``.
        images: how many were seen.
    """

    clusters: list[Cluster]
    similarity: np.ndarray
    maps: dict[int, np.ndarray]
    images: int


class _Best:
    """The ``count`` items of highest score; of equal ones, those that came first."""

    def __init__(self, count: int) -> None:
        self._count, self._number = count, itertools.count()
        self._heap: list[tuple] = []

    def offer(self, score: float, item: object) -> None:
        heapq.heappush(self._heap, (score, -next(self._number), item))
        if len(self._heap) > self._count:
            heapq.heappop(self._heap)

    def items(self) -> list:
        """Best first."""
        return [item for *_, item in sorted(self._heap, reverse=True, key=lambda e: e[:2])]


@dataclass(frozen=True)
class _Cells:
    """Patches of one window of an image: arrays ``[h, w]`` and features ``[C, h, w]``."""

    top: int
    left: int
    size: tuple[int, int]
    side: tuple[float, float]  # of a patch in the image's pixels
    winner: np.ndarray
    rival: np.ndarray
    margin: np.ndarray  # of logits: probabilities are 1 to rounding where K-means is sure
    features: Tensor


def survey(
    segmenter: Segmenter, dataset: ImageDataset, indices: Iterable[int], count: int
) -> Survey:
    """Pass once over the images; those that cannot be used are reported and left out.

    Args:
        segmenter: of the run.
        dataset: the images.
        indices: which of them.
        count: how many those are.

    Raises:
        UserError: none could be used.
    """
    per_image = -(-2 * PATCHES // max(1, count))  # one, unless there are few images
    seen = _Seen(segmenter.num_clusters, per_image)
    for index in indices:
        try:
            pixels = dataset.image(index)
            segmenter.check_size(pixels, dataset.paths[index])
        except UserError as error:
            log.warning("left out: %s", error)
            continue
        seen.add(index, pixels, _cells(segmenter, pixels))
    if not seen.count:
        raise UserError("none of the images could be read, see above")
    return seen.result()


def _cells(segmenter: Segmenter, pixels: Tensor) -> Iterator[_Cells]:
    """The image's patches as :meth:`Segmenter.__call__` sees them, window by window."""
    scale = segmenter.training_scale(pixels)
    *_, window, stride = segmenter.at_training_scale(pixels)
    for top in window_starts(pixels.shape[1], window, stride):
        for left in window_starts(pixels.shape[2], window, stride):
            crop = pixels[:, top : top + window, left : left + window]
            h, w = (max(segmenter.patch, round(s * scale)) for s in crop.shape[1:])
            maps = segmenter.maps(resize(crop, [h, w], antialias=True)[None])
            logits = segmenter.cluster_logits(maps)[0].float()
            best, order = logits.topk(min(2, len(logits)), dim=0)
            rows, cols = logits.shape[1:]
            side = (
                maps.padded[0] / rows * crop.shape[1] / h,
                maps.padded[1] / cols * crop.shape[2] / w,
            )
            yield _Cells(
                *(top, left, (crop.shape[1], crop.shape[2]), side),
                winner=logits.argmax(0).cpu().numpy(),
                rival=order[-1].cpu().numpy(),
                margin=(best[0] - best[-1]).cpu().numpy(),
                features=F.normalize(maps.graph[0].float(), dim=0).cpu(),
            )


class _Seen:
    """What is kept while images pass by."""

    def __init__(self, num_clusters: int, per_image: int) -> None:
        self.count, self.per_image = 0, per_image
        self.patches = np.zeros(num_clusters, np.int64)
        self.images = np.zeros(num_clusters, np.int64)
        self.margins = np.zeros(num_clusters)
        self.sums: Tensor | None = None
        self.typical = [_Best(PATCHES) for _ in range(num_clusters)]
        self.doubtful = [_Best(PATCHES) for _ in range(num_clusters)]
        self.where = [_Best(IMAGES) for _ in range(num_clusters)]
        self.maps: dict[int, np.ndarray] = {}

    def add(self, index: int, pixels: Tensor, windows: Iterable[_Cells]) -> None:
        """Take an image's patches."""
        num_clusters, shape = len(self.patches), (pixels.shape[1], pixels.shape[2])
        here, chart = np.zeros(num_clusters, np.int64), _chart(shape)
        for cells in windows:
            here += self._add_window(index, cells)
            _draw(chart, shape, cells)
        for cluster in np.flatnonzero(here).tolist():
            share = float(here[cluster] / here.sum())
            self.where[cluster].offer(share, (index, share))
        self.patches += here
        self.images += here > 0
        self.maps[index] = chart
        self.count += 1

    def _add_window(self, index: int, cells: _Cells) -> np.ndarray:
        """How many patches each cluster wins."""
        num_clusters = len(self.patches)
        row, col = (grid.ravel() for grid in np.indices(cells.winner.shape))
        # Of padding, only what has its centre in the image.
        inside = ((row + 0.5) * cells.side[0] < cells.size[0]) & (
            (col + 0.5) * cells.side[1] < cells.size[1]
        )
        row, col = row[inside], col[inside]
        winner, margin = cells.winner[row, col], cells.margin[row, col]
        features = cells.features[:, row, col].T.double()
        if self.sums is None:
            self.sums = features.new_zeros(num_clusters, features.shape[1])
        self.sums.index_add_(0, torch.from_numpy(winner), features)
        self.margins += np.bincount(winner, margin, num_clusters)
        for best, score in ((self.typical, margin), (self.doubtful, -margin)):
            for at in _leading(winner, score, self.per_image):
                box = _box(cells, int(row[at]), int(col[at]))
                patch = Patch(index, box, int(cells.rival[row[at], col[at]]))
                best[winner[at]].offer(float(score[at]), patch)
        return np.bincount(winner, minlength=num_clusters)

    def result(self) -> Survey:
        """All of it, summed up."""
        average = max(self.margins.sum() / self.patches.sum(), 1e-12)
        clusters = [
            Cluster(
                patches=int(count),
                images=int(self.images[k]),
                margin=float(self.margins[k] / max(1, count) / average),
                typical=self.typical[k].items(),
                doubtful=self.doubtful[k].items(),
                where=self.where[k].items(),
            )
            for k, count in enumerate(self.patches.tolist())
        ]
        centres = F.normalize(self.sums, dim=1)
        shown = {index for cluster in clusters for index, _ in cluster.where}
        maps = {index: chart for index, chart in self.maps.items() if index in shown}
        return Survey(clusters, (centres @ centres.T).float().numpy(), maps, self.count)


def _leading(winner: np.ndarray, score: np.ndarray, count: int) -> np.ndarray:
    """Where the ``count`` highest scores of every winner are."""
    order = np.lexsort((-score, winner))
    ordered = winner[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
    return order[rank < count]


def _box(cells: _Cells, row: int, col: int) -> tuple[float, float, float, float]:
    top, left = cells.top + row * cells.side[0], cells.left + col * cells.side[1]
    return (top, left, top + cells.side[0], left + cells.side[1])


def _chart(shape: tuple[int, int]) -> np.ndarray:
    """An empty map of an image of this height and width."""
    scale = min(1.0, MAP / max(shape))
    return np.zeros([max(1, round(side * scale)) for side in shape], np.int32)


def _draw(chart: np.ndarray, shape: tuple[int, int], cells: _Cells) -> None:
    """Write a window's winners to where it lies in the image's map."""
    begins = (cells.top, cells.left)
    places, sources = [], []
    for axis in (0, 1):
        centres = (np.arange(chart.shape[axis]) + 0.5) * shape[axis] / chart.shape[axis]
        offset = centres - begins[axis]
        inside = (offset >= 0) & (offset < cells.size[axis])
        places.append(np.flatnonzero(inside))
        cell = (offset[inside] / cells.side[axis]).astype(int)
        sources.append(cell.clip(max=cells.winner.shape[axis] - 1))
    chart[np.ix_(*places)] = cells.winner[np.ix_(*sources)]


# ---- pictures ----


def pictures(
    found: Survey, dataset: ImageDataset
) -> tuple[dict[int, Image.Image], dict[int, Image.Image]]:
    """A sheet of patches of each cluster, typical ones above doubtful ones, and a thumbnail of
    each image that is shown."""
    wanted: defaultdict[int, list[tuple[int, int, int, Patch]]] = defaultdict(list)
    for number, cluster in enumerate(found.clusters):
        for row, patches in enumerate((cluster.typical, cluster.doubtful)):
            for col, patch in enumerate(patches):
                wanted[patch.image].append((number, row, col, patch))
    sheets = {
        number: Image.new("RGB", (PATCHES * TILE, 2 * TILE), "white")
        for number, cluster in enumerate(found.clusters)
        if cluster.patches
    }
    thumbnails: dict[int, Image.Image] = {}
    for index in sorted({*wanted, *found.maps}):
        picture = Image.fromarray(dataset.image(index).permute(1, 2, 0).numpy())
        for number, row, col, patch in wanted[index]:
            sheets[number].paste(_tile(picture, patch.box), (col * TILE, row * TILE))
        if index in found.maps:
            picture.thumbnail((THUMBNAIL, THUMBNAIL))
            thumbnails[index] = picture
    return sheets, thumbnails


def _tile(picture: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    """A patch with what is around it; its outline is drawn."""
    from PIL import ImageDraw

    top, left, bottom, right = box
    side = min(CONTEXT * max(bottom - top, right - left), *picture.size)
    x = min(max(0, (left + right - side) / 2), picture.width - side)
    y = min(max(0, (top + bottom - side) / 2), picture.height - side)
    tile = picture.resize((TILE, TILE), box=(x, y, x + side, y + side))
    scale = TILE / side
    corners = [(left - x) * scale, (top - y) * scale, (right - x) * scale, (bottom - y) * scale]
    ImageDraw.Draw(tile).rectangle([min(max(c, 0), TILE - 1) for c in corners], outline=_OUTLINE)
    return tile
