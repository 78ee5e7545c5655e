"""The winning cluster of every pixel, without all K logits of every pixel.

Between four neighbouring cell centres an up-sampled map is bilinear, and so is an average of maps
where none of them passes a cell centre. In such a block a cluster wins nowhere if another one is
ahead of it at all four corners. Few clusters are left, and only these are compared pixel by pixel:
the time is that of the pixels, whatever K is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nefkern.segmentation.upsample import spans, upsample_at

_PIXELS = 1 << 16  # compared at a time: what stays in the cache


class Plane(NamedTuple):
    """One window's coarse logits, and where they lie in the image.

    Attributes:
        logits: ``[K, h, w]``.
        extent: (height, width) in pixels that the grid spans.
        top, left: the window's first pixel in the image.
    """

    logits: Tensor
    extent: tuple[float, float]
    top: int
    left: int


def average(planes: Sequence[Plane], rows: Tensor, cols: Tensor) -> Tensor:
    """Mean of the up-sampled planes at these pixels: ``[K, len(rows), len(cols)]``.

    Args:
        planes: at least one.
        rows, cols: int64, ascending, of the image.
    """
    parts = (upsample_at(p.logits, p.extent, rows - p.top, cols - p.left) for p in planes)
    total = next(parts)
    if len(planes) == 1:
        return total
    total = total.clone()
    for part in parts:
        total += part
    return total.div_(len(planes))


def winners(
    planes: Sequence[Plane], rows: tuple[int, int], cols: tuple[int, int], out: Tensor
) -> None:
    """Write the argmax over K of :func:`average` on a rectangle; ties go to the lower index.

    Equal to the direct way but where rounding decides.

    Args:
        planes: the windows that cover the whole rectangle.
        rows, cols: half-open ranges of pixels of the image.
        out: any integer dtype that holds K − 1, ``[rows, cols]``, on the planes' device.
    """
    down, across = _blocks(planes, *rows, axis=0), _blocks(planes, *cols, axis=1)
    coarse = 8 * len(down) * len(across) < out.numel()  # a block is worth its corners
    if coarse and planes[0].logits.is_cpu:
        _by_blocks(planes, down, across, out)
    else:
        _directly(planes, rows, cols, out)


def _blocks(planes: Sequence[Plane], begin: int, end: int, axis: int) -> Tensor:
    """First and last pixel of the stretches on which all planes are linear, int64 ``[n, 2]``."""
    pixels = torch.arange(begin, end)
    cut = torch.zeros(end - begin, dtype=torch.bool)
    cut[0] = True
    for plane in planes:
        cells, length = plane.logits.shape[1 + axis], plane.extent[axis]
        span = spans(cells, length, pixels - (plane.top, plane.left)[axis])
        cut[1:] |= span[1:] != span[:-1]
    first = pixels[cut]
    return torch.stack([first, torch.cat([first[1:] - 1, pixels[-1:]])], 1)


def _directly(
    planes: Sequence[Plane], rows: tuple[int, int], cols: tuple[int, int], out: Tensor
) -> None:
    step = max(1, _PIXELS // (cols[1] - cols[0]))
    across = torch.arange(*cols)
    for begin in range(*rows, step):
        down = torch.arange(begin, min(begin + step, rows[1]))
        values = average(planes, down, across)
        out[begin - rows[0] : begin - rows[0] + len(down)] = values.argmax(0)


def _by_blocks(planes: Sequence[Plane], down: Tensor, across: Tensor, out: Tensor) -> None:
    corners = average(planes, down.flatten(), across.flatten())
    corners = corners.view(-1, len(down), 2, len(across), 2)
    block, share = _places(across, like=corners)
    top = 0
    for (first, last), four in zip(down.tolist(), corners.unbind(1), strict=True):
        height = last - first + 1
        band = out[top : top + height]
        _compare(_candidates(four), four, block, share, band)
        top += height


def _candidates(corners: Tensor) -> Tensor:
    """Which clusters may win in each block, from ``[K, 2, blocks, 2]``: int64 ``[M, blocks]``.

    Ascending; a block of fewer than M repeats its first.
    """
    four = corners.permute(0, 1, 3, 2).flatten(1, 2)  # [K, 4, blocks]
    behind = torch.zeros_like(four[:, 0], dtype=torch.bool)
    for best in four.argmax(0):  # at each corner
        ahead = four.gather(0, best.expand(1, 4, -1))
        behind |= (four < ahead).all(1)
    count = len(four)
    index = torch.arange(count)[:, None].expand_as(behind).masked_fill(behind, count)
    index = index.sort(0).values[: int((~behind).sum(0).max())]
    return torch.where(index == count, index[:1], index)


def _places(stretches: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Of every pixel its stretch, and how far it is from the first to the last pixel there."""
    first, last = stretches.unbind(1)
    index = torch.arange(len(first)).repeat_interleave(last - first + 1)
    pixels = torch.arange(int(first[0]), int(last[-1]) + 1)
    share = (pixels - first[index]).double() / (last - first).clamp(min=1)[index]
    return index, share.to(like.dtype)


def _compare(
    candidates: Tensor, corners: Tensor, block: Tensor, share: Tensor, out: Tensor
) -> None:
    """The best candidate at every pixel of a band of blocks.

    Args:
        candidates: int64 ``[M, blocks]``.
        corners: ``[K, 2, blocks, 2]``.
        block, share: of every column, see :func:`_places`.
        out: ``[rows, columns]``.
    """
    names = candidates.to(out.dtype)[:, block]
    if len(candidates) == 1:
        out.copy_(names.expand_as(out))
        return
    m = candidates[:, None, :, None].expand(-1, 2, -1, 2)
    chosen = corners.gather(0, m)[:, :, block]  # [M, 2, columns, 2]
    top, bottom = torch.lerp(chosen[..., 0], chosen[..., 1], share).unbind(1)
    slope = (bottom - top) / max(1, len(out) - 1)
    step = max(1, _PIXELS // out.shape[1])
    for begin in range(0, len(out), step):
        part = out[begin : begin + step]
        row = torch.arange(begin, begin + len(part), dtype=top.dtype)[:, None]
        best = torch.addcmul(top[0], row, slope[0])
        part.copy_(names[:1].expand_as(part))
        for k in range(1, len(candidates)):
            value = torch.addcmul(top[k], row, slope[k])
            torch.where(value > best, names[k], part, out=part)
            torch.maximum(best, value, out=best)
