"""Triton kernels of ``linear_attention``: the formulas stand in its reference.

Keys first: every program sums φ(k)ᵀv over one chunk of a head's tokens, and a second kernel joins
the chunks in order, so that the result does not depend on how programs are scheduled. Then queries.
The backward pass computes φ anew and goes the same way: queries (dq and dS by chunks), join, keys.
Everything is read in its own precision; feature maps, sums and states are float32; "softmax" finds
the largest key as it goes and rescales what it has.

Products run on tensor cores, in TF32 (11 significant bits), by the promise of the dtype:

- float32 and float16: three products for one ("tf32x3", about 21 bits). A single one would err by
  2^-11 a factor: 4,000 times float32's rounding, and as much as float16's own.
- bfloat16: one product. A bfloat16 factor (v, the gradient) is exact in TF32; a computed one (φ, a
  state) errs by 2^-11, one eighth of the 2^-8 by which the result is rounded, and at most two
  factors are computed. They are rounded to nearest here, as the hardware would cut them off, and
  so that the interpreter shows the error too.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nefkern.backends import interpreting
from nefkern.reference.linear_attention import empty_token_major
from nefkern.triton.configs import Shipped, device_of

MAX_CHANNELS = 128  # a [D, E] state must fit the registers of a program
# Tokens of a tile and channels contracted at a time. Splitting float32 for TF32 keeps both halves
# of both factors in registers, so wide heads take half as many of either.
STEP, WIDE_STEP = 32, 16
ROWS = 16  # of a state that one program joins
COLUMNS = 64  # of dS that one program sums
CHUNK = 256  # tokens whose sums one program makes; more where there would be over 64 chunks


# ---- pieces ----


@triton.jit
def _elu1(x):
    return tl.where(x > 0, x + 1, tl.exp(tl.minimum(x, 0.0)))


@triton.jit
def _near(x, PRECISION: tl.constexpr):
    """A computed factor of a product: rounded to the nearest TF32 where that is what counts."""
    if PRECISION == "tf32":
        bits = (x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)  # the sum could undo a NaN
    return x


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _row(x, head, heads, batch_stride, head_stride):
    """Where a head begins."""
    h = head.to(tl.int64)
    return x + (h // heads) * batch_stride + (h % heads) * head_stride


@triton.jit
def _tile(x, tokens, there, stride, channels, width, other):
    """[tokens, channels] float32."""
    return tl.load(
        x + tokens.to(tl.int64)[:, None] * stride + channels[None, :],
        mask=there[:, None] & (channels < width)[None, :],
        other=other,
    ).to(tl.float32)


@triton.jit
def _put(x, tokens, there, stride, channels, width, value):
    tl.store(
        x + tokens.to(tl.int64)[:, None] * stride + channels[None, :],
        value.to(x.dtype.element_ty),
        mask=there[:, None] & (channels < width)[None, :],
    )


@triton.jit
def _matrix(x, rows, d, columns, e):
    """[rows, columns] of a contiguous [d, e] matrix, zeros outside it."""
    return tl.load(
        x + rows[:, None] * e + columns[None, :],
        mask=(rows < d)[:, None] & (columns < e)[None, :],
        other=0.0,
    )


@triton.jit
def _times_transposed(
    x, tokens, there, stride, matrix, i, d, e,
    PRECISION: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """x Mᵀ, [tokens, d], of an input's rows and a [d, e] matrix."""
    result = tl.zeros([BT, BD], tl.float32)
    for first in range(0, BE, BC):
        j = first + tl.arange(0, BC)
        rows = _tile(x, tokens, there, stride, j, e, 0.0)
        factor = _near(_matrix(matrix, i, d, j, e), PRECISION)
        result = _dot(rows, tl.trans(factor), result, PRECISION)
    return result


@triton.jit
def _valid(mask, head, heads, tokens, count, HAS_MASK: tl.constexpr):
    there = tokens < count
    if HAS_MASK:
        at = mask + (head // heads).to(tl.int64) * count + tokens
        there = there & (tl.load(at, mask=there, other=0) != 0)
    return there


@triton.jit
def _query_tile(q, tokens, count, stride, i, d, SOFTMAX: tl.constexpr):
    """[tokens, channels]; channels past d count as none of a softmax."""
    x = _tile(q, tokens, tokens < count, stride, i, d, 0.0)
    if SOFTMAX:
        x = tl.where((i < d)[None, :], x, float("-inf"))
    return x


@triton.jit
def _divisor(x, i, d, z, eps, SOFTMAX: tl.constexpr):
    """The largest channel ("softmax") and the reciprocal of φ(q)'s divisor, each [tokens]."""
    largest = tl.max(x, 1)
    if SOFTMAX:
        divisor = tl.sum(tl.exp(x - largest[:, None]), 1) * tl.sqrt(d.to(tl.float32))
    else:
        divisor = tl.sum(tl.where((i < d)[None, :], _elu1(x), 0.0) * z[None, :], 1) + eps
    return largest, tl.where(divisor == 0, 0.0, 1 / divisor)


@triton.jit
def _query_features(x, i, d, largest, reciprocal, SOFTMAX: tl.constexpr):
    """φ(q) over its divisor."""
    if SOFTMAX:
        return tl.exp(x - largest[:, None]) * reciprocal[:, None]
    return tl.where((i < d)[None, :], _elu1(x), 0.0) * reciprocal[:, None]


@triton.jit
def _key_features(k, tokens, there, stride, stats, i, d, SOFTMAX: tl.constexpr):
    """φ(k), zero where there is no key."""
    x = _tile(k, tokens, there, stride, i, d, 0.0)
    if SOFTMAX:
        largest = tl.load(stats + i, mask=i < d, other=0.0)
        total = tl.load(stats + d + i, mask=i < d, other=1.0)
        phi = tl.exp(x - largest[None, :]) / tl.where(total == 0, 1.0, total)[None, :]
    else:
        phi = _elu1(x)
    return tl.where(there[:, None] & (i < d)[None, :], phi, 0.0)


# ---- forward ----


@triton.jit
def _sum_keys(
    k, v, mask, sums, totals, shifts, heads, count, d, e, chunk,
    k_batch, k_head, k_token, v_batch, v_head, v_token,
    SOFTMAX: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """One chunk of one head: Σ exp(k − shift) or Σ φ(k), and their products with v."""
    head, part = tl.program_id(0), tl.program_id(1)
    k = _row(k, head, heads, k_batch, k_head)
    v = _row(v, head, heads, v_batch, v_head)
    i, j = tl.arange(0, BD), tl.arange(0, BE)
    shift = tl.full([BD], float("-inf"), tl.float32)
    total = tl.zeros([BD], tl.float32)
    state = tl.zeros([BD, BE], tl.float32)
    for first in range(part * chunk, tl.minimum((part + 1) * chunk, count), BT):
        t = first + tl.arange(0, BT)
        there = _valid(mask, head, heads, t, count, HAS_MASK)
        values = _tile(v, t, there, v_token, j, e, 0.0)
        if SOFTMAX:
            keys = _tile(k, t, there, k_token, i, d, float("-inf"))
            largest = tl.maximum(shift, tl.max(keys, 0))
            finite = tl.where(largest == float("-inf"), 0.0, largest)
            keep = tl.exp(shift - finite)
            phi = tl.exp(keys - finite[None, :])
            total, state, shift = total * keep, state * keep[:, None], largest
        else:
            inside = there[:, None] & (i < d)[None, :]
            phi = tl.where(inside, _elu1(_tile(k, t, there, k_token, i, d, 0.0)), 0.0)
        total += tl.sum(phi, 0)
        state = _dot(tl.trans(_near(phi, PRECISION)), values, state, PRECISION)
    at = (head.to(tl.int64) * tl.num_programs(1) + part) * d
    tl.store(totals + at + i, total, mask=i < d)
    tl.store(shifts + at + i, shift, mask=i < d)
    inside = (i < d)[:, None] & (j < e)[None, :]
    tl.store(sums + (at + i)[:, None] * e + j[None, :], state, mask=inside)


@triton.jit
def _join_keys(
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
        products = _matrix(sums + at * e, i, d, j, e)
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
def _answer_queries(
    q, state, stats, out, heads, count, d, e, eps,
    q_batch, q_head, q_token, out_batch, out_head, out_token,
    SOFTMAX: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """out = φ(q) S for one tile of one head."""
    head = tl.program_id(0)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    i, j = tl.arange(0, BD), tl.arange(0, BE)
    q = _row(q, head, heads, q_batch, q_head)
    own = head.to(tl.int64) * d
    z = tl.load(stats + 2 * own + d + i, mask=i < d, other=0.0)
    x = _query_tile(q, t, count, q_token, i, d, SOFTMAX)
    largest, reciprocal = _divisor(x, i, d, z, eps, SOFTMAX)
    result = tl.zeros([BT, BE], tl.float32)
    for first in range(0, BD, BC):
        c = first + tl.arange(0, BC)
        some = _query_tile(q, t, count, q_token, c, d, SOFTMAX)
        phi = _near(_query_features(some, c, d, largest, reciprocal, SOFTMAX), PRECISION)
        factor = _near(_matrix(state + own * e, c, d, j, e), PRECISION)
        result = _dot(phi, factor, result, PRECISION)
    _put(_row(out, head, heads, out_batch, out_head), t, t < count, out_token, j, e, result)


# ---- backward ----


@triton.jit
def _query_gradients(
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
    q = _row(q, head, heads, q_batch, q_head)
    grad = _row(grad, head, heads, grad_batch, grad_head)
    dq = _row(dq, head, heads, dq_batch, dq_head)
    own = head.to(tl.int64) * d
    z = tl.load(stats + 2 * own + d + i, mask=i < d, other=0.0)
    dz = tl.zeros([BD], tl.float32)
    dstate = tl.zeros([BD, BS], tl.float32)
    for first in range(part * chunk, tl.minimum((part + 1) * chunk, count), BT):
        t = first + tl.arange(0, BT)
        there = t < count
        x = _query_tile(q, t, count, q_token, i, d, SOFTMAX)
        largest, reciprocal = _divisor(x, i, d, z, eps, SOFTMAX)
        phi = _query_features(x, i, d, largest, reciprocal, SOFTMAX)
        phi = tl.where(there[:, None], phi, 0.0)
        if tl.program_id(2) == 0:
            g = _times_transposed(
                grad, t, there, grad_token, state + own * e, i, d, e, PRECISION, BT, BD, BE, BC
            )
            inner = tl.sum(phi * g, 1)[:, None]
            if SOFTMAX:
                result = phi * (g - tl.sqrt(d.to(tl.float32)) * inner)
            else:
                slope = tl.minimum(_elu1(x), 1.0) * reciprocal[:, None]
                result = slope * (g - inner * z[None, :])
                dz -= tl.sum(inner * phi, 0)
            _put(dq, t, there, dq_token, i, d, result)
        upper = _tile(grad, t, there, grad_token, j, e, 0.0)
        dstate = _dot(tl.trans(_near(phi, PRECISION)), upper, dstate, PRECISION)
    at = (head.to(tl.int64) * tl.num_programs(1) + part) * d
    if tl.program_id(2) == 0:
        tl.store(shifts + at + i, dz, mask=i < d)
    inside = (i < d)[:, None] & (j < e)[None, :]
    tl.store(sums + (at + i)[:, None] * e + j[None, :], dstate, mask=inside)


@triton.jit
def _join_gradients(
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
        result += _matrix(sums + at * e, i, d, j, e)
        more += tl.load(shifts + at + i, mask=i < d, other=0.0)
    if SOFTMAX:
        more = -tl.sum(_matrix(state + head * d * e, i, d, j, e) * result, 1)
    tl.store(shift + head * d + i, more, mask=i < d)
    inside = (i < d)[:, None] & (j < e)[None, :]
    tl.store(dstate + (head * d + i)[:, None] * e + j[None, :], result, mask=inside)


@triton.jit
def _key_gradients(
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
    inside, there = t < count, _valid(mask, head, heads, t, count, HAS_MASK)
    k = _row(k, head, heads, k_batch, k_head)
    own = head.to(tl.int64) * d
    stats, dstate = stats + 2 * own, dstate + own * e

    result = _times_transposed(
        _row(v, head, heads, v_batch, v_head), t, there, v_token, dstate, i, d, e,
        PRECISION, BT, BD, BE, BC,
    )  # fmt: skip
    result += tl.load(shift + own + i, mask=i < d, other=0.0)[None, :]
    slope = _key_features(k, t, there, k_token, stats, i, d, SOFTMAX)
    if not SOFTMAX:
        slope = tl.minimum(slope, 1.0)
    result = tl.where(there[:, None], slope * result, 0.0)
    _put(_row(dk, head, heads, dk_batch, dk_head), t, inside, dk_token, i, d, result)

    values = tl.zeros([BT, BE], tl.float32)
    for first in range(0, BD, BC):
        c = first + tl.arange(0, BC)
        phi = _near(_key_features(k, t, there, k_token, stats, c, d, SOFTMAX), PRECISION)
        factor = _near(_matrix(dstate, c, d, j, e), PRECISION)
        values = _dot(phi, factor, values, PRECISION)
    values = tl.where(there[:, None], values, 0.0)
    _put(_row(dv, head, heads, dv_batch, dv_head), t, inside, dv_token, j, e, values)


# ---- launches ----


def accepts(q: Tensor, v: Tensor) -> bool:
    """Whether the kernels take these tensors."""
    return (
        q.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and max(q.shape[-1], v.shape[-1]) <= MAX_CHANNELS
    )


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, feature_map: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward pass: out, state and stats as the reference's."""
    q, k, v = _channels_last(q, k, v)
    b, h, n, d = q.shape
    m, e = v.shape[2:]
    state, stats = (
        q.new_empty((b, h, d, e), dtype=torch.float32),
        q.new_empty((b, h, 2, d), dtype=torch.float32),
    )
    out = _result(q, (b, h, n, e))
    heads, chunk, parts = b * h, *_chunks(m)
    if not heads:
        return out.to(q.dtype), state, stats
    sums = state.new_empty((heads, parts, d, e))
    totals, shifts = state.new_empty((2, heads, parts, d)).unbind()
    its = _constants(d, e, feature_map, q.dtype)
    with device_of(q):
        _sum_keys[(heads, parts)](
            k, v, k if mask is None else mask.contiguous(), sums, totals, shifts, h, m, d, e,
            chunk, *k.stride()[:3], *v.stride()[:3], HAS_MASK=mask is not None,
            **_of(_sum_keys, its),
        )  # fmt: skip
        _join_keys[(heads, triton.cdiv(d, ROWS))](
            sums, totals, shifts, state, stats, d, e, parts, **_of(_join_keys, its)
        )
        if n:
            _answer_queries[(heads, triton.cdiv(n, its["BT"]))](
                q, state, stats, out, h, n, d, e, eps, *q.stride()[:3], *out.stride()[:3],
                **_of(_answer_queries, its),
            )  # fmt: skip
    return _rounded(out, q.dtype), state, stats


def linear_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    state: Tensor,
    stats: Tensor,
    feature_map: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward pass: dq, dk and dv as the reference's."""
    grad, q, k, v = _channels_last(grad, q, k, v)
    b, h, n, d = q.shape
    m, e = v.shape[2:]
    dq, dk, dv = (_result(x, x.shape) for x in (q, k, v))
    heads, chunk, parts = b * h, *_chunks(n)
    if heads:
        sums, shifts = state.new_empty((heads, parts, d, e)), state.new_empty((heads, parts, d))
        dstate, shift = torch.empty_like(state), state.new_empty((heads, d))
        its = _constants(d, e, feature_map, q.dtype)
        with device_of(q):
            _query_gradients[(heads, parts, triton.cdiv(its["BE"], its["BS"]))](
                grad, q, state, stats, dq, sums, shifts, h, n, d, e, eps, chunk,
                *grad.stride()[:3], *q.stride()[:3], *dq.stride()[:3],
                **_of(_query_gradients, its),
            )  # fmt: skip
            _join_gradients[(heads, triton.cdiv(d, ROWS))](
                sums, shifts, state, dstate, shift, d, e, parts, **_of(_join_gradients, its)
            )
            if m:
                _key_gradients[(heads, triton.cdiv(m, its["BT"]))](
                    k, v, k if mask is None else mask.contiguous(), stats, dstate, shift, dk, dv,
                    h, m, d, e, *k.stride()[:3], *v.stride()[:3], *dk.stride()[:3],
                    *dv.stride()[:3], HAS_MASK=mask is not None, **_of(_key_gradients, its),
                )  # fmt: skip
    return tuple(_rounded(x, q.dtype) for x in (dq, dk, dv))


def _channels_last(*tensors: Tensor) -> list[Tensor]:
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _chunks(tokens: int) -> tuple[int, int]:
    """A chunk's tokens and the number of chunks; a function of the tokens alone."""
    chunk = max(CHUNK, triton.cdiv(triton.cdiv(tokens, 64), STEP) * STEP)
    return chunk, max(1, triton.cdiv(tokens, chunk))


def _result(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Stored token-major. The interpreter would cut, not round, to bfloat16."""
    return empty_token_major(like, shape, torch.float32 if interpreting() else like.dtype)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else empty_token_major(x, x.shape, dtype).copy_(x)


def _constants(d: int, e: int, feature_map: str, dtype: torch.dtype) -> dict[str, Any]:
    """The constexprs and options of all kernels."""
    block_d, block_e = (max(16, triton.next_power_of_2(x)) for x in (d, e))
    step = WIDE_STEP if max(block_d, block_e) >= 64 else STEP
    return {
        "SOFTMAX": feature_map == "softmax",
        "PRECISION": "tf32" if dtype == torch.bfloat16 else "tf32x3",
        "BT": step,
        "BD": block_d,
        "BE": block_e,
        "BC": min(step, block_d, block_e),
        "BR": ROWS,
        "BS": min(block_e, COLUMNS),
        "num_warps": 8 if block_d * block_e > 64 * 64 else 4,
        "num_stages": 1,
    }


def _of(kernel: Any, its: dict[str, Any]) -> dict[str, Any]:
    """Those of the constants that a kernel has, and the options."""
    return {n: x for n, x in its.items() if n in kernel.arg_names or n.islower()}


def shipped() -> list[Shipped]:
    """Every kernel for heads of 16 to 128 channels, both maps, every dtype."""
    products = (_sum_keys, _answer_queries, _query_gradients, _key_gradients)
    found = []
    for width in (16, 32, 64, 128):
        for feature_map in ("elu", "softmax"):
            for kernel in products:
                for dtype in (torch.float32, torch.float16, torch.bfloat16):
                    found.append(_ship(kernel, width, feature_map, dtype))
            for kernel in (_join_keys, _join_gradients):  # they see float32 only
                found.append(_ship(kernel, width, feature_map, torch.float32))
    return found


def _ship(kernel: Any, width: int, feature_map: str, dtype: torch.dtype) -> Shipped:
    pointer = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}[dtype]
    kinds = {"mask": "*i1", "eps": "fp32"}
    kinds |= dict.fromkeys(("q", "k", "v", "grad", "out", "dq", "dk", "dv"), pointer)
    sums = ("sums", "totals", "shifts", "state", "stats", "dstate", "shift")
    kinds |= dict.fromkeys(sums, "*fp32")
    kinds |= dict.fromkeys(("heads", "count", "d", "e", "chunk", "parts"), "i32")
    names = kernel.arg_names
    constants = {"HAS_MASK": True, **_constants(width, width, feature_map, dtype)}
    return Shipped(
        f"linear_attention {kernel.__name__[1:]} {feature_map} {str(dtype)[6:]} D = {width}",
        kernel,
        {name: kinds.get(name, "i64") for name in names if not name.isupper()},  # strides: i64
        {name: value for name, value in constants.items() if name in names},
        constants["num_warps"],
        constants["num_stages"],
        product="PRECISION" in names,
    )
