"""How the Triton kernels of linear_attention round: TF32 products, shown on the CPU.

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
from nefkern.triton import linear_attention as kernels
from nefkern.triton import linear_attention_pieces as pieces
from nefkern.triton.linear_attention_pieces import near
from tests.ops.test_linear_attention import a_mask, inputs, naive, with_gradients

pytestmark = pytest.mark.skipif(
    not backends.interpreting(), reason="on a GPU the products themselves are tested"
)


@triton.jit
def _one_product(a, b, total, PRECISION: tl.constexpr):
    return tl.dot(near(a, "tf32"), near(b, "tf32"), total)


@triton.jit
def _three_products(a, b, total, PRECISION: tl.constexpr):
    """Of "tf32x3": a factor is a sum of two TF32 numbers; the small ones are not multiplied."""
    a_high, b_high = near(a, "tf32"), near(b, "tf32")
    a_low, b_low = near(a - a_high, "tf32"), near(b - b_high, "tf32")
    total = tl.dot(a_low, b_high, tl.dot(a_high, b_low, total))
    return tl.dot(a_high, b_high, total)


@triton.jit
def _round(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, near(tl.load(x + i), "tf32"))


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


@pytest.mark.parametrize("feature_map", ["elu", "softmax"])
def test_more_tokens_than_a_launch_has_tiles_for(monkeypatch, feature_map):
    data, options = (
        inputs((2, 1, 37, 41, 16, 8)),
        {"feature_map": feature_map, "mask": a_mask(2, 41)},
    )
    with backend("triton"):
        expected = with_gradients(linear_attention, *data, **options)
        monkeypatch.setattr(kernels, "MAX_TILES", 1)
        found = with_gradients(linear_attention, *data, **options)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_factors_are_rounded_to_the_nearest_tf32():
    exact = [0.0, -0.0, 1.0, -1.5, 1 + 2**-10, float("inf"), float("-inf"), 2.0**-126]
    above, below = 1 + 2**-11 + 2**-20, 1 + 2**-11 - 2**-20
    x = torch.tensor([*exact, above, -above, below, -below, float("nan"), *[0.0] * 3])
    out = torch.empty_like(x)
    _round[(1,)](x, out, N=len(x))
    up = 1 + 2**-10
    expected = torch.tensor([*exact, up, -up, 1.0, -1.0, float("nan"), *[0.0] * 3])
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    not_a_number = torch.tensor([0x7FFFFFFF, -1] * 8, dtype=torch.int32).view(torch.float32)
    _round[(1,)](not_a_number, out, N=len(x))
    assert out.isnan().all()
