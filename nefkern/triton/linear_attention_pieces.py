"""What the kernels of ``linear_attention`` share: tiles, feature maps, and their products.

Both maps are brought to one form, in which every factor of a product is of moderate size, so that
half precisions can hold it. With z the sums of φ(k), and weights w = φ(q) z ("elu") or
exp(q − max q) ("softmax"):

- a query's *shares* φ̃ = w / Σw (+ eps: "elu"), none negative, of sum 1 at most;
- the *means* S̃ = S / z ("elu") or S / √D ("softmax"): out = φ̃ S̃, and S / z is a mean of values;
- their gradient over z, dS̃ = φ̃ᵀ grad / z ("elu") or φ̃ᵀ grad / (√D z) ("softmax"): by it
  dv = ψ dS̃ with ψ = φ(k) ("elu") or exp(k − max k) ("softmax").

Products run on tensor cores, with sums in float32, by the promise of the dtype:

- float32: a factor is a sum of two float16 terms, and a product is three, all but that of the small
  terms ("split"). They have the 22 bits of two TF32 terms, half their size and twice their rate. A
  single product would err by 2^-11 a factor: 4,000 times float32's rounding. float16's narrow range
  is met by powers of two, one a token where each has a result of its own, else one a matrix or
  channel: a factor errs by 2^-22 of itself or 2^-39 of the largest beside it.
- float16 and bfloat16: one product in that dtype ("half"). Inputs are exact; what is computed (φ̃,
  ψ, S̃, dS̃) is rounded to it as PyTorch rounds it. float16's S̃ and dS̃ are brought to numbers near 1
  by a power of two first, so that none is too small for it.
- in the interpreter, which cannot multiply bfloat16: the same numbers in float32 ("bf16").
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def root(d):
    """An integer's square root. (A 1 that is passed to a kernel comes as a constant, without
    ``.to``.)"""
    return tl.sqrt(tl.full([], d, tl.float32))


@triton.jit
def exp(x):
    """Below float32's normal range 0: three instructions less than tl.exp, which keeps those."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def elu1(x):
    """elu(x) + 1; NaN stays NaN."""
    ALL: tl.constexpr = tl.PropagateNan.ALL
    return exp(tl.minimum(x, 0.0, ALL)) + tl.maximum(x, 0.0, ALL)


@triton.jit
def or_one(x):
    """x, but 1 for 0: a divisor of zeros."""
    return tl.where(x == 0, 1.0, x)


@triton.jit
def near_bfloat16(x):
    """Rounded to the nearest bfloat16, ties to even."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)  # the sum could undo a NaN


@triton.jit
def rounded(x, like, PRECISION: tl.constexpr):
    """A factor of products with ``like``: the two terms of "split", or one twice."""
    if PRECISION == "split":
        high = x.to(tl.float16)
        low = (x - high.to(tl.float32)).to(tl.float16)
    else:
        high = x.to(like.dtype.element_ty) if PRECISION == "half" else near_bfloat16(x)
        low = high
    return high, low


@triton.jit
def up(PRECISION: tl.constexpr):
    """The power of two that numbers of at most 1 are multiplied by to be factors."""
    return 16384.0 if PRECISION == "split" else 1.0


@triton.jit
def turned(factor):
    """Transposed."""
    return tl.trans(factor[0]), tl.trans(factor[1])


@triton.jit
def power_of(exponent):
    """2^(exponent - 127), for exponents from 1 to 254."""
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def powers_of(largest):
    """The power of two that brings numbers of at most ``largest`` below 2^15, and its reciprocal.

    Two float16 then hold each to 2^-22 of itself, or to 2^-39 of the largest. (The reciprocal is at
    least 2^-112, and so a normal number over :func:`up` too.)
    """
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    exponent = tl.minimum(tl.maximum(exponent, 29), 254)
    return power_of(268 - exponent), power_of(exponent - 14)


@triton.jit
def scaled(x, like, PRECISION: tl.constexpr):
    """A matrix as a factor of products with ``like``, and the power of two that it lacks."""
    unit = 1.0
    if PRECISION == "split":
        power, unit = powers_of(tl.max(tl.max(tl.abs(x), 1), 0))
        x *= power
    elif PRECISION == "half" and like.dtype.element_ty == tl.float16:
        largest = tl.max(tl.max(tl.abs(x), 1), 0)
        exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
        exponent = tl.minimum(tl.maximum(exponent, 1), 253)
        unit = power_of(exponent)
        x *= power_of(254 - exponent)
    return rounded(x, like, PRECISION), unit


@triton.jit
def tokens_of(x, like, PRECISION: tl.constexpr):
    """A tile as a factor, and the power of two that each token lacks: [tokens, 1]."""
    lack = 1.0
    if PRECISION == "split":
        power, lack = powers_of(tl.max(tl.abs(x), 1)[:, None])
        x *= power
    return rounded(x, like, PRECISION), lack


@triton.jit
def input_tokens_of(x, like, PRECISION: tl.constexpr):
    """The same of an input, which half precisions hold as it is."""
    if PRECISION == "split":
        factor, lack = tokens_of(x, like, PRECISION)
    else:
        x = x.to(tl.float32) if PRECISION == "bf16" else x
        factor, lack = (x, x), 1.0
    return factor, lack


@triton.jit
def input_tile_of(x, like, PRECISION: tl.constexpr):
    """The same with one power of two for all of it."""
    if PRECISION == "split":
        factor, lack = scaled(x, like, PRECISION)
    else:
        x = x.to(tl.float32) if PRECISION == "bf16" else x
        factor, lack = (x, x), 1.0
    return factor, lack


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """Of factors of two terms all but the product of the small ones, smallest first."""
    if PRECISION == "split":
        total = tl.dot(a[1], b[0], total)
        total = tl.dot(a[0], b[1], total)
    return tl.dot(a[0], b[0], total)


@triton.jit
def times(x, matrix, tokens: tl.constexpr, width: tl.constexpr, PRECISION: tl.constexpr):
    """x M, [tokens, width], of a tile and a matrix that stays.

    Warps share the rows of the first factor; of the second every one needs all, in registers. So
    where M is the larger the product is (Mᵀ xᵀ)ᵀ.
    """
    if tokens < width:
        zeros = tl.zeros([width, tokens], tl.float32)
        product = tl.trans(dot(turned(matrix), turned(x), zeros, PRECISION))
    else:
        product = dot(x, matrix, tl.zeros([tokens, width], tl.float32), PRECISION)
    return product


@triton.jit
def head_of(x, head, heads, batch_stride, head_stride):
    """Where a head begins."""
    h = head.to(tl.int64)
    return x + (h // heads) * batch_stride + (h % heads) * head_stride


@triton.jit
def tile_of(x, tokens, there, stride, channels, width, other):
    """[tokens, channels] of an input."""
    return tl.load(
        x + tokens.to(tl.int64)[:, None] * stride + channels[None, :],
        mask=there[:, None] & (channels < width)[None, :],
        other=other,
    )


@triton.jit
def put(x, tokens, there, stride, channels, width, value):
    tl.store(
        x + tokens.to(tl.int64)[:, None] * stride + channels[None, :],
        value.to(x.dtype.element_ty),
        mask=there[:, None] & (channels < width)[None, :],
    )


@triton.jit
def matrix_of(x, rows, d, columns, e):
    """[rows, columns] of a contiguous [d, e] matrix, zeros outside it."""
    return tl.load(
        x + rows[:, None] * e + columns[None, :],
        mask=(rows < d)[:, None] & (columns < e)[None, :],
        other=0.0,
    )


@triton.jit
def valid(mask, head, heads, tokens, count, HAS_MASK: tl.constexpr):
    there = tokens < count
    if HAS_MASK:
        at = mask + (head // heads).to(tl.int64) * count + tokens
        there = there & (tl.load(at, mask=there, other=0) != 0)
    return there


@triton.jit
def means_of(state, i, d, j, e, z, like, SOFTMAX: tl.constexpr, PRECISION: tl.constexpr):
    """S̃ as a factor, and the power of two that it lacks."""
    s = matrix_of(state, i, d, j, e)
    s = s / root(d) if SOFTMAX else s / or_one(z)[:, None]
    return scaled(s, like, PRECISION)


@triton.jit
def shares_of(x, i, d, z, eps, SOFTMAX: tl.constexpr, PRECISION: tl.constexpr):
    """φ̃ of a tile of queries, and the reciprocal of each one's divisor; both times ``up``."""
    if SOFTMAX:
        x = tl.where((i < d)[None, :], x, float("-inf"))
        weights = exp(x - tl.max(x, 1)[:, None])
        divisor = tl.sum(weights, 1)
    else:
        weights = elu1(x) * z[None, :]
        divisor = tl.sum(weights, 1) + eps
    reciprocal = tl.where(divisor == 0, 0.0, up(PRECISION) / divisor)
    return weights * reciprocal[:, None], reciprocal


@triton.jit
def key_features(x, shift, SOFTMAX: tl.constexpr):
    """ψ of a tile of keys."""
    if SOFTMAX:
        return exp(x - shift[None, :])
    return elu1(x)
