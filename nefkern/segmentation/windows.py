"""Overlapping windows over an image, their logits averaged (protocol B, section 4).

Where windows begin and end cuts the image into rectangles, each covered by one fixed set of
windows. The rectangles are produced one by one, so no sum or count over the whole image is kept:
beyond the result, memory is one rectangle and the coarse grids of the windows in reach.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from nefkern.segmentation.winners import Plane, average, winners

Predictor = Callable[[Tensor], "Tensor | tuple[Tensor, tuple[float, float]]"]
"""Crops ``[n, 3, h, w]`` to logits ``[n, K, gh, gw]`` on any grid that spans the crops; or the pair
of these logits and the (height, width) the grid spans, if the predictor padded the crops at the
bottom and on the right (in pixels of the crop, so not always whole if it resized them)."""


class Tile(NamedTuple):
    """A rectangle of the image and its averaged logits ``[K, rows, cols]``."""

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
    batch_size: int = 4,
    max_pixels: int = 1 << 16,
) -> Iterator[Tile]:
    """Averaged logits, as disjoint rectangles that cover the image exactly once.

    Args:
        predict: see :data:`Predictor`; called with up to ``batch_size`` crops of one size.
        image: ``[3, H, W]``, handed to ``predict`` in pieces as it is.
        window: side of the square windows; an image smaller than that is one window.
        stride: step between windows, at most ``window``.
        max_pixels: largest rectangle, which bounds the memory (a single row may exceed it).

    Raises:
        ValueError: see :func:`window_starts`.
    """
    for rows, cols, planes in _regions(predict, image, window, stride, batch_size):
        across = torch.arange(*cols)
        step = max(1, max_pixels // len(across))
        for begin in range(*rows, step):
            end = min(begin + step, rows[1])
            yield Tile((begin, end), cols, average(planes, torch.arange(begin, end), across))


def sliding_windows(
    predict: Predictor, image: Tensor, window: int, stride: int, *, batch_size: int = 4
) -> Tensor:
    """Averaged logits ``[K, H, W]`` of the whole image (4·K bytes a pixel in float32).

    Arguments and errors as :func:`sliding_tiles`.
    """
    result: Tensor | None = None
    for tile in sliding_tiles(predict, image, window, stride, batch_size=batch_size):
        if result is None:
            result = tile.logits.new_empty(tile.logits.shape[0], *image.shape[1:])
        result[:, slice(*tile.rows), slice(*tile.cols)] = tile.logits
    return result


def sliding_clusters(
    predict: Predictor,
    image: Tensor,
    window: int,
    stride: int,
    *,
    batch_size: int = 4,
    dtype: torch.dtype = torch.int64,
) -> Tensor:
    """The argmax over K of :func:`sliding_windows`, ``[H, W]``, in bounded memory.

    Its time grows with the pixels, not with K times the pixels (see
    :mod:`nefkern.segmentation.winners`). Ties go to the lower index. Arguments and errors as
    :func:`sliding_tiles`; ``dtype`` is the result's, and must hold K − 1.
    """
    clusters: Tensor | None = None
    for rows, cols, planes in _regions(predict, image, window, stride, batch_size):
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


def _regions(
    predict: Predictor, image: Tensor, window: int, stride: int, batch_size: int
) -> Iterator[tuple[tuple[int, int], tuple[int, int], list[Plane]]]:
    """Rows, columns and windows of each rectangle that one set of windows covers."""
    _, height, width = image.shape
    tops, lefts = window_starts(height, window, stride), window_starts(width, window, stride)
    h, w = min(window, height), min(window, width)
    in_reach: dict[int, _WindowRow] = {}
    for rows in _cuts(tops, h):
        covering = [top for top in tops if top <= rows[0] < top + h]
        in_reach = {top: in_reach[top] for top in covering if top in in_reach}
        for top in covering:
            if top not in in_reach:
                strip = image[:, top : top + h]
                in_reach[top] = _predict_row(predict, strip, lefts, w, batch_size)
        for cols in _cuts(lefts, w):
            yield rows, cols, _covering(in_reach, lefts, w, cols[0])


def _cuts(starts: list[int], window: int) -> Iterator[tuple[int, int]]:
    return pairwise(sorted({*starts, *(start + window for start in starts)}))


def _batches(strip: Tensor, lefts: list[int], w: int, batch_size: int) -> Iterator[Tensor]:
    if len(lefts) == 1:  # a view: the image may be large
        yield strip[None, :, :, lefts[0] : lefts[0] + w]
        return
    for i in range(0, len(lefts), batch_size):
        yield torch.stack([strip[:, :, left : left + w] for left in lefts[i : i + batch_size]])


def _predict_row(
    predict: Predictor, strip: Tensor, lefts: list[int], w: int, batch_size: int
) -> _WindowRow:
    grids: list[Tensor] = []
    extent: tuple[float, float] = (strip.shape[1], w)
    for crops in _batches(strip, lefts, w, batch_size):
        prediction = predict(crops)
        if isinstance(prediction, tuple):
            prediction, extent = prediction
        grids.extend(prediction)
    return _WindowRow(grids, extent)


def _covering(
    window_rows: dict[int, _WindowRow], lefts: list[int], w: int, col: int
) -> list[Plane]:
    """The windows over column ``col``."""
    return [
        Plane(grid, extent, top, left)
        for top, (grids, extent) in window_rows.items()
        for grid, left in zip(grids, lefts, strict=True)
        if left <= col < left + w
    ]
