"""How the Triton kernels of linear_attention round their products, shown on the CPU.

The interpreter multiplies float16 as tensor cores do, with sums in float32: so the errors said at
the head of linear_attention_pieces are seen, not only argued.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensorMode

from nefkern import backend, backends
from nefkern.ops import linear_attention
from nefkern.triton import linear_attention as kernels
from nefkern.triton import linear_attention_pieces as pieces
from nefkern.triton.linear_attention_pieces import near_bfloat16, powers_of, rounded, scaled
from tests.ops.test_linear_attention import inputs, naive, with_gradients

pytestmark = pytest.mark.skipif(
    not backends.interpreting(), reason="on a GPU the products themselves are tested"
)


@triton.jit
def _one_product(a, b, total, PRECISION: tl.constexpr):
    return tl.dot(a[0], b[0], total)


@triton.jit
def _powers(x, up, down, N: tl.constexpr):
    i = tl.arange(0, N)
    power, reciprocal = powers_of(tl.load(x + i))
    tl.store(up + i, power)
    tl.store(down + i, reciprocal)


@triton.jit
def _split(x, high, low, N: tl.constexpr):
    i = tl.arange(0, N)
    terms = rounded(tl.load(x + i), x, "split")
    tl.store(high + i, terms[0])
    tl.store(low + i, terms[1])


@triton.jit
def _round(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, near_bfloat16(tl.load(x + i)))


@triton.jit
def _scale(x, like, out, unit, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None] * N, tl.arange(0, N)[None, :]
    factor, power = scaled(tl.load(x + i + j), like, "half")
    tl.store(out + i + j, factor[0])
    tl.store(unit, power)


def errors(name, data, feature_map):
    """Of out, dq, dk and dv, over the largest value of each; and by token, over its largest."""
    with backend(name):
        got = with_gradients(linear_attention, *data, feature_map=feature_map)
    expected = with_gradients(naive, *data, feature_map=feature_map)
    of_all, by_token = [], []
    for a, b in zip(got, expected, strict=True):
        error, size = (a.double() - b).abs(), b.abs()
        of_all.append((error.max() / size.max()).item())
        by_token.append((error.amax(-1) / size.amax(-1)).max().item())
    return max(of_all), max(by_token)


@pytest.mark.parametrize("feature_map", ["elu", "softmax"])
def test_three_products_are_as_good_as_float32_and_one_is_not(monkeypatch, feature_map):
    data = inputs((1, 1, 37, 41, 32, 24))
    theirs, _ = errors("reference", data, feature_map)
    three, _ = errors("triton", data, feature_map)
    monkeypatch.setattr(pieces, "dot", _one_product)
    one, _ = errors("triton", data, feature_map)
    print(
        f"{feature_map}: PyTorch's float32 {theirs:.1e}, three products {three:.1e}, one {one:.1e}"
    )
    assert three <= 4e-6  # what every backend promises for float32
    assert three <= 2 * theirs
    assert one >= 1e-4


def _sized(shape, start, stop, place, by_token):
    """Inputs of which one, by its place among q, k, v and grad, has sizes of all magnitudes."""
    data = inputs(shape)
    axis = 2 if by_token else 3
    sizes = torch.logspace(start, stop, data[place].shape[axis])
    data[place] *= sizes[:, None] if by_token else sizes
    return data


@pytest.mark.parametrize(
    ("start", "stop", "place", "by_token"),
    [
        pytest.param(-9, 0, 3, True, id="gradients of tokens"),
        pytest.param(-9, 0, 2, True, id="values of tokens"),
        pytest.param(-6, 0, 2, False, id="values of channels"),
        pytest.param(-30, -30, 2, True, id="tiny values"),
        pytest.param(28, 28, 2, True, id="huge values"),
        pytest.param(-6, 2, 1, False, id="keys of channels"),
    ],
)
@pytest.mark.parametrize("feature_map", ["elu", "softmax"])
def test_float32_holds_numbers_of_all_magnitudes(feature_map, start, stop, place, by_token):
    """As PyTorch's float32, though the terms are float16: also each token beside larger ones."""
    data = _sized((1, 1, 37, 41, 32, 24), start, stop, place, by_token)
    if start == stop:
        data[3] *= 10.0 ** (-start / 5)  # dq and dk are in float32's range
    for ours, theirs in zip(
        errors("triton", data, feature_map), errors("reference", data, feature_map), strict=True
    ):
        assert ours <= 3 * theirs + 1e-6


def test_channels_of_tiny_keys_keep_their_digits():
    """φ of one channel's keys is 1e-9 of the others', but it has all of the queries' attention."""
    q, k, v, grad = inputs((1, 1, 37, 41, 16, 16), scale=1.0)
    k[..., 3] -= 20
    q -= 25
    q[..., 3] += 26
    ours, _ = errors("triton", (q, k, v, grad), "elu")
    theirs, _ = errors("reference", (q, k, v, grad), "elu")
    assert ours <= 3 * theirs + 1e-6


def test_powers_bring_all_sizes_below_float16s_largest():
    x = torch.cat((torch.logspace(-37.9, 38.5, 126), torch.tensor([0.0, float("inf")])))
    up, down = torch.empty_like(x), torch.empty_like(x)
    _powers[(1,)](x, up, down, N=len(x))
    assert torch.equal(up * down, torch.ones_like(x))
    finite = x[:-1]
    assert ((finite * up[:-1] >= 2**14) | (finite < 2.0**-97)).all()
    assert (finite * up[:-1] < 2**15).all()
    assert (down >= 2.0**-112).all()


def test_two_terms_hold_22_bits():
    x = torch.cat(
        (torch.rand(512) * 2**15, torch.logspace(-12, 15, 512, base=2)[:-1], torch.ones(1))
    )
    high, low = torch.empty(1024, dtype=torch.float16), torch.empty(1024, dtype=torch.float16)
    _split[(1,)](x, high, low, N=1024)
    error = (high.double() + low.double() - x.double()).abs()
    assert (error <= (x.double() * 2**-22).clamp(min=2**-25)).all()
    assert error.max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("feature_map", "capability"), [("elu", 9), ("softmax", 10)])
def test_large_tiles_find_the_same(monkeypatch, feature_map, capability, dtype):
    """Those of compute capability 9 and 10, for heads of 64 channels."""
    data = inputs((1, 1, 35, 70, 64, 64), dtype)
    with backend("triton"):
        expected = with_gradients(linear_attention, *data, feature_map=feature_map)
        monkeypatch.setattr(kernels, "_large_tiles", lambda *tensors: capability)
        found = with_gradients(linear_attention, *data, feature_map=feature_map)
    for a, b in zip(found, expected, strict=True):
        scale = b.double().abs().max()
        bound = 4e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
        assert ((a.double() - b.double()).abs().max() / scale).item() <= bound


@pytest.mark.parametrize(
    ("capability", "large"),
    [((8, 0), 0), ((8, 9), 0), ((9, 0), 9), ((10, 0), 10), ((12, 0), 0)],
)
def test_large_tiles_are_for_gpus_that_multiply_from_shared_memory(monkeypatch, capability, large):
    with FakeTensorMode():
        x = torch.empty(2, 3, 70, 64, device="cuda")
        others = {
            "odd strides": torch.empty(2, 3, 70, 65, device="cuda")[..., :64],
            "narrow": torch.empty(2, 3, 70, 32, device="cuda"),
            "on the CPU": torch.empty(2, 3, 70, 64),
        }
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    kernels._products_from_shared_memory.cache_clear()
    assert kernels._large_tiles(x, x) == large
    assert not any(kernels._large_tiles(y, x) for y in others.values()), list(others)
    kernels._products_from_shared_memory.cache_clear()


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
