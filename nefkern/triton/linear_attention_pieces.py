"""What the kernels of ``linear_attention`` share: tiles, feature maps, and their products.

Products run on tensor cores, in TF32 (11 significant bits), by the promise of the dtype:

- float32 and float16: three products for one ("tf32x3", about 21 bits). A single one would err by
  2^-11 a factor: 4,000 times float32's rounding, and as much as float16's own.
- bfloat16: one product. A bfloat16 factor (v, the gradient) is exact in TF32; a computed one (φ, a
  state) errs by 2^-11, one eighth of the 2^-8 by which the result is rounded, and at most two
  factors are computed. They are rounded to nearest here, as the hardware would cut them off, and
  so that the interpreter shows the error too.
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
def elu1(x):
    return tl.where(x > 0, x + 1, tl.exp(tl.minimum(x, 0.0)))


@triton.jit
def near(x, PRECISION: tl.constexpr):
    """A computed factor of a product: rounded to the nearest TF32 where that is what counts."""
    if PRECISION == "tf32":
        bits = (x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)  # the sum could undo a NaN
    return x


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def head_of(x, head, heads, batch_stride, head_stride):
    """Where a head begins."""
    h = head.to(tl.int64)
    return x + (h // heads) * batch_stride + (h % heads) * head_stride


@triton.jit
def tile_of(x, tokens, there, stride, channels, width, other):
    """[tokens, channels] float32."""
    return tl.load(
        x + tokens.to(tl.int64)[:, None] * stride + channels[None, :],
        mask=there[:, None] & (channels < width)[None, :],
        other=other,
    ).to(tl.float32)


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
def times_transposed(
    x, tokens, there, stride, matrix, i, d, e,
    PRECISION: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """x Mᵀ, [tokens, d], of an input's rows and a [d, e] matrix."""
    result = tl.zeros([BT, BD], tl.float32)
    for first in range(0, BE, BC):
        j = first + tl.arange(0, BC)
        rows = tile_of(x, tokens, there, stride, j, e, 0.0)
        factor = near(matrix_of(matrix, i, d, j, e), PRECISION)
        result = dot(rows, tl.trans(factor), result, PRECISION)
    return result


@triton.jit
def outer_added(phi, rows, total, PRECISION: tl.constexpr):
    """φᵀ X added to a state, of a tile's features and an input's rows."""
    return dot(tl.trans(near(phi, PRECISION)), rows, total, PRECISION)


@triton.jit
def valid(mask, head, heads, tokens, count, HAS_MASK: tl.constexpr):
    there = tokens < count
    if HAS_MASK:
        at = mask + (head // heads).to(tl.int64) * count + tokens
        there = there & (tl.load(at, mask=there, other=0) != 0)
    return there


@triton.jit
def query_tile(q, tokens, there, stride, i, d, SOFTMAX: tl.constexpr):
    """[tokens, channels]; channels past d count as none of a softmax."""
    x = tile_of(q, tokens, there, stride, i, d, 0.0)
    if SOFTMAX:
        x = tl.where((i < d)[None, :], x, float("-inf"))
    return x


@triton.jit
def divisor_of(x, i, d, z, eps, SOFTMAX: tl.constexpr):
    """The largest channel ("softmax") and the reciprocal of φ(q)'s divisor, each [tokens]."""
    largest = tl.max(x, 1)
    if SOFTMAX:
        divisor = tl.sum(tl.exp(x - largest[:, None]), 1) * root(d)
    else:
        divisor = tl.sum(tl.where((i < d)[None, :], elu1(x), 0.0) * z[None, :], 1) + eps
    return largest, tl.where(divisor == 0, 0.0, 1 / divisor)


@triton.jit
def query_phi(x, i, d, largest, reciprocal, SOFTMAX: tl.constexpr):
    """φ(q) over its divisor, of loaded channels."""
    if SOFTMAX:
        return tl.exp(x - largest[:, None]) * reciprocal[:, None]
    return tl.where((i < d)[None, :], elu1(x), 0.0) * reciprocal[:, None]


@triton.jit
def query_features(q, tokens, there, stride, norms, i, d, SOFTMAX: tl.constexpr):
    """φ(q) over its divisor; ``norms``: those of :func:`divisor_of`."""
    x = query_tile(q, tokens, there, stride, i, d, SOFTMAX)
    return query_phi(x, i, d, norms[0], norms[1], SOFTMAX)


@triton.jit
def key_features(k, tokens, there, stride, norms, i, d, SOFTMAX: tl.constexpr):
    """φ(k), zero where there is no key; ``norms``: where the largest keys and the sums begin."""
    x = tile_of(k, tokens, there, stride, i, d, 0.0)
    if SOFTMAX:
        largest = tl.load(norms[0] + i, mask=i < d, other=0.0)
        total = tl.load(norms[1] + i, mask=i < d, other=1.0)
        phi = tl.exp(x - largest[None, :]) / tl.where(total == 0, 1.0, total)[None, :]
    else:
        phi = elu1(x)
    return tl.where(there[:, None] & (i < d)[None, :], phi, 0.0)


@triton.jit
def features_times(
    x, tokens, there, stride, norms, matrix, d, j, e,
    FEATURES: tl.constexpr, SOFTMAX: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """φ(x) M, [tokens, e], of an input's rows and a [d, e] matrix, some channels at a time.

    FEATURES is :func:`query_features` or :func:`key_features`.
    """
    result = tl.zeros([BT, BE], tl.float32)
    for first in range(0, BD, BC):
        i = first + tl.arange(0, BC)
        phi = near(FEATURES(x, tokens, there, stride, norms, i, d, SOFTMAX), PRECISION)
        factor = near(matrix_of(matrix, i, d, j, e), PRECISION)
        result = dot(phi, factor, result, PRECISION)
    return result
