"""Backward kernels of ``linear_attention``: queries by chunks, join, then keys by chunks.

The feature maps are computed anew. ``linear_attention_pieces`` says in what form.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nefkern.triton.linear_attention_pieces import (
    dot,
    head_of,
    input_tokens_of,
    key_features,
    matrix_of,
    means_of,
    or_one,
    powers_of,
    put,
    root,
    rounded,
    scaled,
    shares_of,
    tile_of,
    times,
    tokens_of,
    turned,
    up,
    valid,
)


@triton.jit
def query_gradients(
    grad, q, state, stats, dq, sums, shifts, heads, count, d, e, eps, chunk,
    grad_batch, grad_head, grad_token, q_batch, q_head, q_token, dq_batch, dq_head, dq_token,
    SOFTMAX: tl.constexpr, PRECISION: tl.constexpr, INPUT: tl.constexpr, STATE: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """dq of one chunk of one head, and what the chunk adds to φ̃ᵀ grad and, for "elu", to z dz.

    With G = grad S̃ᵀ: dq = φ̃ (G − rowsum(φ̃ G)), for "elu" with z over the divisor in place of φ̃
    where q > 0, and z dz = −Σ φ̃ rowsum(φ̃ G). With INPUT these, with STATE φ̃ᵀ grad.
    """
    head, part = tl.program_id(0), tl.program_id(1)
    i, j = tl.arange(0, BD), tl.arange(0, BE)
    q = head_of(q, head, heads, q_batch, q_head)
    grad = head_of(grad, head, heads, grad_batch, grad_head)
    dq = head_of(dq, head, heads, dq_batch, dq_head)
    own = head.to(tl.int64) * d
    z = tl.load(stats + 2 * own + d + i, mask=i < d, other=0.0)
    small = 1.0 / up(PRECISION)
    if INPUT:
        means, unit = means_of(state + own * e, i, d, j, e, z, q, SOFTMAX, PRECISION)
    dz = tl.zeros([BD], tl.float32)
    dstate = tl.zeros([BD, BE], tl.float32)
    # A wide S̃ leaves too few registers: read for every tile.
    again: tl.constexpr = BD * BE > 4096
    end = tl.minimum((part + 1) * chunk, count)
    for first in tl.range(part * chunk, end, BT, disable_licm=again):
        t = first + tl.arange(0, BT)
        there = t < count
        upper, lack = input_tokens_of(
            tile_of(grad, t, there, grad_token, j, e, 0.0), grad, PRECISION
        )
        x = tile_of(q, t, there, q_token, i, d, 0.0).to(tl.float32)
        phi, reciprocal = shares_of(x, i, d, z, eps, SOFTMAX, PRECISION)
        if INPUT:
            g = times(upper, turned(means), BT, BD, PRECISION) * (unit * small) * lack
            inner = tl.sum(phi * g, 1)[:, None] * small
            slope = phi
            if not SOFTMAX:
                slope = tl.minimum(phi, z[None, :] * reciprocal[:, None])
                dz -= tl.sum(phi * inner, 0)
            put(dq, t, there, dq_token, i, d, slope * (g - inner))
        if STATE:
            if PRECISION == "split":
                # The sum is over tokens: what they lack goes to φ̃, but for the most of it.
                most = tl.max(tl.max(lack, 1), 0)
                phi = turned(rounded(phi * (lack * (1.0 / most)), q, PRECISION))
                zeros = tl.zeros([BD, BE], tl.float32)
                dstate += dot(phi, upper, zeros, PRECISION) * (most * small)
            else:
                dstate = dot(turned(rounded(phi, q, PRECISION)), upper, dstate, PRECISION)
    at = (head.to(tl.int64) * tl.num_programs(1) + part) * d
    if INPUT and not SOFTMAX:
        tl.store(shifts + at + i, dz, mask=i < d)
    if STATE:
        inside = (i < d)[:, None] & (j < e)[None, :]
        tl.store(sums + (at + i)[:, None] * e + j[None, :], dstate, mask=inside)


@triton.jit
def join_gradients(
    sums, shifts, state, stats, dstate, shift, d, e, parts,
    SOFTMAX: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Rows of a head's dS̃, and what v dS̃ᵀ gets besides: dz, or −rowsum(S dS̃) for "softmax"."""
    head = tl.program_id(0).to(tl.int64)
    i, j = tl.program_id(1) * BR + tl.arange(0, BR), tl.arange(0, BE)
    more = tl.zeros([BR], tl.float32)
    result = tl.zeros([BR, BE], tl.float32)
    for part in range(parts):
        at = (head * parts + part) * d
        result += matrix_of(sums + at * e, i, d, j, e)
        if not SOFTMAX:
            more += tl.load(shifts + at + i, mask=i < d, other=0.0)
    z = or_one(tl.load(stats + (2 * head + 1) * d + i, mask=i < d, other=1.0))
    if SOFTMAX:
        result = result / (z * root(d))[:, None]
        more = -tl.sum(matrix_of(state + head * d * e, i, d, j, e) * result, 1)
    else:
        result, more = result / z[:, None], more / z
    tl.store(shift + head * d + i, more, mask=i < d)
    inside = (i < d)[:, None] & (j < e)[None, :]
    tl.store(dstate + (head * d + i)[:, None] * e + j[None, :], result, mask=inside)


@triton.jit
def key_gradients(
    k, v, mask, stats, dstate, shift, dk, dv, heads, count, d, e, chunk,
    k_batch, k_head, k_token, v_batch, v_head, v_token,
    dk_batch, dk_head, dk_token, dv_batch, dv_head, dv_token,
    SOFTMAX: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
    INPUT: tl.constexpr, STATE: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """dk = ψ (v dS̃ᵀ + shift), for "elu" with min(ψ, 1) in front, and dv = ψ dS̃ of one chunk of one
    head; of masked keys 0, whatever they hold. With INPUT dk, with STATE dv."""
    head, part = tl.program_id(0), tl.program_id(1)
    i, j = tl.arange(0, BD), tl.arange(0, BE)
    k = head_of(k, head, heads, k_batch, k_head)
    v = head_of(v, head, heads, v_batch, v_head)
    dk = head_of(dk, head, heads, dk_batch, dk_head)
    dv = head_of(dv, head, heads, dv_batch, dv_head)
    own = head.to(tl.int64) * d
    largest = tl.load(stats + 2 * own + i, mask=i < d, other=0.0)
    more = tl.load(shift + own + i, mask=i < d, other=0.0)
    back = matrix_of(dstate + own * e, i, d, j, e)
    if PRECISION == "split":
        # One power of two a channel: dv is a sum over channels, whose powers go to ψ.
        power, unit = powers_of(tl.max(tl.abs(back), 1))
        back = rounded(back * power[:, None], v, PRECISION)
        most = tl.max(unit, 0)
        unit = unit[None, :]
        weight = unit * (1.0 / most)
    else:
        back, unit = scaled(back, v, PRECISION)
        most = unit
        weight = 1.0
    for first in range(part * chunk, tl.minimum((part + 1) * chunk, count), BT):
        t = first + tl.arange(0, BT)
        inside, there = t < count, valid(mask, head, heads, t, count, HAS_MASK)
        keys = tile_of(k, t, there, k_token, i, d, 0.0).to(tl.float32)
        psi = key_features(keys, largest, SOFTMAX)
        if HAS_MASK:
            psi = tl.where(there[:, None], psi, 0.0)
        if INPUT:
            values, lack = input_tokens_of(tile_of(v, t, there, v_token, j, e, 0.0), v, PRECISION)
            g = times(values, turned(back), BT, BD, PRECISION) * unit * lack
            slope = psi if SOFTMAX else tl.minimum(psi, 1.0)
            put(dk, t, inside, dk_token, i, d, slope * (g + more[None, :]))
        if STATE:
            if SOFTMAX:
                psi = rounded(psi * (weight * up(PRECISION)), v, PRECISION)
                lack = 1.0 / up(PRECISION)
            else:
                psi, lack = tokens_of(psi * weight, v, PRECISION)
            its = times(psi, back, BT, BE, PRECISION)
            put(dv, t, inside, dv_token, j, e, its * most * lack)
