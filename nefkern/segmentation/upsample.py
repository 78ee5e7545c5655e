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


def pixel_positions(size: int, length: float) -> Tensor:
    """Where the pixels of an axis resized from ``length`` to ``size`` lie on the old one.

    Returns:
        float64 ``[size]``: 0 is the centre of the first old pixel; the outermost may lie beyond.
    """
    return (torch.arange(size, dtype=torch.float64) + 0.5) * (length / size) - 0.5


def interpolation(pixels: Tensor, cells: int, extent: float) -> Tensor:
    """:func:`upsample` along one axis as a matrix, for any of its pixels.

    A map of K = 256 clusters takes a kilobyte a pixel once it is up-sampled, so large images are
    worked through rectangle by rectangle.

    Args:
        pixels: int64 ``[n]``.
        cells: of the map.
        extent: pixels that the cells span, whole or not.

    Returns:
        float64 ``[n, cells]``, rows that sum to 1.
    """
    position = ((pixels.double() + 0.5) * (cells / extent) - 0.5).clamp(0, cells - 1)
    lower = position.long()
    upper = (lower + 1).clamp(max=cells - 1)
    fraction = position - lower
    weights = position.new_zeros(len(pixels), cells)
    weights.scatter_add_(1, lower[:, None], (1 - fraction)[:, None])
    return weights.scatter_add_(1, upper[:, None], fraction[:, None])
