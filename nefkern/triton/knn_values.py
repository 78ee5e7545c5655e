"""Values of ``knn`` in float32: of a row's candidates (re-rank), or of all its pairs."""

from __future__ import annotations

import triton
import triton.language as tl

from nefkern.backends import interpreting
from nefkern.triton.knn_keys import fill_up, key_of
from nefkern.triton.knn_rows import DEPTH
from nefkern.triton.knn_scores import base_of, put_scores

# Distances come from the rows as they are where their squares are in this range: then what vanished
# of small differences' squares changes no digit.
SMALL_SQUARE, LARGE_SQUARE = tl.constexpr(2.0**-64), tl.constexpr(2.0**126)
CHUNK = 32  # channels summed before they are added to the total
# The interpreter takes as long for a large tile as for a small one.
if interpreting():
    RERANK, EXACT = {"BR": 32, "BN": 64, "BC": DEPTH}, {"BM": 128, "BN": 256}
else:
    RERANK = {"BR": 1, "BN": 32, "BC": DEPTH, "num_warps": 4}
    EXACT = {"BM": 64, "BN": 64, "num_warps": 4}


@triton.jit
def _distance(square):
    """A distance from the sum of squares; and whether ``_wide_distance`` tells it better."""
    return tl.sqrt_rn(square), ~((square >= SMALL_SQUARE) & (square <= LARGE_SQUARE))


@triton.jit
def _wide_distance(x, y, there_x, there_y, channels, M: tl.constexpr, N: tl.constexpr):
    """|x - y| [M, N], in float64, where no square leaves its range; inf beyond float32's. Pointers
    to the rows of pairs, [M, 1] and [1, N] or [M, N]: one for a pair would take all registers."""
    total = tl.zeros([M, N], tl.float64)
    for c in range(0, channels):
        p = tl.load(x + c, mask=there_x, other=0.0).to(tl.float64)
        difference = p - tl.load(y + c, mask=there_y, other=0.0).to(tl.float64)
        total += difference * difference
    return tl.sqrt(total).to(tl.float32)


@triton.jit
def _times_power(x, exponent):
    """x 2^exponent, for exponents of float32's products: in two steps, as 2^254 is no float32."""
    half = tl.maximum(exponent, -252) >> 1
    rest = tl.maximum(exponent, -252) - half
    x *= ((half + 127) << 23).to(tl.float32, bitcast=True)
    return x * ((rest + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def rerank_kernel(
    rows, features, exponents, counts, positions, keys, first_row, last_row, steps, channels,
    capacity, METRIC: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Keys of the candidates of each row, from their values in float32."""
    local = tl.program_id(0) * BR + tl.arange(0, BR)
    i = first_row + local
    count = tl.load(counts + local, mask=i < last_row, other=0)
    count = tl.where(count > capacity, 0, count)  # an overflow: exact_kernel's
    depth = steps * BC  # so the compiler knows that rows are aligned
    x = rows + i.to(tl.int64)[:, None, None] * depth
    line = local.to(tl.int64)[:, None] * capacity
    for first in range(0, tl.max(count, 0), BN):
        slot = (first + tl.arange(0, BN))[None, :]
        there = slot < count[:, None]
        j = tl.load(positions + line + slot, mask=there, other=0)
        y = rows + j.to(tl.int64)[:, :, None] * depth
        total = tl.zeros([BR, BN, BC], tl.float32)
        for begin in range(0, depth, BC):
            c = (begin + tl.arange(0, BC))[None, None, :]
            p = tl.load(x + c, mask=(i < last_row)[:, None, None], other=0.0)
            q = tl.load(y + c, mask=there[:, :, None], other=0.0)
            if METRIC == "euclidean":
                total += (p - q) * (p - q)
            else:
                total += p * q
        value = tl.sum(total, 2)
        if METRIC == "inner_product":
            e = tl.load(exponents + i, mask=i < last_row, other=0)[:, None]
            value = _times_power(value, e + tl.load(exponents + j, mask=there, other=0))
        if METRIC == "euclidean":
            value, wide = _distance(value)
            wide = wide & there
            if tl.max(wide.to(tl.int32)) > 0:
                p = features + i.to(tl.int64)[:, None] * channels
                q = features + j.to(tl.int64) * channels
                far = _wide_distance(p, q, (i < last_row)[:, None], wide, channels, BR, BN)
                value = tl.where(wide, far, value)
            value = -value
        tl.store(keys + line + slot, key_of(value, j), mask=there)
    fill_up(keys + line, count, tl.where(i < last_row, capacity, 0), BN)


@triton.jit
def exact_kernel(
    planes, features, exponents, present, begins, ends, counts, scores, first_row, last_row, n,
    channels, strips, capacity, METRIC: tl.constexpr, INCLUDE_SELF: tl.constexpr,
    CHUNK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One tile of float32 scores, for the rows with more than ``capacity`` candidates.

    A thread keeps its pairs' sums: channel by channel, so that each has the same order everywhere.
    """
    row = tl.program_id(1) * BM
    base = base_of(begins, first_row, row)
    row += first_row
    first = base + tl.program_id(0) * BN
    i, j = row + tl.arange(0, BM), first + tl.arange(0, BN)
    chosen = tl.load(counts + (i - first_row), mask=i < last_row, other=0) > capacity
    if first < tl.max(tl.load(ends + i, mask=chosen, other=0), 0):
        there = tl.load(present + i, mask=i < n, other=0) != 0
        beside = tl.load(present + j, mask=j < n, other=0) != 0
        plane = planes
        total = tl.zeros([BM, BN], tl.float32)
        for c in range(0, channels, CHUNK):
            part = tl.zeros([BM, BN], tl.float32)
            for _ in range(c, tl.minimum(c + CHUNK, channels)):
                p = tl.load(plane + i, mask=there, other=0.0)[:, None]
                q = tl.load(plane + j, mask=beside, other=0.0)[None, :]
                if METRIC == "euclidean":
                    part = tl.fma(p - q, p - q, part)
                else:
                    part = tl.fma(tl.broadcast_to(p, BM, BN), tl.broadcast_to(q, BM, BN), part)
                plane += n
            total += part
        pair = there[:, None] & beside[None, :]
        if METRIC == "inner_product":
            e = tl.load(exponents + i, mask=i < n, other=0)[:, None]
            total = _times_power(total, e + tl.load(exponents + j, mask=j < n, other=0)[None, :])
        if METRIC == "euclidean":
            total, wide = _distance(total)
            wide = wide & pair
            if tl.max(wide.to(tl.int32)) > 0:
                p = features + i.to(tl.int64)[:, None] * channels
                q = features + j.to(tl.int64)[None, :] * channels
                far = _wide_distance(p, q, there[:, None], beside[None, :], channels, BM, BN)
                total = tl.where(wide, far, total)
            total = -total
        total = tl.where(pair, total, float("nan"))
        put_scores(scores, total, first_row, row, first, base, strips, INCLUDE_SELF)
