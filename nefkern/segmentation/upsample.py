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


def upsample_part(
    logits: Tensor, extent: tuple[float, float], rows: tuple[int, int], cols: tuple[int, int]
) -> Tensor:
    """The rectangle ``rows × cols`` of ``upsample(logits, extent)``, without computing the rest.

    A map of K = 256 clusters takes a kilobyte a pixel once it is up-sampled, so large images are
    worked through rectangle by rectangle.

    Args:
        logits: floating point ``[K, h, w]``.
        extent: height and width in pixels that the whole grid spans, whole or not.
        rows, cols: half-open ranges ``(begin, end)`` of pixels within ``extent``.

    Returns:
        ``[K, rows, cols]``, equal to the slice of the full result up to rounding.
    """
    _, h, w = logits.shape
    if (h, w) == tuple(extent):  # already one value a pixel: nothing to interpolate
        return logits[:, slice(*rows), slice(*cols)]
    row_cells, row_weights = _interpolation(h, extent[0], *rows, like=logits)
    col_cells, col_weights = _interpolation(w, extent[1], *cols, like=logits)
    return row_weights @ (logits[:, row_cells, col_cells] @ col_weights.T)


def _interpolation(
    cells: int, length: float, begin: int, end: int, like: Tensor
) -> tuple[slice, Tensor]:
    """Linear interpolation of one axis as a matrix ``[end − begin, cells touched]``."""
    # On the CPU: tiny, and reading its ends would make a GPU wait.
    centres = torch.arange(begin, end, dtype=torch.float64) + 0.5
    position = (centres * (cells / length) - 0.5).clamp(0, cells - 1)
    lower = position.long()
    upper = (lower + 1).clamp(max=cells - 1)
    fraction = position - lower
    first, last = int(lower[0]), int(upper[-1])
    weights = position.new_zeros(end - begin, last - first + 1)
    weights.scatter_add_(1, (lower - first)[:, None], (1 - fraction)[:, None])
    weights.scatter_add_(1, (upper - first)[:, None], fraction[:, None])
    return slice(first, last + 1), weights.to(like)
