"""From the patch grid to pixels (section 3.6)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def upsample(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize maps bilinearly, corners not aligned (section 3.6).

    Args:
        logits: floating point ``[K, h, w]`` or ``[B, K, h, w]``.
        size: height and width of the result, in pixels.

    Returns:
        ``[K, H, W]`` or ``[B, K, H, W]``, dtype and device of ``logits``.
    """
    batch = logits if logits.ndim == 4 else logits[None]
    resized = F.interpolate(batch, size=tuple(size), mode="bilinear", align_corners=False)
    return resized if logits.ndim == 4 else resized[0]


def upsample_at(logits: Tensor, extent: tuple[float, float], rows: Tensor, cols: Tensor) -> Tensor:
    """Some rows and columns of ``upsample(logits, extent)``, without computing the rest.

    A map of K = 256 clusters takes a kilobyte a pixel once it is up-sampled, so large images are
    worked through rectangle by rectangle.

    Args:
        logits: floating point ``[K, h, w]``.
        extent: height and width in pixels that the whole grid spans, whole or not.
        rows, cols: int64 on the CPU, ascending, not empty: pixels within ``extent``.

    Returns:
        ``[K, len(rows), len(cols)]``, equal to those of the full result up to rounding.
    """
    _, h, w = logits.shape
    if (h, w) == tuple(extent):  # already one value a pixel: nothing to interpolate
        return logits[:, _as_index(rows)][:, :, _as_index(cols)]
    row_cells, row_weights = _interpolation(h, extent[0], rows, like=logits)
    col_cells, col_weights = _interpolation(w, extent[1], cols, like=logits)
    return row_weights @ (logits[:, row_cells, col_cells] @ col_weights.T)


def spans(cells: int, length: float, pixels: Tensor) -> Tensor:
    """Between which cell centres each pixel of one axis lies; linear where this is constant.

    Args:
        cells: along the axis.
        length: in pixels that they span.
        pixels: int64.

    Returns:
        int64: the cell before, −1 before the first centre.
    """
    return _position(cells, length, pixels).floor().clamp(-1, cells - 1).long()


def pixel_positions(size: int, length: float) -> Tensor:
    """Where the pixels of an axis resized from ``length`` to ``size`` lie on the old one.

    Returns:
        float64 ``[size]``: 0 is the centre of the first old pixel; the outermost may lie beyond.
    """
    return _position(length, size, torch.arange(size))


def cells_of(length: int, cells: int, extent: float) -> Tensor:
    """The cell that the middle of each pixel of an axis lies in.

    Args:
        length: pixels.
        cells: along the axis.
        extent: pixels that the cells span, at least ``length``, whole or not.

    Returns:
        int64 ``[length]``.
    """
    middles = torch.arange(length, dtype=torch.float64) + 0.5
    return (middles * (cells / extent)).long().clamp_(max=cells - 1)


def interpolation(pixels: Tensor, cells: int, extent: float) -> Tensor:
    """:func:`upsample` along one axis as a matrix, for any of its pixels.

    Args:
        pixels: int64 ``[n]``.
        cells: of the map.
        extent: pixels that the cells span, whole or not.

    Returns:
        float64 ``[n, cells]``, rows that sum to 1.
    """
    position = _position(cells, extent, pixels).clamp(0, cells - 1)
    lower = position.long()
    upper = (lower + 1).clamp(max=cells - 1)
    fraction = position - lower
    weights = position.new_zeros(len(pixels), cells)
    weights.scatter_add_(1, lower[:, None], (1 - fraction)[:, None])
    return weights.scatter_add_(1, upper[:, None], fraction[:, None])


def _position(cells: float, length: float, pixels: Tensor) -> Tensor:
    """Pixels' centres in cells, 0 at the centre of the first."""
    return (pixels.double() + 0.5) * (cells / length) - 0.5


def _as_index(pixels: Tensor) -> slice | Tensor:
    """A slice where pixels follow each other, which copies nothing."""
    first, last = int(pixels[0]), int(pixels[-1])
    return slice(first, last + 1) if last - first + 1 == len(pixels) else pixels


def _interpolation(cells: int, length: float, pixels: Tensor, like: Tensor) -> tuple[slice, Tensor]:
    """The cells that ascending pixels touch, and :func:`interpolation` from these."""
    # On the CPU: tiny, and reading its ends would make a GPU wait.
    ends = _position(cells, length, pixels[[0, -1]]).clamp(0, cells - 1).floor().long().tolist()
    first, last = ends[0], min(ends[1] + 1, cells - 1)
    return slice(first, last + 1), interpolation(pixels, cells, length)[:, first : last + 1].to(
        like
    )
