"""How the Triton kernels of linear_attention round their products, shown on the CPU.

The interpreter multiplies in float32. Here it runs the same kernels with factors rounded as tensor
cores round them, so that the errors said at the head of
linear_attention_pieces are seen, not only argued.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from nefkern import backend, backends
from nefkern.ops import linear_attention
from nefkern.triton import linear_attention_pieces as pieces
from nefkern.triton.linear_attention_pieces import near_bfloat16, scaled
from tests.ops.test_linear_attention import inputs, naive, with_gradients

pytestmark = pytest.mark.skipif(
    not backends.interpreting(), reason="on a GPU the products themselves are tested"
)


@triton.jit
def near_tf32(x):
    bits = (x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _one_product(a, b, total, PRECISION: tl.constexpr):
    return tl.dot(near_tf32(a), near_tf32(b), total)


@triton.jit
def _three_products(a, b, total, PRECISION: tl.constexpr):
    """Of "tf32x3": a factor is a sum of two TF32 numbers; the small ones are not multiplied."""
    a_high, b_high = near_tf32(a), near_tf32(b)
    a_low, b_low = near_tf32(a - a_high), near_tf32(b - b_high)
    total = tl.dot(a_low, b_high, tl.dot(a_high, b_low, total))
    return tl.dot(a_high, b_high, total)


@triton.jit
def _round(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, near_bfloat16(tl.load(x + i)))


@triton.jit
def _scale(x, like, out, unit, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None] * N, tl.arange(0, N)[None, :]
    factor, power = scaled(tl.load(x + i + j), like, "half")
    tl.store(out + i + j, factor)
    tl.store(unit, power)


def errors(feature_map):
    """Of out, dq, dk and dv, relative to the largest value of each."""
    data = inputs((1, 2, 37, 41, 32, 24))
    with backend("triton"):
        got = with_gradients(linear_attention, *data, feature_map=feature_map)
    expected = with_gradients(naive, *data, feature_map=feature_map)
    return [
        ((a.double() - b.double()).abs().max() / b.abs().max()).item()
        for a, b in zip(got, expected, strict=True)
    ]


@pytest.mark.parametrize("feature_map", ["elu", "softmax"])
def test_three_products_are_as_good_as_float32_and_one_is_not(monkeypatch, feature_map):
    exact = max(errors(feature_map))
    monkeypatch.setattr(pieces, "dot", _three_products)
    three = max(errors(feature_map))
    monkeypatch.setattr(pieces, "dot", _one_product)
    one = max(errors(feature_map))
    print(f"{feature_map}: float32 {exact:.1e}, three products {three:.1e}, one {one:.1e}")
    assert three <= 4e-6  # what every backend promises for float32
    assert one >= 1e-4


def test_factors_are_rounded_to_the_nearest_bfloat16():
    x = torch.cat((torch.randn(1016), torch.tensor([0.0, -0.0, 1e38, 1e-40, *[float("nan")] * 4])))
    x[:8] = 1 + torch.arange(8) * 2.0**-9  # ties among them
    out = torch.empty_like(x)
    _round[(1,)](x, out, N=len(x))
    torch.testing.assert_close(out, x.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", [1e-38, 3e-9, 1.0, 7e4, 3e38])
def test_float16_holds_matrices_of_any_size(size):
    """To its 11 bits, beside a power of two."""
    x = size * torch.linspace(-1, 1, 256).view(16, 16)
    out, unit = torch.empty(16, 16, dtype=torch.float16), torch.empty(1)
    _scale[(1,)](x, out, out, unit, N=16)
    found = out.double() * unit.double()
    assert ((found - x.double()).abs().max() / x.abs().max()).item() <= 2**-11
    assert 0.5 <= out.abs().max() < 4


def test_gradients_beyond_float16_on_the_way():
    """dS and dz of large gradients are no numbers of float16, dq, dk and dv are."""
    q, k, v, grad = inputs((1, 1, 40, 40, 16, 16), torch.float16)
    grad = (grad * 3000).half()
    v = (v / 64).half()
    for feature_map in ("elu", "softmax"):
        expected = with_gradients(naive, q, k, v, grad, feature_map=feature_map)
        with backend("triton"):
            found = with_gradients(linear_attention, q, k, v, grad, feature_map=feature_map)
        for a, b in zip(found, expected, strict=True):
            assert ((a.double() - b).abs().max() / b.abs().max()).item() <= 2**-8
