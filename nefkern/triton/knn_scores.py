"""How the scores of a block of ``knn``'s rows lie in memory; greater for a nearer pair, NaN where
there is none (-inf is the score of a distance beyond float32).

Every row has a multiple of STRIP columns. In BLOCK_ROWS rows at a time, column 0 stands for the
first candidate of the segment that they begin in.
"""

from __future__ import annotations

import triton
import triton.language as tl

STRIP = tl.constexpr(256)  # rows of scores are padded to a multiple of this many
BLOCK_ROWS = tl.constexpr(128)  # a block of rows has a multiple of this many


@triton.jit
def segment_of(begins, ends, i, there):
    """The candidates [begin, end) of rows i; none where a row isn't there."""
    return tl.load(begins + i, mask=there, other=0), tl.load(ends + i, mask=there, other=0)


@triton.jit
def base_of(begins, first_row, local):
    """The index that column 0 stands for in these rows of a block: one for every 128 rows."""
    return tl.load(begins + first_row + local // BLOCK_ROWS * BLOCK_ROWS)


@triton.jit
def put_scores(
    scores, value, first_row, first_i, first_j, base, strips, INCLUDE_SELF: tl.constexpr
):
    """A tile of scores; whole, as its padded place has room, and aligned, at any segment's edge."""
    m, n = tl.arange(0, value.shape[0]), tl.arange(0, value.shape[1])
    if not INCLUDE_SELF:
        value = tl.where((first_i - first_j + m)[:, None] == n[None, :], float("nan"), value)
    width = strips * STRIP
    at = scores + (first_i - first_row).to(tl.int64) * width + (first_j - base)
    tl.store(at + (m.to(tl.int64)[:, None] * width + n[None, :]), value)


@triton.jit
def first_score(scores, begins, first_row, local, begin, there, strips):
    """Where a row's scores begin, with that of its segment's first row."""
    base = tl.load(begins + first_row + local // BLOCK_ROWS * BLOCK_ROWS, mask=there, other=0)
    return scores + local.to(tl.int64) * (strips * STRIP) + (begin - base)


@triton.jit
def row_scores(row, first, length, BN: tl.constexpr):
    """[rows, BN] scores of the segment's candidates from ``first`` on, NaN past its end."""
    column = first + tl.arange(0, BN)
    there = column[None, :] < length[:, None]
    return tl.load(row[:, None] + column[None, :], mask=there, other=float("nan")), column


def strips_of(reach: int) -> int:
    """Of scores a row, for columns from the first to the last candidate of BLOCK_ROWS rows."""
    return triton.cdiv(reach, STRIP.value)


def grid_of(rows: int, strips: int, tile: dict[str, int]) -> tuple[int, int]:
    """Tiles of columns, of rows."""
    return strips * STRIP.value // tile["BN"], triton.cdiv(rows, tile["BM"])
