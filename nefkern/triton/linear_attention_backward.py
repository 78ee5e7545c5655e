"""Backward kernels of ``linear_attention``: queries by chunks, join, then keys; φ computed anew."""

from __future__ import annotations

import triton
import triton.language as tl

from nefkern.triton.linear_attention_pieces import (
    divisor_of,
    elu1,
    features_times,
    head_of,
    key_features,
    matrix_of,
    outer_added,
    put,
    query_phi,
    query_tile,
    root,
    tile_of,
    times_transposed,
    valid,
)


@triton.jit
def query_gradients(
    grad, q, state, stats, dq, sums, shifts, heads, count, d, e, eps, chunk,
    grad_batch, grad_head, grad_token, q_batch, q_head, q_token, dq_batch, dq_head, dq_token,
    SOFTMAX: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BC: tl.constexpr,
    BS: tl.constexpr,
):  # fmt: skip
    """dq of one chunk of one head, and what the chunk adds to dS and, for "elu", to dz.

    Programs share the columns of dS, BS each; the first does the rest.
    """
    head, part = tl.program_id(0), tl.program_id(1)
    i, j = tl.arange(0, BD), tl.program_id(2) * BS + tl.arange(0, BS)
    q = head_of(q, head, heads, q_batch, q_head)
    grad = head_of(grad, head, heads, grad_batch, grad_head)
    dq = head_of(dq, head, heads, dq_batch, dq_head)
    own = head.to(tl.int64) * d
    z = tl.load(stats + 2 * own + d + i, mask=i < d, other=0.0)
    dz = tl.zeros([BD], tl.float32)
    dstate = tl.zeros([BD, BS], tl.float32)
    for first in range(part * chunk, tl.minimum((part + 1) * chunk, count), BT):
        t = first + tl.arange(0, BT)
        there = t < count
        x = query_tile(q, t, there, q_token, i, d, SOFTMAX)
        largest, reciprocal = divisor_of(x, i, d, z, eps, SOFTMAX)
        phi = query_phi(x, i, d, largest, reciprocal, SOFTMAX)
        phi = tl.where(there[:, None], phi, 0.0)
        if tl.program_id(2) == 0:
            g = times_transposed(
                grad, t, there, grad_token, state + own * e, i, d, e, PRECISION, BT, BD, BE, BC
            )
            inner = tl.sum(phi * g, 1)[:, None]
            if SOFTMAX:
                result = phi * (g - root(d) * inner)
            else:
                slope = tl.minimum(elu1(x), 1.0) * reciprocal[:, None]
                result = slope * (g - inner * z[None, :])
                dz -= tl.sum(inner * phi, 0)
            put(dq, t, there, dq_token, i, d, result)
        upper = tile_of(grad, t, there, grad_token, j, e, 0.0)
        dstate = outer_added(phi, upper, dstate, PRECISION)
    at = (head.to(tl.int64) * tl.num_programs(1) + part) * d
    if tl.program_id(2) == 0:
        tl.store(shifts + at + i, dz, mask=i < d)
    inside = (i < d)[:, None] & (j < e)[None, :]
    tl.store(sums + (at + i)[:, None] * e + j[None, :], dstate, mask=inside)


@triton.jit
def join_gradients(
    sums, shifts, state, dstate, shift, d, e, parts,
    SOFTMAX: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Rows of a head's dS, and what dφ(k) gets besides: dz, or −rowsum(S dS) for "softmax"."""
    head = tl.program_id(0).to(tl.int64)
    i, j = tl.program_id(1) * BR + tl.arange(0, BR), tl.arange(0, BE)
    more = tl.zeros([BR], tl.float32)
    result = tl.zeros([BR, BE], tl.float32)
    for part in range(parts):
        at = (head * parts + part) * d
        result += matrix_of(sums + at * e, i, d, j, e)
        more += tl.load(shifts + at + i, mask=i < d, other=0.0)
    if SOFTMAX:
        more = -tl.sum(matrix_of(state + head * d * e, i, d, j, e) * result, 1)
    tl.store(shift + head * d + i, more, mask=i < d)
    inside = (i < d)[:, None] & (j < e)[None, :]
    tl.store(dstate + (head * d + i)[:, None] * e + j[None, :], result, mask=inside)


@triton.jit
def key_gradients(
    k, v, mask, stats, dstate, shift, dk, dv, heads, count, d, e,
    k_batch, k_head, k_token, v_batch, v_head, v_token,
    dk_batch, dk_head, dk_token, dv_batch, dv_head, dv_token,
    SOFTMAX: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of one head; of masked keys 0, whatever they hold."""
    head = tl.program_id(0)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    i, j = tl.arange(0, BD), tl.arange(0, BE)
    inside, there = t < count, valid(mask, head, heads, t, count, HAS_MASK)
    k = head_of(k, head, heads, k_batch, k_head)
    own = head.to(tl.int64) * d
    norms, dstate = (stats + 2 * own, stats + 2 * own + d), dstate + own * e

    result = times_transposed(
        head_of(v, head, heads, v_batch, v_head), t, there, v_token, dstate, i, d, e,
        PRECISION, BT, BD, BE, BC,
    )  # fmt: skip
    result += tl.load(shift + own + i, mask=i < d, other=0.0)[None, :]
    slope = key_features(k, t, there, k_token, norms, i, d, SOFTMAX)
    if not SOFTMAX:
        slope = tl.minimum(slope, 1.0)
    result = tl.where(there[:, None], slope * result, 0.0)
    put(head_of(dk, head, heads, dk_batch, dk_head), t, inside, dk_token, i, d, result)

    values = features_times(
        k, t, there, k_token, norms, dstate, d, j, e,
        key_features, SOFTMAX, PRECISION, BT, BD, BE, BC,
    )  # fmt: skip
    values = tl.where(there[:, None], values, 0.0)
    put(head_of(dv, head, heads, dv_batch, dv_head), t, inside, dv_token, j, e, values)
