"""The rows that decide about ``knn``'s neighbours, in the layouts that its kernels read."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
from torch import Tensor

from nefkern.reference.knn import unit_rows
from nefkern.triton.knn_scores import BLOCK_ROWS

DEPTH = 64  # rows are padded to a multiple of this many channels


@dataclass(frozen=True)
class Rows:
    """All rows, which of them are queries and candidates, and the scale of their estimates.

    With a database its rows follow the queries'; without, every row is both.
    """

    rows: Tensor  # [N, depth], padded with zeros; divided by 2 to their exponents (inner product)
    planes: Tensor  # [C, N]
    features: Tensor  # [N, C]: as they came
    present: Tensor  # [N] bool: finite
    scale: Tensor  # [1]: a power of two that brings the rows to about 1
    exponents: Tensor  # [N] int32 (inner product; else empty): that bring each row to about 1
    queries: int
    begins: Tensor  # [queries] int32: the candidates of each
    ends: Tensor
    longest: int  # of their ranges
    reach: int  # candidates, at most, of BLOCK_ROWS queries: from the first one's to the last one's
    metric: str

    @property
    def euclidean(self) -> bool:
        return self.metric == "euclidean"

    @property
    def first_candidate(self) -> int:
        """The row whose index is 0 to the caller."""
        return self.queries if self.queries < len(self.rows) else 0


@dataclass(frozen=True)
class Ranges:
    """Offsets of segments, checked, on the host and as they came (None: all in one)."""

    bounds: Sequence[int]
    segments: Tensor | None = None


def rows_of(
    x: Tensor,
    metric: str,
    ranges: Ranges,
    database: Tensor | None = None,
    database_ranges: Ranges | None = None,
) -> Rows:
    """Of features [N, C] float32, and a database [M, C]: unit rows (cosine), rows over powers of
    two (inner product), or rows as they are."""
    queries, channels = x.shape
    own = database is None
    begins, ends = _candidates(x, ranges, ranges if own else database_ranges, 0 if own else queries)
    longest, reach = _lengths(queries, ranges.bounds, (ranges if own else database_ranges).bounds)
    x = x.contiguous() if own else torch.cat([x, database])
    scale, exponents = x.new_ones(1), x.new_empty(0, dtype=torch.int32)
    if metric == "euclidean":
        y, scale = x, _power_of_two(x)
    elif metric == "inner_product":
        y, exponents = _mantissas(x)
    else:
        y = unit_rows(x)
    present = y.isfinite().all(1)
    y = y.masked_fill(~present[:, None], 0)
    rows = x.new_zeros((len(x), max(1, triton.cdiv(channels, DEPTH)) * DEPTH))
    rows[:, :channels] = y
    planes = y.T.contiguous()
    return Rows(
        rows, planes, x, present, scale, exponents, queries, begins, ends, longest, reach, metric
    )


def _candidates(x: Tensor, ranges: Ranges, others: Ranges, first: int) -> tuple[Tensor, Tensor]:
    """[N] int32 twice: where every row's candidates begin and end, counted from row ``first``."""
    n = len(x)
    if others.segments is None:
        end = first + others.bounds[-1]
        return (x.new_full((n,), at, dtype=torch.int32) for at in (first, end))
    inner = ranges.segments.to(x.device, torch.int32)[1:]
    which = torch.bucketize(torch.arange(n, device=x.device), inner, right=True)
    offsets = others.segments.to(x.device, torch.int32) + first
    return offsets[which], offsets[which + 1]


def _lengths(n: int, bounds: Sequence[int], others: Sequence[int]) -> tuple[int, int]:
    """The longest range of candidates, and what BLOCK_ROWS rows from a multiple of it on reach."""
    longest = max((b - a for a, b in itertools.pairwise(others)), default=0)
    if len(bounds) == 2:
        return longest, longest
    first = np.arange(0, n, BLOCK_ROWS.value)
    last = np.minimum(first + BLOCK_ROWS.value, n) - 1
    begin, end = (np.searchsorted(bounds[1:], row, side="right") for row in (first, last))
    offsets = np.asarray(others)
    return longest, int((offsets[end + 1] - offsets[begin]).max(initial=0))


def _mantissas(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows with their largest entry in [1, 4), unless it is below 2^-126, and the exponents [N]
    int32 that were taken out; of zero rows, and of those that aren't finite, the least."""
    if x.numel() == 0:
        return x, x.new_full((len(x),), -126, dtype=torch.int32)
    largest = x.abs().amax(1)
    exponents = (largest.frexp().exponent - 1).clamp(-126, 126)
    exponents = exponents.where((largest > 0) & largest.isfinite(), -126)
    return x * power(-exponents, torch.float32)[:, None], exponents


def _power_of_two(x: Tensor) -> Tensor:
    """[1]: what brings the largest finite entry into [1, 2); no square overflows or vanishes."""
    if x.numel() == 0:
        return x.new_ones(1)
    largest = x.abs().masked_fill(~x.isfinite(), 0).amax().view(1)
    exponent = largest.frexp().exponent - 1
    return power((-exponent).clamp(-126, 126), torch.float32)


def power(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """2^exponent of integers, exact (``torch.ldexp`` promises that for no device), as float32 or
    float64, whose normal numbers it must be one of."""
    if dtype == torch.float32:
        return ((exponent.int() + 127) << 23).view(torch.float32)
    return ((exponent.long() + 1023) << 52).view(torch.float64)
