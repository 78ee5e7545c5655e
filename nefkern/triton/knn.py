"""Triton kernels of ``knn``: products of float16 on tensor cores, then float32 where it matters.

Rows go in blocks whose scores, [rows, longest segment] float32, stay in the L2 cache. A block's

1. **scores** estimate every pair's value by one product of tiles,
2. **selection** keeps the candidates that may be among the k best, by the margin below,
3. **re-rank** computes their values in float32 from the unrounded rows,
4. **exact scores** are computed in float32 for the rows whose candidates overflow their buffer,
   followed by an exact selection; the kernels look for themselves whether there is such a row,
5. **sort** orders by (value, index), packed into one integer: ``torch.sort``, for any k.

Few channels, or a k that is a large part of N, skip 1 to 3 (:func:`preselects`): every row is exact
from the start. Both ways have the same accuracy. A row is done by one of them entirely, each value
is summed in one fixed order, and no atomic is used, so results don't depend on scheduling. Nothing
waits for the host.

Scores. Let y_i be the rows that decide: unit rows (cosine) or the features times a power of two
(euclidean). For any vector c, with d_i = y_i - c,

    <y_i, y_j>         = <d_i, d_j> + u_i + u_j,   u_i = <c, y_i> - |c|²/2
    -|y_i - y_j|² / 2  = <d_i, d_j> + u_i + u_j,   u_i = -|d_i|²/2

so one product serves both metrics. c is the mean row: the d_i are short, and so is the error.

Margin. Only p_i, d_i rounded to float16, is multiplied: the entries are below 4 whatever the input,
so its range suffices, and it has three bits more than bfloat16 at the same speed. With u = 2^-24
and the residual r_i = |d_i - p_i|, taken in float64 from what p_i really is, by Cauchy-Schwarz

    |<d_i, d_j> - <p_i, p_j>| = |<d_i - p_i, d_j> + <p_i, d_j - p_j>| <= r_i |d_j| + |p_i| r_j.

Products of two float16 are exact in float32. A tensor core adds T of them and the accumulator
after aligning all to the largest and cutting, which errs by at most T + 2 times 2u of the largest
(Fasi et al. 2021, "Numerical behavior of NVIDIA tensor cores"; T >= 4 since the first generation):
C/T such steps err by at most 3C u |p_i| |p_j|, and 4C + 8 is taken. Rounding the u_i and adding
them errs by 4u (|u_i| + |u_j|). The value that decides is itself computed in float32: with h bound
(:func:`_summing`) within h |y_i| |y_j| for cosine, and, for euclidean, a squared distance within
a relative h. Replacing row j's lengths by their maxima gives the margin m_i for all j.

Selection. Let s be a score that at least k candidates reach. Their values are at least s - m, so
the k-th best is, and whoever is among the k best has a score of at least s - 2m. The relative error
of a squared distance adds 2h (|s| + m).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nefkern.backends import interpreting
from nefkern.reference.knn import unit_rows
from nefkern.triton.configs import Shipped, autotune, device_of

#: Bytes of the scores and candidates of a block of rows, which should stay in the L2 cache. Blocks
#: have at least BLOCK_ROWS rows: from 65,000 candidates a row on it takes more, 512 bytes each.
WORKSPACE = 32 << 20
BLOCK_ROWS = tl.constexpr(128)
STRIP = tl.constexpr(256)  # rows of scores are padded to a multiple of this many
#: From here on :func:`preselects` chooses. Both are estimates, not measured on a GPU yet.
DIRECT_CHANNELS = 16
DIRECT_SHARE = 8

UNIT = 2.0**-24  # float32's rounding error
DEPTH = 64  # rows are padded to a multiple of this many channels
CHUNK = 32  # channels summed before they are added to the total
NOTHING = tl.constexpr((1 << 63) - 1)  # the key of no candidate: sorts last

SCORE_CONFIGS = [
    triton.Config({"BM": m, "BN": n, "BK": DEPTH}, num_warps=warps, num_stages=3)
    for m, n, warps in ((128, 128, 8), (128, 128, 4), (64, 128, 4))
]
# The interpreter takes as long for a large tile as for a small one.
if interpreting():
    SELECT, RERANK, EXACT = (
        {"BR": 256, "BN": 512}, {"BR": 32, "BN": 64, "BC": DEPTH}, {"BM": 128, "BN": 256},
    )  # fmt: skip
    FLAT = {"BN": 1 << 16}
else:
    SELECT = {"BR": 1, "BN": 2048, "num_warps": 8}
    RERANK = {"BR": 1, "BN": 32, "BC": DEPTH, "num_warps": 4}
    EXACT = {"BM": 64, "BN": 64, "num_warps": 4}
    FLAT = {"BN": 1024, "num_warps": 4}


# ---- pieces ----


@triton.jit
def _ordered(bits):
    """A float's bits as an integer of the same order; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _integer(x):
    return _ordered(x.to(tl.int32, bitcast=True))


@triton.jit
def _float(key):
    return _ordered(key).to(tl.float32, bitcast=True)


@triton.jit
def _key(value, index):
    """Sorted ascending: greater values first, then lower indices. -0 counts as 0."""
    value = tl.where(value == 0, 0.0, value)
    return ((~_integer(value)).to(tl.int64) << 32) | index.to(tl.int64)


@triton.jit
def _segment(begins, ends, i, there):
    """The candidates [begin, end) of rows i; none where a row isn't there."""
    return tl.load(begins + i, mask=there, other=0), tl.load(ends + i, mask=there, other=0)


@triton.jit
def _base(begins, first_row, local):
    """The index that column 0 stands for in these rows of a block: one for every 128 rows."""
    return tl.load(begins + first_row + local // BLOCK_ROWS * BLOCK_ROWS)


@triton.jit
def _put_scores(
    scores, value, first_row, first_i, first_j, base, strips, INCLUDE_SELF: tl.constexpr
):
    """A tile of scores; whole, as its padded place has room, and aligned, at any segment's edge."""
    m, n = tl.arange(0, value.shape[0]), tl.arange(0, value.shape[1])
    if not INCLUDE_SELF:
        value = tl.where((first_i - first_j + m)[:, None] == n[None, :], float("-inf"), value)
    width = strips * STRIP
    at = scores + (first_i - first_row).to(tl.int64) * width + (first_j - base)
    tl.store(at + (m.to(tl.int64)[:, None] * width + n[None, :]), value)


# ---- estimates ----


@triton.jit
def _pack_kernel(
    rows, centre, present, packed, offsets, lengths, residuals, n, depth,
    EUCLIDEAN: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """p = d rounded to float16, with u, |d| and |d - p|: sums in float64."""
    i = tl.program_id(0) * BR + tl.arange(0, BR)
    at = i.to(tl.int64)[:, None] * depth
    length = tl.zeros([BR], tl.float64)
    residual, along, middle = length, length, length
    for first in range(0, depth, BC):
        c = first + tl.arange(0, BC)
        y = tl.load(rows + at + c[None, :], mask=(i < n)[:, None], other=0.0).to(tl.float64)
        m = tl.load(centre + c).to(tl.float64)[None, :]
        d = y - m
        p = d.to(tl.float32).to(tl.float16)
        tl.store(packed + at + c[None, :], p, mask=(i < n)[:, None])
        rest = d - p.to(tl.float64)
        length += tl.sum(d * d, 1)
        residual += tl.sum(rest * rest, 1)
        along += tl.sum(m * y, 1)
        middle += tl.sum(m * m + 0 * y, 1)
    u = -0.5 * length if EUCLIDEAN else along - 0.5 * middle
    there = tl.load(present + i, mask=i < n, other=0) != 0
    # A row left out has no score with any other.
    tl.store(offsets + i, tl.where(there, u, float("-inf")).to(tl.float32), mask=i < n)
    UP: tl.constexpr = 1 + 1e-6  # covers the rounding of these sums
    tl.store(lengths + i, (tl.sqrt(length) * UP).to(tl.float32), mask=i < n)
    tl.store(residuals + i, (tl.sqrt(residual) * UP).to(tl.float32), mask=i < n)


@triton.jit
def _score_kernel(
    packed, offsets, begins, ends, scores, first_row, last_row, n, steps, strips,
    INCLUDE_SELF: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile of a block's estimates: rows ``program_id(1)``, columns ``program_id(0)``."""
    row = tl.program_id(1) * BM
    base = _base(begins, first_row, row)
    row += first_row
    first = base + tl.program_id(0) * BN
    i, j = row + tl.arange(0, BM), first + tl.arange(0, BN)
    if first < tl.max(tl.load(ends + i, mask=i < last_row, other=0), 0):
        depth = steps * BK  # so the compiler knows that rows are aligned
        # 64 bits for where a tile begins, 32 inside it. Rows past the end are read at the last one.
        x, y = packed + row.to(tl.int64) * depth, packed + first.to(tl.int64) * depth
        c = tl.arange(0, BK)
        a = (tl.minimum(i, n - 1) - row)[:, None] * depth + c[None, :]
        b = (tl.minimum(j, n - 1) - first)[None, :] * depth + c[:, None]
        total = tl.zeros([BM, BN], tl.float32)
        for k in range(0, depth, BK):
            total = tl.dot(tl.load(x + k + a), tl.load(y + k + b), total)
        u = tl.load(offsets + i, mask=i < n, other=0.0)
        v = tl.load(offsets + j, mask=j < n, other=0.0)
        total += u[:, None] + v[None, :]
        _put_scores(scores, total, first_row, row, first, base, strips, INCLUDE_SELF)


_tuned_score = autotune(SCORE_CONFIGS, key=["steps"])(_score_kernel)


# ---- selection ----


@triton.jit
def _first_score(scores, begins, first_row, local, begin, there, strips):
    """Where a row's scores begin, with that of its segment's first row."""
    base = tl.load(begins + first_row + local // BLOCK_ROWS * BLOCK_ROWS, mask=there, other=0)
    return scores + local.to(tl.int64) * (strips * STRIP) + (begin - base)


@triton.jit
def _row_scores(row, first, length, BN: tl.constexpr):
    """[rows, BN] scores of the segment's candidates from ``first`` on, -inf past its end."""
    column = first + tl.arange(0, BN)
    there = column[None, :] < length[:, None]
    return tl.load(row[:, None] + column[None, :], mask=there, other=float("-inf")), column


@triton.jit
def _reached(row, length, longest, bound, BR: tl.constexpr, BN: tl.constexpr):
    """How many scores of each row are at least its bound."""
    count = tl.zeros([BR], tl.int32)
    for first in range(0, longest, BN):
        s, _ = _row_scores(row, first, length, BN)
        count += tl.sum((s >= bound[:, None]).to(tl.int32), 1)
    return count


@triton.jit
def _about_kth(row, length, longest, k, slack, BR: tl.constexpr, BN: tl.constexpr):
    """A score that at least k and, unless they tie, at most k + slack of each row's scores reach.

    (All of them if there are fewer than k.) Also how many reach it, and how many are greater.
    """
    low = tl.full([BR], 0x7FFFFFFF, tl.int32)
    high = tl.full([BR], -0x7FFFFFFF, tl.int32)
    reached = tl.zeros([BR], tl.int32)
    for first in range(0, longest, BN):
        s, _ = _row_scores(row, first, length, BN)
        valid, key = s > float("-inf"), _integer(s)
        low = tl.minimum(low, tl.min(tl.where(valid, key, 0x7FFFFFFF), 1))
        high = tl.maximum(high, tl.max(tl.where(valid, key, -0x7FFFFFFF), 1))
        reached += tl.sum(valid.to(tl.int32), 1)
    high += 1  # now low is reached by enough, high by too few
    above = tl.zeros([BR], tl.int32)
    step = 0
    open = (reached > k + slack) & (low + 1 < high)
    while tl.max(open.to(tl.int32), 0) > 0:
        # Halves the interval of values, which soon finds a score among many; then that of their
        # bits, which ends exactly after 32 steps.
        middle = (low & high) + ((low ^ high) >> 1)
        between = _integer(0.5 * _float(low) + 0.5 * _float(high))
        middle = tl.where((step < 16) & (between > low) & (between < high), between, middle)
        count = _reached(row, length, longest, _float(middle), BR, BN)
        enough = count >= k
        low = tl.where(open & enough, middle, low)
        reached = tl.where(open & enough, count, reached)
        high = tl.where(open & ~enough, middle, high)
        above = tl.where(open & ~enough, count, above)
        open = (reached > k + slack) & (low + 1 < high)
        step += 1
    return _float(low), reached, above


@triton.jit
def _select_kernel(
    scores, begins, ends, margins, counts, positions, first_row, last_row, strips, k, slack,
    capacity, relative, BR: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Positions of the candidates that may be among the k best, and how many they are."""
    local = tl.program_id(0) * BR + tl.arange(0, BR)
    i = first_row + local
    there = i < last_row
    begin, end = _segment(begins, ends, i, there)
    length = end - begin
    longest = tl.max(length, 0)
    row = _first_score(scores, begins, first_row, local, begin, there, strips)
    kth, _, _ = _about_kth(row, length, longest, k, slack, BR, BN)
    margin = tl.load(margins + i, mask=there, other=0.0)
    bound = kth - (2 * margin + relative * (tl.abs(kth) + margin))
    count = tl.zeros([BR], tl.int32)
    out = positions + local.to(tl.int64)[:, None] * capacity
    for first in range(0, longest, BN):
        s, column = _row_scores(row, first, length, BN)
        take = (s >= bound[:, None]) & (s > float("-inf"))
        slot = count[:, None] + tl.cumsum(take.to(tl.int32), 1) - 1
        tl.store(out + slot, begin[:, None] + column[None, :], mask=take & (slot < capacity))
        count += tl.sum(take.to(tl.int32), 1)
    tl.store(counts + local, count, mask=there)


@triton.jit
def _select_exact_kernel(
    scores, begins, ends, counts, keys, first_row, last_row, strips, k, capacity,
    BR: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Keys of the k best, ties to the lower index, of the rows with more than ``capacity``."""
    local = tl.program_id(0) * BR + tl.arange(0, BR)
    i = first_row + local
    there = tl.load(counts + local, mask=i < last_row, other=0) > capacity
    begin, end = _segment(begins, ends, i, there)
    length = end - begin
    longest = tl.max(length, 0)
    row = _first_score(scores, begins, first_row, local, begin, there, strips)
    kth, reached, above = _about_kth(row, length, longest, k, 0, BR, BN)
    # Where more than k reach the k-th, they tie with it; the first of them have the places left.
    places = tl.where(reached > k, k - above, k)
    count = tl.zeros([BR], tl.int32)
    ties = tl.zeros([BR], tl.int32)
    out = keys + local.to(tl.int64)[:, None] * capacity
    for first in range(0, longest, BN):
        s, column = _row_scores(row, first, length, BN)
        valid = s > float("-inf")
        tie = valid & (s == kth[:, None])
        rank = ties[:, None] + tl.cumsum(tie.to(tl.int32), 1) - 1
        take = (valid & (s > kth[:, None])) | (tie & (rank < places[:, None]))
        slot = count[:, None] + tl.cumsum(take.to(tl.int32), 1) - 1
        key = _key(s, begin[:, None] + column[None, :])
        tl.store(out + slot, key, mask=take & (slot < capacity))
        count += tl.sum(take.to(tl.int32), 1)
        ties += tl.sum(tie.to(tl.int32), 1)
    _fill_up(out, count, tl.where(there, capacity, 0), BN)


@triton.jit
def _fill_up(out, count, capacity, BN: tl.constexpr):
    """Marks the slots from ``count`` to ``capacity`` as empty."""
    for first in range(tl.min(count, 0) // BN * BN, tl.max(capacity, 0), BN):
        slot = (first + tl.arange(0, BN))[None, :]
        empty = (slot >= count[:, None]) & (slot < capacity[:, None])
        tl.store(out + slot, tl.full(empty.shape, NOTHING, tl.int64), mask=empty)


# ---- values ----


@triton.jit
def _rerank_kernel(
    rows, counts, positions, keys, first_row, last_row, steps, capacity,
    EUCLIDEAN: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Keys of the candidates of each row, from their values in float32."""
    local = tl.program_id(0) * BR + tl.arange(0, BR)
    i = first_row + local
    count = tl.load(counts + local, mask=i < last_row, other=0)
    count = tl.where(count > capacity, 0, count)  # an overflow: _exact_kernel's
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
            if EUCLIDEAN:
                total += (p - q) * (p - q)
            else:
                total += p * q
        value = tl.sum(total, 2)
        if EUCLIDEAN:
            value = -tl.sqrt_rn(value)
        tl.store(keys + line + slot, _key(value, j), mask=there)
    _fill_up(keys + line, count, tl.where(i < last_row, capacity, 0), BN)


@triton.jit
def _exact_kernel(
    planes, present, begins, ends, counts, scores, first_row, last_row, n, channels, strips,
    capacity, EUCLIDEAN: tl.constexpr, INCLUDE_SELF: tl.constexpr, CHUNK: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One tile of float32 scores, for the rows with more than ``capacity`` candidates.

    A thread keeps its pairs' sums: channel by channel, so that each has the same order everywhere.
    """
    row = tl.program_id(1) * BM
    base = _base(begins, first_row, row)
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
                if EUCLIDEAN:
                    part = tl.fma(p - q, p - q, part)
                else:
                    part = tl.fma(tl.broadcast_to(p, BM, BN), tl.broadcast_to(q, BM, BN), part)
                plane += n
            total += part
        if EUCLIDEAN:
            total = -tl.sqrt_rn(total)
        total = tl.where(there[:, None] & beside[None, :], total, float("-inf"))
        _put_scores(scores, total, first_row, row, first, base, strips, INCLUDE_SELF)


@triton.jit
def _unpack_kernel(
    keys, unscale, values, indices, size, k, capacity, EUCLIDEAN: tl.constexpr, BN: tl.constexpr
):
    """Values and indices of a block, [rows, k] with ``size`` entries, from its sorted keys."""
    e = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    slot = e % k
    there = (e < size) & (slot < capacity)
    key = tl.load(keys + e // k * capacity + slot, mask=there, other=NOTHING)
    found = key != NOTHING
    value = _float(~(key >> 32).to(tl.int32))
    value = tl.where(found, value, float("-inf"))
    if EUCLIDEAN:
        value = tl.where(value == 0, 0.0, -value * tl.load(unscale))
    tl.store(values + e, value, mask=e < size)
    tl.store(indices + e, tl.where(found, key.to(tl.int32), -1), mask=e < size)


# ---- host ----


def preselects(channels: int, k: int, longest: int) -> bool:
    """Whether estimates on tensor cores come first, for segments of up to ``longest`` rows.

    With few channels a product of padded tiles has little to save; with a large k the re-rank
    fetches so many rows that all pairs cost less, in tiles.
    """
    return channels > DIRECT_CHANNELS and k * DIRECT_SHARE <= longest


@dataclass(frozen=True)
class _Rows:
    """The rows that decide, in the layouts the kernels read."""

    rows: Tensor  # [N, depth], padded with zeros
    planes: Tensor  # [C, N]
    present: Tensor  # [N] bool: finite
    unscale: Tensor  # [1]: a euclidean value is this times the rows' distance
    begins: Tensor  # [N] int32: every row's segment
    ends: Tensor
    longest: int  # of the segments
    euclidean: bool


@dataclass(frozen=True)
class _Packed:
    rows: Tensor  # [N, depth] float16
    offsets: Tensor  # [N]: u
    margins: Tensor  # [N]
    relative: float


def knn(
    features: Tensor,
    k: int,
    metric: str,
    segments: Tensor | None,
    bounds: Sequence[int],
    include_self: bool,
    *,
    preselect: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """values and indices [N, k]; see :func:`nefkern.ops.knn` for the contract.

    Args:
        features: [N, C] float16, bfloat16 or float32.
        bounds: ``segments`` on the host, checked; [0, N] for None.
        preselect: whether tensor cores choose the candidates whose values are then computed, or
            all values are computed in float32. None: as :func:`preselects` says. The accuracy is
            the same.
    """
    n, channels = features.shape
    values = features.new_empty((n, k), dtype=torch.float32)
    indices = features.new_empty((n, k), dtype=torch.int32)
    if n == 0:
        return values, indices
    with device_of(features):
        data = _rows(features.float(), metric == "euclidean", segments, bounds)
        if preselect is None:
            preselect = preselects(channels, k, data.longest)
        packed = _pack(data, channels) if preselect else None
        _blocks(data, packed, k, include_self, values, indices)
    return values, indices


def _rows(x: Tensor, euclidean: bool, segments: Tensor | None, bounds: Sequence[int]) -> _Rows:
    n, channels = x.shape
    scale = _power_of_two(x) if euclidean else x.new_ones(1)
    y = x * scale if euclidean else unit_rows(x)
    present = y.isfinite().all(1)
    y = y.masked_fill(~present[:, None], 0)
    rows = x.new_zeros((n, max(1, triton.cdiv(channels, DEPTH)) * DEPTH))
    rows[:, :channels] = y
    if segments is None:
        begins, ends = x.new_zeros(n, dtype=torch.int32), x.new_full((n,), n, dtype=torch.int32)
    else:
        offsets = segments.to(x.device, torch.int32)
        which = torch.bucketize(torch.arange(n, device=x.device), offsets[1:], right=True)
        begins, ends = offsets[which], offsets[which + 1]
    longest = max(b - a for a, b in itertools.pairwise(bounds))
    planes = y.T.contiguous()
    return _Rows(rows, planes, present, 1 / scale, begins, ends, longest, euclidean)


def _power_of_two(x: Tensor) -> Tensor:
    """[1]: what brings the largest finite entry into [1, 2); no square overflows or vanishes."""
    if x.numel() == 0:
        return x.new_ones(1)
    largest = x.abs().masked_fill(~x.isfinite(), 0).amax().view(1)
    exponent = largest.frexp().exponent - 1
    return torch.ldexp(torch.ones_like(largest), (-exponent).clamp(-126, 126))


def _pack(data: _Rows, channels: int) -> _Packed:
    rows = data.rows
    n, depth = rows.shape
    packed = torch.empty_like(rows, dtype=torch.float16)
    offsets, lengths, residuals = (rows.new_empty(n) for _ in range(3))
    tile = {"BR": 256 if interpreting() else 8, "BC": DEPTH}
    _pack_kernel[(triton.cdiv(n, tile["BR"]),)](
        rows, rows.mean(0), data.present, packed, offsets, lengths, residuals, n, depth,
        EUCLIDEAN=data.euclidean, **tile,
    )  # fmt: skip
    margins = _margins(offsets, lengths, residuals, channels, depth, data.euclidean)
    # A few roundings of the bound itself, and the values' relative error.
    relative = 8 * UNIT + (2 * _summing(depth) if data.euclidean else 0)
    return _Packed(packed, offsets, margins, relative)


def _summing(depth: int) -> float:
    """h: relative error of a value of ``depth`` channels, as ``_rerank_kernel`` adds them.

    ``depth / DEPTH`` terms one after the other, then DEPTH sums in any order; and, for euclidean,
    differences, squares and the square root (squared again).
    """
    return 1.01 * (depth / DEPTH + DEPTH + 8) * UNIT


def _margins(
    offsets: Tensor, lengths: Tensor, residuals: Tensor, channels: int, depth: int, euclidean: bool
) -> Tensor:
    """[N]: m, as derived at the top of this module."""
    offset = offsets.masked_fill(offsets.isinf(), 0).abs().double()
    length, residual = lengths.double(), residuals.double()
    packed = length + residual
    rounding = residual * length.amax() + packed * residual.amax()
    gamma = (4 * channels + 8) * UNIT
    gamma = gamma / (1 - gamma) if gamma < 0.5 else 1e30
    summing = gamma * packed * packed.amax() + 4 * UNIT * (offset + offset.amax())
    values = 0 if euclidean else 1.01 * _summing(depth)
    lost = depth * 2.0**-120  # below float32's normal range
    return ((rounding + summing + values + lost) * (1 + 1e-5)).float()


def _capacity(k: int, longest: int, preselect: bool) -> int:
    """Candidates a row can keep."""
    return min(longest, k + max(k // 2, 64) if preselect else k)


def _strips(n: int, longest: int) -> int:
    """Of scores a row. The columns of 128 rows reach into the segments on both of their sides."""
    return triton.cdiv(min(n, BLOCK_ROWS.value + 2 * longest), STRIP.value)


def _block_rows(n: int, strips: int, capacity: int) -> int:
    # Scores; a position, and a key twice beside its place while it is sorted.
    a_row = 4 * strips * STRIP.value + (4 + 3 * 8) * capacity
    blocks = min(max(1, WORKSPACE // a_row // BLOCK_ROWS.value), triton.cdiv(n, BLOCK_ROWS.value))
    return min(1 << 20, blocks * BLOCK_ROWS.value)


def _blocks(
    data: _Rows, packed: _Packed | None, k: int, include_self: bool, values: Tensor, indices: Tensor
) -> None:
    """The five steps for every block of rows."""
    n, longest = len(data.rows), data.longest
    capacity, places = _capacity(k, longest, packed is not None), min(k, longest)
    strips = _strips(n, longest)
    step = _block_rows(n, strips, capacity)
    new = data.rows.new_empty
    scores, keys = new((step, strips * STRIP.value)), new((step, capacity), dtype=torch.int64)
    counts = new(step, dtype=torch.int32).fill_(capacity + 1)  # an overflow: all exact
    positions = new((step, capacity) if packed else 0, dtype=torch.int32)
    for first in range(0, n, step):
        last = min(first + step, n)
        rows = triton.cdiv(last - first, SELECT["BR"])
        if packed:
            _preselect(data, packed, first, last, places, include_self, scores, counts, positions,
                       keys)  # fmt: skip
        _exact_kernel[_grid(last - first, strips, EXACT)](
            data.planes, data.present, data.begins, data.ends, counts, scores, first, last, n,
            len(data.planes), strips, capacity, data.euclidean, include_self, CHUNK, **EXACT,
        )  # fmt: skip
        _select_exact_kernel[(rows,)](
            scores, data.begins, data.ends, counts, keys, first, last, strips, places, capacity,
            **SELECT,
        )  # fmt: skip
        ordered = keys[: last - first].sort(dim=1).values
        size = (last - first) * k
        _unpack_kernel[(triton.cdiv(size, FLAT["BN"]),)](
            ordered, data.unscale, values[first:], indices[first:], size, k, capacity,
            data.euclidean, **FLAT,
        )  # fmt: skip


def _preselect(
    data: _Rows, packed: _Packed, first: int, last: int, places: int, include_self: bool,
    scores: Tensor, counts: Tensor, positions: Tensor, keys: Tensor,
) -> None:  # fmt: skip
    """Steps 1 to 3 for rows [first, last)."""
    rows, strips, capacity = last - first, scores.shape[1] // STRIP.value, keys.shape[1]
    n, steps = len(packed.rows), packed.rows.shape[1] // DEPTH
    _tuned_score[lambda tile: _grid(rows, strips, tile)](
        packed.rows, packed.offsets, data.begins, data.ends, scores, first, last, n, steps, strips,
        INCLUDE_SELF=include_self,
    )  # fmt: skip
    _select_kernel[(triton.cdiv(rows, SELECT["BR"]),)](
        scores, data.begins, data.ends, packed.margins, counts, positions, first, last, strips,
        places, places // 16, capacity, packed.relative, **SELECT,
    )  # fmt: skip
    _rerank_kernel[(triton.cdiv(rows, RERANK["BR"]),)](
        data.rows, counts, positions, keys, first, last, steps, capacity, data.euclidean, **RERANK
    )


def _grid(rows: int, strips: int, tile: dict[str, int]) -> tuple[int, int]:
    """Tiles of columns, of rows."""
    return strips * STRIP.value // tile["BN"], triton.cdiv(rows, tile["BM"])


def shipped() -> list[Shipped]:
    """Every kernel, both metrics, as the launches above configure it."""
    found = []
    for euclidean in (False, True):
        metric = "euclidean" if euclidean else "cosine"
        its = {"EUCLIDEAN": euclidean, "INCLUDE_SELF": False, "CHUNK": CHUNK}
        found.append(_ship(_pack_kernel, metric, its | {"BR": 8, "BC": DEPTH, "num_warps": 4}))
        found.append(_ship(_rerank_kernel, metric, its | RERANK))
        found.append(_ship(_exact_kernel, metric, its | EXACT))
        found.append(_ship(_unpack_kernel, metric, its | FLAT))
    for kernel in (_select_kernel, _select_exact_kernel):
        found.append(_ship(kernel, "", SELECT))
    for config in SCORE_CONFIGS:
        its = {"INCLUDE_SELF": False, "num_warps": config.num_warps, **config.kwargs}
        tile = f"{its['BM']} x {its['BN']}, {config.num_warps} warps"
        found.append(_ship(_score_kernel, tile, its, config.num_stages))
    return found


def _ship(kernel, variant: str, its: dict, stages: int = 3) -> Shipped:
    kinds = {"packed": "*fp16", "present": "*i1", "keys": "*i64", "relative": "fp32"}
    kinds |= dict.fromkeys(("begins", "ends", "counts", "positions", "indices"), "*i32")
    kinds |= dict.fromkeys(("rows", "planes", "centre", "scores", "margins", "unscale"), "*fp32")
    kinds |= dict.fromkeys(("offsets", "lengths", "residuals", "values"), "*fp32")
    names = kernel.arg_names
    return Shipped(
        f"knn {kernel.__name__[1:].removesuffix('_kernel')} {variant}".rstrip(),
        kernel,
        {name: kinds.get(name, "i32") for name in names if not name.isupper()},
        {name: value for name, value in its.items() if name in names},
        its["num_warps"],
        stages,
        product=kernel is _score_kernel,
    )
