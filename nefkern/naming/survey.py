"""What the atlas shows of each cluster: its patches and segments, its size, its place among the
others."""

from __future__ import annotations

import heapq
import itertools
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
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

#: Patches and segments of either kind, and images, that are shown of a cluster.
PATCHES, SEGMENTS, IMAGES = 12, 6, 6

#: Patches that make a segment: of fewer, the patches themselves are shown.
LEAST = 4

#: Sides in pixels: of a patch's picture, which spans ``CONTEXT`` patches, and of an image's.
TILE, CONTEXT, THUMBNAIL = 64, 5, 192

#: Cells along the longer side of the map that shows where clusters lie in an image.
MAP = 64

_OUTLINE = (255, 255, 0)
#: What is left of the brightness around a segment.
_AROUND = 0.3


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


@dataclass(frozen=True, eq=False)
class Segment:
    """A connected region of one cluster's patches, side by side, in one window of an image.

    Attributes:
        image: index in the data set.
        box: top, left, bottom, right in the image's pixels.
        mask: bool ``[h, w]``: which patches of the box it has.
        rival: the cluster that is second in most of them.
    """

    image: int
    box: tuple[float, float, float, float]
    mask: np.ndarray
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
        typical_segments: those of :data:`LEAST` patches or more whose logits lead by most in sum,
            large and clear, the best first.
        doubtful_segments: those that lead by least on average, the nearest first.
    """

    patches: int = 0
    images: int = 0
    margin: float = 0.0
    typical: list[Patch] = field(default_factory=list)
    doubtful: list[Patch] = field(default_factory=list)
    where: list[tuple[int, float]] = field(default_factory=list)
    typical_segments: list[Segment] = field(default_factory=list)
    doubtful_segments: list[Segment] = field(default_factory=list)


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
        self.typical_segments = [_Best(SEGMENTS) for _ in range(num_clusters)]
        self.doubtful_segments = [_Best(SEGMENTS) for _ in range(num_clusters)]
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
        if len(self.maps) > 2 * IMAGES * num_clusters:  # a hundred thousand would fill the memory
            self.maps = self._shown_maps()
        self.count += 1

    def _shown_maps(self) -> dict[int, np.ndarray]:
        """Maps of the images in which a cluster has most patches, so far."""
        shown = {index for best in self.where for index, _ in best.items()}
        return {index: chart for index, chart in self.maps.items() if index in shown}

    def _add_window(self, index: int, cells: _Cells) -> np.ndarray:
        """How many patches each cluster wins."""
        num_clusters = len(self.patches)
        row, col = (grid.ravel() for grid in np.indices(cells.winner.shape))
        # Of padding, only what has its centre in the image.
        inside = ((row + 0.5) * cells.side[0] < cells.size[0]) & (
            (col + 0.5) * cells.side[1] < cells.size[1]
        )
        self._add_segments(index, cells, inside.reshape(cells.winner.shape))
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

    def _add_segments(self, index: int, cells: _Cells, inside: np.ndarray) -> None:
        """Offer the window's segments to their clusters."""
        label, count = connected(cells.winner, inside)
        sizes = np.bincount(label[inside], minlength=count)
        total = np.bincount(label[inside], cells.margin[inside], count)
        winner = np.zeros(count, np.int64)
        winner[label[inside]] = cells.winner[inside]
        large = np.flatnonzero(sizes >= LEAST)
        for best, score in (
            (self.typical_segments, total),
            (self.doubtful_segments, -total / np.maximum(sizes, 1)),
        ):
            for at in large[_leading(winner[large], score[large], self.per_image)]:
                segment = _segment(index, cells, label == at)
                best[winner[at]].offer(float(score[at]), segment)

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
                typical_segments=self.typical_segments[k].items(),
                doubtful_segments=self.doubtful_segments[k].items(),
                where=self.where[k].items(),
            )
            for k, count in enumerate(self.patches.tolist())
        ]
        centres = F.normalize(self.sums, dim=1)
        similarity = (centres @ centres.T).float().numpy()
        return Survey(clusters, similarity, self._shown_maps(), self.count)


def _leading(winner: np.ndarray, score: np.ndarray, count: int) -> np.ndarray:
    """Where the ``count`` highest scores of every winner are."""
    order = np.lexsort((-score, winner))
    ordered = winner[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
    return order[rank < count]


def connected(winner: np.ndarray, inside: np.ndarray) -> tuple[np.ndarray, int]:
    """The segments of a map: regions of one cluster whose patches share sides.

    Args:
        winner: ``[h, w]``, the cluster of each patch.
        inside: bool ``[h, w]``: the others are of no segment.

    Returns:
        The number of each patch's segment ``[h, w]``, -1 outside, and how many there are.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    number = np.arange(winner.size).reshape(winner.shape)
    pairs = []
    for first, second in (np.s_[:-1], np.s_[1:]), (np.s_[:, :-1], np.s_[:, 1:]):
        same = (winner[first] == winner[second]) & inside[first] & inside[second]
        pairs.append([number[first][same], number[second][same]])
    ends = np.concatenate(pairs, axis=1)
    graph = coo_array((np.ones(ends.shape[1], bool), tuple(ends)), shape=(winner.size,) * 2)
    label = connected_components(graph, directed=False)[1].reshape(winner.shape)
    found, numbered = np.unique(label[inside], return_inverse=True)
    result = np.full(winner.shape, -1)
    result[inside] = numbered
    return result, len(found)


def _segment(index: int, cells: _Cells, mask: np.ndarray) -> Segment:
    """Of a window's patches, those of the mask."""
    rows, cols = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    top, left, *_ = _box(cells, rows[0], cols[0])
    *_, bottom, right = _box(cells, rows[-1], cols[-1])
    part = mask[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
    rival = int(np.bincount(cells.rival[mask]).argmax())
    return Segment(index, (top, left, bottom, right), part.copy(), rival)


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
    """A sheet of each cluster, and a thumbnail of each image that is shown.

    A sheet has a row of typical patches, one of doubtful ones, and one of segments: typical ones in
    its left half, doubtful ones in its right half.
    """
    wanted: defaultdict[int, list[tuple[int, int, int, Patch | Segment]]] = defaultdict(list)
    for number, cluster in enumerate(found.clusters):
        rows: list[tuple[int, int, Sequence[Patch | Segment]]] = [
            (0, 0, cluster.typical),
            (1, 0, cluster.doubtful),
            (2, 0, cluster.typical_segments),
            (2, SEGMENTS, cluster.doubtful_segments),
        ]
        for row, first, shown in rows:
            for col, part in enumerate(shown, first):
                wanted[part.image].append((number, row, col, part))
    sheets = {
        number: Image.new("RGB", (PATCHES * TILE, 3 * TILE), "white")
        for number, cluster in enumerate(found.clusters)
        if cluster.patches
    }
    thumbnails: dict[int, Image.Image] = {}
    for index in sorted({*wanted, *found.maps}):
        picture = Image.fromarray(dataset.image(index).permute(1, 2, 0).numpy())
        for number, row, col, part in wanted[index]:
            tile = _tile(picture, part) if isinstance(part, Patch) else _segment_tile(picture, part)
            sheets[number].paste(tile, (col * TILE, row * TILE))
        if index in found.maps:
            picture.thumbnail((THUMBNAIL, THUMBNAIL))
            thumbnails[index] = picture
    return sheets, thumbnails


def _view(
    picture: Image.Image, box: tuple[float, float, float, float], context: float
) -> tuple[Image.Image, list[float]]:
    """A square about a box, ``context`` times as large where the picture is, as a tile; and where
    in it the box lies: left, top, right, bottom."""
    top, left, bottom, right = box
    side = min(context * max(bottom - top, right - left), *picture.size)
    x = min(max(0, (left + right - side) / 2), picture.width - side)
    y = min(max(0, (top + bottom - side) / 2), picture.height - side)
    tile = picture.resize((TILE, TILE), box=(x, y, x + side, y + side))
    scale = TILE / side
    corners = [(left - x) * scale, (top - y) * scale, (right - x) * scale, (bottom - y) * scale]
    return tile, corners


def _tile(picture: Image.Image, patch: Patch) -> Image.Image:
    """A patch with what is around it; its outline is drawn."""
    from PIL import ImageDraw

    tile, corners = _view(picture, patch.box, CONTEXT)
    ImageDraw.Draw(tile).rectangle([min(max(c, 0), TILE - 1) for c in corners], outline=_OUTLINE)
    return tile


def _segment_tile(picture: Image.Image, segment: Segment) -> Image.Image:
    """A segment; all around it is darkened. Of one that is longer than the picture is wide, the
    middle."""
    tile, (left, top, right, bottom) = _view(picture, segment.box, 1.2)
    middles = np.arange(TILE) + 0.5
    (rows, inside), (cols, across) = (
        _cells_at(middles, low, high, count)
        for low, high, count in zip((top, left), (bottom, right), segment.mask.shape, strict=True)
    )
    mask = segment.mask[np.ix_(rows, cols)] & inside[:, None] & across
    pixels = np.array(tile)
    pixels[~mask] = pixels[~mask] * _AROUND
    return Image.fromarray(pixels)


def _cells_at(
    middles: np.ndarray, low: float, high: float, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which of ``count`` cells from ``low`` to ``high`` each place is in, and if it is in any."""
    at = np.floor((middles - low) * (count / (high - low))).astype(int)
    return at.clip(0, count - 1), (at >= 0) & (at < count)
