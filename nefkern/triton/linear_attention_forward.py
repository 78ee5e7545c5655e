"""Forward kernels of ``linear_attention``: keys by chunks, join, then queries by chunks."""

from __future__ import annotations

import triton
import triton.language as tl

from nefkern.triton.linear_attention_pieces import (
    dot,
    exp,
    head_of,
    input_tile_of,
    key_features,
    matrix_of,
    means_of,
    powers_of,
    put,
    rounded,
    shares_of,
    tile_of,
    times,
    turned,
    up,
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
    total = tl.zeros([BD, 16], tl.float32)  # by tensor cores too: columns that are all the same
    state = tl.zeros([BD, BE], tl.float32)
    for first in range(part * chunk, tl.minimum((part + 1) * chunk, count), BT):
        t = first + tl.arange(0, BT)
        there = valid(mask, head, heads, t, count, HAS_MASK)
        keys = tile_of(k, t, there, k_token, i, d, float("-inf")).to(tl.float32)
        values, unit = input_tile_of(tile_of(v, t, there, v_token, j, e, 0.0), v, PRECISION)
        if SOFTMAX:
            largest = tl.maximum(shift, tl.max(keys, 0))
            finite = tl.where(largest == float("-inf"), 0.0, largest)
            keep = exp(shift - finite)[:, None]
            phi = key_features(keys, finite, SOFTMAX)
            total, state, shift = total * keep, state * keep, largest
        else:
            phi = key_features(keys, shift, SOFTMAX)
        if PRECISION == "split":
            if SOFTMAX:
                phi, own = phi * up(PRECISION), 1.0 / up(PRECISION)
            else:
                power, own = powers_of(tl.max(phi, 0))
                phi, own = phi * power[None, :], own[:, None]
            phi = turned(rounded(phi, v, PRECISION))
            state += dot(phi, values, tl.zeros([BD, BE], tl.float32), PRECISION) * own * unit
            ones = tl.full([BT, 16], 1.0, tl.float16)
            total += tl.dot(phi[0], ones, tl.dot(phi[1], ones)) * own
        else:
            phi = turned(rounded(phi, v, PRECISION))
            state = dot(phi, values, state, PRECISION)
            total = tl.dot(phi[0], tl.full([BT, 16], 1.0, values[0].dtype), total)
    at = (head.to(tl.int64) * tl.num_programs(1) + part) * d
    tl.store(totals + at + i, tl.sum(total, 1) / 16, mask=i < d)
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
    q, state, stats, out, heads, count, d, e, eps, chunk,
    q_batch, q_head, q_token, out_batch, out_head, out_token,
    SOFTMAX: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """out = φ̃ S̃ for one chunk of one head."""
    head, part = tl.program_id(0), tl.program_id(1)
    i, j = tl.arange(0, BD), tl.arange(0, BE)
    q = head_of(q, head, heads, q_batch, q_head)
    out = head_of(out, head, heads, out_batch, out_head)
    own = head.to(tl.int64) * d
    z = tl.load(stats + 2 * own + d + i, mask=i < d, other=0.0)
    means, unit = means_of(state + own * e, i, d, j, e, z, q, SOFTMAX, PRECISION)
    unit = unit / up(PRECISION)
    for first in range(part * chunk, tl.minimum((part + 1) * chunk, count), BT):
        t = first + tl.arange(0, BT)
        there = t < count
        x = tile_of(q, t, there, q_token, i, d, 0.0).to(tl.float32)
        phi, _ = shares_of(x, i, d, z, eps, SOFTMAX, PRECISION)
        result = times(rounded(phi, q, PRECISION), means, BT, BE, PRECISION)
        put(out, t, there, out_token, j, e, result * unit)
