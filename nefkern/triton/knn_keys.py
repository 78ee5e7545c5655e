"""Keys of ``knn``: a value and an index packed into one integer that sorts as they should.

Greater values come first, equal ones by index, and a place without a candidate last.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nefkern.backends import interpreting

NOTHING = tl.constexpr((1 << 63) - 1)  # the key of no candidate: sorts last
# The interpreter takes as long for a large tile as for a small one.
FLAT = {"BN": 1 << 16} if interpreting() else {"BN": 1024, "num_warps": 4}


@triton.jit
def _ordered(bits):
    """A float's bits as an integer of the same order; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def integer(x):
    return _ordered(x.to(tl.int32, bitcast=True))


@triton.jit
def floating(key):
    return _ordered(key).to(tl.float32, bitcast=True)


@triton.jit
def key_of(value, index):
    """Sorted ascending: greater values first, then lower indices. -0 counts as 0."""
    value = tl.where(value == 0, 0.0, value)
    return ((~integer(value)).to(tl.int64) << 32) | index.to(tl.int64)


@triton.jit
def fill_up(out, count, capacity, BN: tl.constexpr):
    """Marks the slots from ``count`` to ``capacity`` as empty."""
    for first in range(tl.min(count, 0) // BN * BN, tl.max(capacity, 0), BN):
        slot = (first + tl.arange(0, BN))[None, :]
        empty = (slot >= count[:, None]) & (slot < capacity[:, None])
        tl.store(out + slot, tl.full(empty.shape, NOTHING, tl.int64), mask=empty)


@triton.jit
def unpack_kernel(
    keys, values, indices, size, k, capacity, first_candidate, EUCLIDEAN: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Values and indices of a block, [rows, k] with ``size`` entries, from its sorted keys."""
    e = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    slot = e % k
    there = (e < size) & (slot < capacity)
    key = tl.load(keys + e // k * capacity + slot, mask=there, other=NOTHING)
    found = key != NOTHING
    value = floating(~(key >> 32).to(tl.int32))
    value = tl.where(found, value, float("-inf"))
    if EUCLIDEAN:
        value = tl.where(value == 0, 0.0, -value)
    tl.store(values + e, value, mask=e < size)
    index = key.to(tl.int32) - first_candidate
    tl.store(indices + e, tl.where(found, index, -1), mask=e < size)
