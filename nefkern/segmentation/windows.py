"""Overlapping windows over an image, their logits averaged (protocol B, section 4).

Where windows begin and end cuts the image into rectangles, each covered by one fixed set of
windows. The rectangles are produced one by one, so no sum or count over the whole image is kept:
beyond the result, memory is one rectangle and the coarse grids of the windows in reach.

The result may have another resolution than the image that the windows lie on, as protocol B asks.
From a window's cells to the image's pixels and on to the result's, both steps are linear, and along
each axis one small matrix does both: the map at the image's resolution is never made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from nefkern.segmentation.upsample import interpolation, pixel_positions
from nefkern.segmentation.winners import Plane, winners

Predictor = Callable[[Tensor], "Tensor | tuple[Tensor, tuple[float, float]]"]
"""Crops ``[n, 3, h, w]`` to logits ``[n, K, gh, gw]`` on any grid that spans the crops; or the pair
of these logits and the (height, width) the grid spans, if the predictor padded the crops at the
bottom and on the right (in pixels of the crop, so not always whole if it resized them)."""


class Tile(NamedTuple):
    """A rectangle of the result and its averaged logits ``[K, rows, cols]``."""

    rows: tuple[int, int]
    cols: tuple[int, int]
    logits: Tensor


class _WindowRow(NamedTuple):
    """The predictions of all windows with one top edge."""

    grids: list[Tensor]  # [K, gh, gw] each, left to right
    extent: tuple[float, float]


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """First pixels of the windows along one axis; the last window ends with the image.

    Raises:
        ValueError: a window or stride below 1, or a stride that would leave pixels uncovered.
    """
    if window < 1 or not 1 <= stride <= window:
        raise ValueError(f"expected 1 <= stride <= window, got window {window}, stride {stride}")
    if length <= window:
        return [0]
    return [*range(0, length - window, stride), length - window]


def sliding_tiles(
    predict: Predictor,
    image: Tensor,
    window: int,
    stride: int,
    *,
    size: tuple[int, int] | None = None,
    batch_size: int = 4,
    max_pixels: int = 1 << 16,
) -> Iterator[Tile]:
    """Averaged logits, as disjoint rectangles that cover the result exactly once.

    Args:
        predict: see :data:`Predictor`; called with up to ``batch_size`` crops of one size.
        image: ``[3, H, W]``, handed to ``predict`` in pieces as it is.
        window: side of the square windows; an image smaller than that is one window.
        stride: step between windows, at most ``window``.
        size: height and width of the result, to which the averaged logits are resized bilinearly,
            corners not aligned; None: the image's.
        max_pixels: largest rectangle, which bounds the memory (a single row may exceed it).

    Raises:
        ValueError: see :func:`window_starts`.
    """
    vertical, horizontal = _axes(image, window, stride, size)
    for rows, cols, in_reach in _regions(predict, image, vertical, horizontal, batch_size):
        step = max(1, max_pixels // (cols[1] - cols[0]))
        for begin in range(*rows, step):
            part = (begin, min(begin + step, rows[1]))
            yield Tile(part, cols, _average(in_reach, vertical, horizontal, part, cols))


def sliding_windows(
    predict: Predictor,
    image: Tensor,
    window: int,
    stride: int,
    *,
    size: tuple[int, int] | None = None,
    batch_size: int = 4,
) -> Tensor:
    """Averaged logits ``[K, H, W]`` of the whole image (4·K bytes a pixel in float32).

    Arguments and errors as :func:`sliding_tiles`.
    """
    result: Tensor | None = None
    for tile in sliding_tiles(predict, image, window, stride, size=size, batch_size=batch_size):
        if result is None:
            result = tile.logits.new_empty(tile.logits.shape[0], *(size or image.shape[1:]))
        result[:, slice(*tile.rows), slice(*tile.cols)] = tile.logits
    return result


def sliding_clusters(
    predict: Predictor,
    image: Tensor,
    window: int,
    stride: int,
    *,
    size: tuple[int, int] | None = None,
    batch_size: int = 4,
    dtype: torch.dtype = torch.int64,
) -> Tensor:
    """The argmax over K of :func:`sliding_windows`, ``[H, W]``, in bounded memory.

    At the image's own size its time grows with the pixels, not with K times the pixels (see
    :mod:`nefkern.segmentation.winners`). Ties go to the lower index. Arguments and errors as
    :func:`sliding_tiles`; ``dtype`` is the result's, and must hold K − 1.
    """
    clusters: Tensor | None = None
    if size is not None:
        for tile in sliding_tiles(predict, image, window, stride, size=size, batch_size=batch_size):
            if clusters is None:
                clusters = tile.logits.new_empty(size, dtype=dtype)
            clusters[slice(*tile.rows), slice(*tile.cols)] = tile.logits.argmax(0)
        return clusters
    vertical, horizontal = _axes(image, window, stride)
    for rows, cols, in_reach in _regions(predict, image, vertical, horizontal, batch_size):
        planes = _planes(in_reach, horizontal, cols)
        if clusters is None:
            clusters = planes[0].logits.new_empty(image.shape[1:], dtype=dtype)
        winners(planes, rows, cols, clusters[slice(*rows), slice(*cols)])
    return clusters


def window_crops(
    image: Tensor, window: int, stride: int, *, batch_size: int = 4
) -> Iterator[Tensor]:
    """What :func:`sliding_tiles` hands to its predictor: batches of crops ``[n, 3, h, w]``."""
    lefts = window_starts(image.shape[2], window, stride)
    h, w = min(window, image.shape[1]), min(window, image.shape[2])
    for top in window_starts(image.shape[1], window, stride):
        yield from _batches(image[:, top : top + h], lefts, w, batch_size)


class Replay:
    """A predictor that remembers its answers, for several passes over one image.

    Wrap a predictor, let a first pass call it, and hand :meth:`select` to the passes after it: the
    windows come in the same order, and the network isn't asked again.
    """

    def __init__(self, predict: Predictor) -> None:
        self._predict = predict
        self._answers: list[Tensor | tuple[Tensor, tuple[float, float]]] = []

    def __call__(self, crops: Tensor) -> Tensor | tuple[Tensor, tuple[float, float]]:
        self._answers.append(self._predict(crops))
        return self._answers[-1]

    def select(self, channels: slice | Tensor) -> Predictor:
        """The remembered answers, only these channels: a predictor for one further pass."""
        answers = iter(self._answers)

        def predict(crops: Tensor) -> Tensor | tuple[Tensor, tuple[float, float]]:
            answer = next(answers)
            if isinstance(answer, tuple):
                return answer[0][:, channels], answer[1]
            return answer[:, channels]

        return predict


class _Axis:
    """One axis of the image: its windows, and what their cells weigh in the result's pixels.

    Args:
        length: pixels of the image.
        size: pixels of the result.
        window, stride: of the windows.

    Attributes:
        starts, window: first pixels of the windows, and their side, no longer than the image.
    """

    def __init__(self, length: int, size: int, window: int, stride: int) -> None:
        self.starts = window_starts(length, window, stride)
        self.window = min(window, length)
        # A pixel of the result lies between two of the image's, on one where sizes agree.
        position = pixel_positions(size, length).clamp(0, length - 1)
        self._lower, self._upper = position.long(), position.ceil().long()
        self._fraction = position - self._lower
        self._made: dict[tuple, tuple[slice, Tensor]] = {}
        self._count = torch.zeros(length, dtype=torch.float64)
        for start in self.starts:
            self._count[start : start + self.window] += 1

    def bands(self) -> Iterator[tuple[int, int]]:
        """Ranges of the result's pixels in which the same windows are in reach."""
        edges = {*self.starts, *(start + self.window for start in self.starts)}
        cuts = torch.searchsorted(self._lower, torch.tensor(sorted(edges)))
        return pairwise(cuts.unique().tolist())

    def covering(self, begin: int, end: int) -> list[int]:
        """First pixels of the windows that a range of the result's pixels looks at."""
        first, last = int(self._lower[begin]), int(self._upper[end - 1])
        return [s for s in self.starts if s <= last and first < s + self.window]

    def count(self, begin: int) -> int:
        """How many windows cover the place of a pixel of the result."""
        return int(self._count[self._lower[begin]])

    def weights(
        self, start: int, cells: int, extent: float, begin: int, end: int
    ) -> tuple[slice, Tensor]:
        """What a window's cells weigh in a range of the result's pixels, times :meth:`count`.

        Args:
            start: of the window.
            cells, extent: of its grid, and the pixels of the image that they span.

        Returns:
            The cells that weigh anything, and their weights, float64 ``[end − begin, n]``. On the
            CPU: tiny, and reading its ends would make a GPU wait.
        """
        key = (start, cells, extent, begin, end)
        if key not in self._made:
            self._made[key] = self._weights(*key)
        return self._made[key]

    def _weights(
        self, start: int, cells: int, extent: float, begin: int, end: int
    ) -> tuple[slice, Tensor]:
        fraction, total = self._fraction[begin:end], torch.zeros(end - begin, cells).double()
        for pixel, share in ((self._lower, 1 - fraction), (self._upper, fraction)):
            pixel = pixel[begin:end]
            inside = (pixel >= start) & (pixel < start + self.window)
            share = share * inside * (self.count(begin) / self._count[pixel])
            total += share[:, None] * interpolation(pixel - start, cells, extent)
        touched = total.any(0).nonzero().flatten()
        first, last = (int(touched[0]), int(touched[-1])) if len(touched) else (0, -1)
        return slice(first, last + 1), total[:, first : last + 1]


def _batches(strip: Tensor, lefts: list[int], w: int, batch_size: int) -> Iterator[Tensor]:
    for i in range(0, len(lefts), batch_size):
        yield torch.stack([strip[:, :, left : left + w] for left in lefts[i : i + batch_size]])


def _predict_row(predict: Predictor, strip: Tensor, axis: _Axis, batch_size: int) -> _WindowRow:
    grids: list[Tensor] = []
    extent: tuple[float, float] = (strip.shape[1], axis.window)
    for crops in _batches(strip, axis.starts, axis.window, batch_size):
        prediction = predict(crops)
        if isinstance(prediction, tuple):
            prediction, extent = prediction
        grids.extend(prediction)
    return _WindowRow(grids, extent)


def _axes(
    image: Tensor, window: int, stride: int, size: tuple[int, int] | None = None
) -> tuple[_Axis, _Axis]:
    """The vertical and the horizontal axis."""
    lengths = image.shape[1:]
    first, second = (
        _Axis(length, target, window, stride)
        for length, target in zip(lengths, size or lengths, strict=True)
    )
    return first, second


def _regions(
    predict: Predictor, image: Tensor, vertical: _Axis, horizontal: _Axis, batch_size: int
) -> Iterator[tuple[tuple[int, int], tuple[int, int], dict[int, _WindowRow]]]:
    """Rows and columns of each rectangle that one set of windows covers, and their rows."""
    in_reach: dict[int, _WindowRow] = {}
    for rows in vertical.bands():
        covering = vertical.covering(*rows)
        in_reach = {top: in_reach[top] for top in covering if top in in_reach}
        for top in covering:
            if top not in in_reach:
                strip = image[:, top : top + vertical.window]
                in_reach[top] = _predict_row(predict, strip, horizontal, batch_size)
        for cols in horizontal.bands():
            yield rows, cols, in_reach


def _planes(
    window_rows: dict[int, _WindowRow], horizontal: _Axis, cols: tuple[int, int]
) -> list[Plane]:
    """The windows over a rectangle at the image's own size."""
    return [
        Plane(grids[horizontal.starts.index(left)], extent, top, left)
        for top, (grids, extent) in window_rows.items()
        for left in horizontal.covering(*cols)
    ]


def _average(
    window_rows: dict[int, _WindowRow],
    vertical: _Axis,
    horizontal: _Axis,
    rows: tuple[int, int],
    cols: tuple[int, int],
) -> Tensor:
    total = None
    for top, (grids, extent) in window_rows.items():
        _, h, w = grids[0].shape
        row_cells, row_weights = vertical.weights(top, h, extent[0], *rows)
        for left in horizontal.covering(*cols):
            col_cells, col_weights = horizontal.weights(left, w, extent[1], *cols)
            cells = grids[horizontal.starts.index(left)][:, row_cells, col_cells]
            part = row_weights.to(cells) @ (cells @ col_weights.to(cells).T)
            total = part if total is None else total.add_(part)
    return total.div_(vertical.count(rows[0]) * horizontal.count(cols[0]))
