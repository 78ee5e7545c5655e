"""Forward kernels of ``linear_attention``: keys by chunks, join, then queries."""

from __future__ import annotations

import triton
import triton.language as tl

from nefkern.triton.linear_attention_pieces import (
    divisor_of,
    elu1,
    features_times,
    head_of,
    matrix_of,
    outer_added,
    put,
    query_features,
    query_tile,
    tile_of,
    valid,
)


@triton.jit
def sum_keys(
    k, v, mask, sums, totals, shifts, heads, count, d, e, chunk,
    k_batch, k_head, k_token, v_batch, v_head, v_token,
    SOFTMAX: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """One chunk of one head: Σ exp(k − shift) or Σ φ(k), and their products with v."""
    head, part = tl.program_id(0), tl.program_id(1)
    k = head_of(k, head, heads, k_batch, k_head)
    v = head_of(v, head, heads, v_batch, v_head)
    i, j = tl.arange(0, BD), tl.arange(0, BE)
    shift = tl.full([BD], float("-inf"), tl.float32)
    total = tl.zeros([BD], tl.float32)
    state = tl.zeros([BD, BE], tl.float32)
    for first in range(part * chunk, tl.minimum((part + 1) * chunk, count), BT):
        t = first + tl.arange(0, BT)
        there = valid(mask, head, heads, t, count, HAS_MASK)
        values = tile_of(v, t, there, v_token, j, e, 0.0)
        if SOFTMAX:
            keys = tile_of(k, t, there, k_token, i, d, float("-inf"))
            largest = tl.maximum(shift, tl.max(keys, 0))
            finite = tl.where(largest == float("-inf"), 0.0, largest)
            keep = tl.exp(shift - finite)
            phi = tl.exp(keys - finite[None, :])
            total, state, shift = total * keep, state * keep[:, None], largest
        else:
            inside = there[:, None] & (i < d)[None, :]
            phi = tl.where(inside, elu1(tile_of(k, t, there, k_token, i, d, 0.0)), 0.0)
        total += tl.sum(phi, 0)
        state = outer_added(phi, values, state, PRECISION)
    at = (head.to(tl.int64) * tl.num_programs(1) + part) * d
    tl.store(totals + at + i, total, mask=i < d)
    tl.store(shifts + at + i, shift, mask=i < d)
    inside = (i < d)[:, None] & (j < e)[None, :]
    tl.store(sums + (at + i)[:, None] * e + j[None, :], state, mask=inside)


@triton.jit
def join_keys(
    sums, totals, shifts, state, stats, d, e, parts,
    SOFTMAX: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Some rows of a head: the chunks brought to their largest shift, and added in order."""
    head = tl.program_id(0).to(tl.int64)
    i, j = tl.program_id(1) * BR + tl.arange(0, BR), tl.arange(0, BE)
    shift = tl.zeros([BR], tl.float32)
    if SOFTMAX:
        shift = tl.full([BR], float("-inf"), tl.float32)
        for part in range(parts):
            at = (head * parts + part) * d
            shift = tl.maximum(shift, tl.load(shifts + at + i, mask=i < d, other=float("-inf")))
        shift = tl.where(shift == float("-inf"), 0.0, shift)
    total = tl.zeros([BR], tl.float32)
    result = tl.zeros([BR, BE], tl.float32)
    for part in range(parts):
        at = (head * parts + part) * d
        own = tl.load(totals + at + i, mask=i < d, other=0.0)
        products = matrix_of(sums + at * e, i, d, j, e)
        if SOFTMAX:
            weight = tl.exp(tl.load(shifts + at + i, mask=i < d, other=float("-inf")) - shift)
            own, products = own * weight, products * weight[:, None]
        total += own
        result += products
    if SOFTMAX:
        result = result / tl.where(total == 0, 1.0, total)[:, None]
    tl.store(stats + head * 2 * d + i, shift, mask=i < d)
    tl.store(stats + (head * 2 + 1) * d + i, total, mask=i < d)
    inside = (i < d)[:, None] & (j < e)[None, :]
    tl.store(state + (head * d + i)[:, None] * e + j[None, :], result, mask=inside)


@triton.jit
def answer_queries(
    q, state, stats, out, heads, count, d, e, eps,
    q_batch, q_head, q_token, out_batch, out_head, out_token,
    SOFTMAX: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """out = φ(q) S for one tile of one head."""
    head = tl.program_id(0)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    i, j = tl.arange(0, BD), tl.arange(0, BE)
    there = t < count
    q = head_of(q, head, heads, q_batch, q_head)
    own = head.to(tl.int64) * d
    z = tl.load(stats + 2 * own + d + i, mask=i < d, other=0.0)
    x = query_tile(q, t, there, q_token, i, d, SOFTMAX)
    result = features_times(
        q, t, there, q_token, divisor_of(x, i, d, z, eps, SOFTMAX), state + own * e, d, j, e,
        query_features, SOFTMAX, PRECISION, BT, BD, BE, BC,
    )  # fmt: skip
    put(head_of(out, head, heads, out_batch, out_head), t, there, out_token, j, e, result)
