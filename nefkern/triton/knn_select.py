"""Selection of ``knn``: which of a row's scores are among the k best, or may be."""

from __future__ import annotations

import triton
import triton.language as tl

from nefkern.backends import interpreting
from nefkern.triton.knn_keys import fill_up, floating, integer, key_of
from nefkern.triton.knn_scores import first_score, row_scores, segment_of

# The interpreter takes as long for a large tile as for a small one.
SELECT = {"BR": 256, "BN": 512} if interpreting() else {"BR": 1, "BN": 2048, "num_warps": 8}
# Tiles twice as wide spill with Triton 3.6 on sm_90.
SELECT_EXACT = SELECT if interpreting() else SELECT | {"BN": 1024}


@triton.jit
def _reached(row, length, longest, bound, BR: tl.constexpr, BN: tl.constexpr):
    """How many scores of each row are at least its bound."""
    count = tl.zeros([BR], tl.int32)
    for first in range(0, longest, BN):
        s, _ = row_scores(row, first, length, BN)
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
        s, _ = row_scores(row, first, length, BN)
        valid, key = s == s, integer(s)
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
        between = integer(0.5 * floating(low) + 0.5 * floating(high))
        middle = tl.where((step < 16) & (between > low) & (between < high), between, middle)
        count = _reached(row, length, longest, floating(middle), BR, BN)
        enough = count >= k
        low = tl.where(open & enough, middle, low)
        reached = tl.where(open & enough, count, reached)
        high = tl.where(open & ~enough, middle, high)
        above = tl.where(open & ~enough, count, above)
        open = (reached > k + slack) & (low + 1 < high)
        step += 1
    return floating(low), reached, above


@triton.jit
def select_kernel(
    scores, begins, ends, margins, edges, counts, positions, first_row, last_row, strips, k, slack,
    capacity, relative, BR: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Positions of the candidates that may be among the k best, and how many they are."""
    local = tl.program_id(0) * BR + tl.arange(0, BR)
    i = first_row + local
    there = i < last_row
    begin, end = segment_of(begins, ends, i, there)
    length = end - begin
    longest = tl.max(length, 0)
    row = first_score(scores, begins, first_row, local, begin, there, strips)
    kth, _, _ = _about_kth(row, length, longest, k, slack, BR, BN)
    margin = tl.load(margins + i, mask=there, other=0.0)
    bound = kth - (2 * margin + relative * (tl.abs(kth) + margin))
    edge = tl.load(edges + i, mask=there, other=float("inf"))  # values beyond it all tie
    bound = tl.minimum(bound, edge - margin)
    bound = tl.where(bound <= -edge, float("-inf"), bound)
    count = tl.zeros([BR], tl.int32)
    out = positions + local.to(tl.int64)[:, None] * capacity
    for first in range(0, longest, BN):
        s, column = row_scores(row, first, length, BN)
        take = s >= bound[:, None]
        slot = count[:, None] + tl.cumsum(take.to(tl.int32), 1) - 1
        tl.store(out + slot, begin[:, None] + column[None, :], mask=take & (slot < capacity))
        count += tl.sum(take.to(tl.int32), 1)
    tl.store(counts + local, count, mask=there)


@triton.jit
def select_exact_kernel(
    scores, begins, ends, counts, keys, first_row, last_row, strips, k, capacity,
    BR: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Keys of the k best, ties to the lower index, of the rows with more than ``capacity``."""
    local = tl.program_id(0) * BR + tl.arange(0, BR)
    i = first_row + local
    there = tl.load(counts + local, mask=i < last_row, other=0) > capacity
    begin, end = segment_of(begins, ends, i, there)
    length = end - begin
    longest = tl.max(length, 0)
    row = first_score(scores, begins, first_row, local, begin, there, strips)
    kth, reached, above = _about_kth(row, length, longest, k, 0, BR, BN)
    # Where more than k reach the k-th, they tie with it; the first of them have the places left.
    places = tl.where(reached > k, k - above, k)
    count = tl.zeros([BR], tl.int32)
    ties = tl.zeros([BR], tl.int32)
    out = keys + local.to(tl.int64)[:, None] * capacity
    for first in range(0, longest, BN):
        s, column = row_scores(row, first, length, BN)
        tie = s == kth[:, None]
        rank = ties[:, None] + tl.cumsum(tie.to(tl.int32), 1) - 1
        take = (s > kth[:, None]) | (tie & (rank < places[:, None]))
        slot = count[:, None] + tl.cumsum(take.to(tl.int32), 1) - 1
        key = key_of(s, begin[:, None] + column[None, :])
        tl.store(out + slot, key, mask=take & (slot < capacity))
        count += tl.sum(take.to(tl.int32), 1)
        ties += tl.sum(tie.to(tl.int32), 1)
    fill_up(out, count, tl.where(there, capacity, 0), BN)
