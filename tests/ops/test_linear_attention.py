"""linear_attention on every backend: against naive float64 formulas, and as a PyTorch operator."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
import torch._inductor.config
from hypothesis import given, settings
from hypothesis import strategies as st

import nefkern
from bench.bench_linear_attention import assert_no_worse, einsum_attention
from nefkern import backends
from nefkern.ops import linear_attention, registry
from nefkern.reference import linear_attention as reference
from tests.ops.graph_common import backend_device, backends_of, on_threads

MAPS = ("elu", "softmax")
HALVES = (torch.float16, torch.bfloat16)
BACKENDS = backends_of("linear_attention")
SHAPES = {  # B, H, N, M, D, E
    "head": (2, 3, 70, 70, 64, 64),
    "ragged": (1, 2, 37, 53, 19, 33),
    "wide": (1, 1, 9, 130, 72, 40),
    "one token": (3, 1, 1, 1, 64, 64),
    "one channel": (1, 2, 5, 4, 1, 1),
    "blocks": (1, 2, 40, 1100, 16, 24),
    "widest": (2, 2, 50, 60, 128, 128),
    "large head": (1, 1, 33, 35, 160, 144),
}


# Of the same kind, but soon done in Triton's interpreter. (No head over 128 channels: see below.)
INTERPRETED = {
    "head": (1, 2, 70, 70, 64, 64),
    "ragged": (2, 2, 19, 35, 19, 33),
    "wide": (1, 1, 9, 130, 72, 40),
    "one token": (3, 1, 1, 1, 64, 64),
    "one channel": (1, 2, 5, 4, 1, 1),
    "chunks": (1, 1, 270, 300, 16, 24),
    "widest": (1, 1, 19, 35, 128, 128),
}
WIDEST = {"triton": 128}  # head, in channels


def shapes_of(name):
    shapes = INTERPRETED if name == "triton" and backends.interpreting() else SHAPES
    return {key: s for key, s in shapes.items() if max(s[4:]) <= WIDEST.get(name, 1000)}


def rounds_factors(name, dtype):
    """Whether backend ``name`` rounds the factors of its products to ``dtype``, as PyTorch does."""
    if name == "triton":
        return dtype in HALVES
    return dtype == torch.bfloat16 and multiplies_bfloat16(name)


def multiplies_bfloat16(name):
    """Whether that is done by the processor's own products."""
    return name == "cpu" and backends.native_module().build_info()["isa"] == "avx512bf16"


@pytest.fixture(params=BACKENDS)
def backend(request):
    with nefkern.backend(request.param):
        yield request.param


def only(*names):
    """Instead of every backend, those of ``names`` that run here."""
    found = [name for name in names if name in BACKENDS]
    return pytest.mark.parametrize("backend", found, indirect=True)


def naive(q, k, v, feature_map, mask=None, eps=1e-6):
    """The N × M attention matrix written out, in float64 (differentiable)."""
    q, k, v = q.double(), k.double(), v.double()
    valid = torch.ones_like(k[:, :1, :, 0], dtype=torch.bool) if mask is None else mask[:, None]
    if feature_map == "elu":
        q, k = torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
        weights = (q @ k.mT) * valid[:, :, None]
        return (weights / (weights.sum(-1, keepdim=True) + eps)) @ v
    k = k.masked_fill(~valid[..., None], -1e300).softmax(-2) * valid[..., None]
    return (q.softmax(-1) / math.sqrt(q.shape[-1]) @ k.mT) @ v


def inputs(shape, dtype=torch.float32, seed=0, scale=2.0):
    b, h, n, m, d, e = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = ((b, h, n, d), (b, h, m, d), (b, h, m, e), (b, h, n, e))
    q, k, v, grad = (torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes)
    return [x.to(backend_device(), dtype) for x in (q * scale, k * scale, v, grad)]


def with_gradients(function, q, k, v, grad, **options):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = function(q, k, v, **options)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad.to(out.dtype))]


def assert_near(got, expected, tolerance=4e-6, floor=0.1):
    """Largest error relative to each result's largest value, or to `floor` where all of it cancels.

    (One key has all the attention whatever q is: its gradient is a difference of equal terms.)
    """
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
        assert a.shape == b.shape, name
        assert not a.isnan().any(), name
        if b.numel():
            scale = b.abs().max().double().clamp(min=floor)
            error = ((a.double() - b.double()).abs().max() / scale).item()
            assert error <= tolerance, f"{name}: error {error:.2e}"


def a_mask(b, m, seed=0):
    mask = torch.rand(b, m, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[0, : m // 2] = False
    return mask.to(backend_device())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("backend", "shape"),
    [
        pytest.param(name, shape, id=f"{name}-{key}")
        for name in BACKENDS
        for key, shape in shapes_of(name).items()
    ],
    indirect=["backend"],
)
@pytest.mark.parametrize("feature_map", MAPS)
def test_equals_the_attention_matrix_written_out(backend, feature_map, shape, masked):
    options = {"feature_map": feature_map, "mask": a_mask(shape[0], shape[3]) if masked else None}
    data = inputs(shape)
    expected = with_gradients(naive, *data, **options)
    assert_near(with_gradients(linear_attention, *data, **options), expected)


@pytest.mark.parametrize("feature_map", MAPS)
def test_float64_gradients(feature_map):
    q, k, v, _ = inputs((1, 2, 4, 5, 3, 2), torch.float64)
    mask = torch.tensor([[True, True, False, True, True]])

    def function(q, k, v):
        return linear_attention(q, k, v, feature_map=feature_map, mask=mask)

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in (q, k, v)])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("feature_map", MAPS)
def test_half_precisions_round_the_result(backend, feature_map, masked, dtype):
    n, m = (35, 33) if backend == "triton" and backends.interpreting() else (90, 85)
    data = inputs((2, 2, n, m, 64, 48), dtype)
    options = {"feature_map": feature_map, "mask": a_mask(2, m) if masked else None}
    got = with_gradients(linear_attention, *data, **options)
    assert all(x.dtype == dtype for x in got)
    expected = with_gradients(naive, *(x.double() for x in data), **options)
    rounded = torch.finfo(dtype).eps / 2
    if rounds_factors(backend, dtype):
        rounded *= 4  # φ(q), φ(k), the state and the result
    assert_near(got, expected, rounded + 4e-6 + torch.finfo(dtype).smallest_normal)


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 3, 300, 260, 64, 64),
        (1, 2, 200, 700, 33, 19),
        (3, 2, 64, 40, 16, 48),
        (1, 1, 70, 290, 128, 96),
    ],
    ids=str,
)
@pytest.mark.parametrize("feature_map", MAPS)
@only("cpu", "reference", "triton")
def test_bfloat16_is_no_worse_than_pytorch(backend, feature_map, shape, scale):
    """The error against float64 of PyTorch's own bfloat16 einsum, which rounds at every step."""
    interpreted = backend == "triton" and backends.interpreting()
    shape = (1, 1, *shape[2:]) if interpreted else shape
    runs = []
    for seed in range(2 if interpreted else 4):
        data = inputs(shape, torch.bfloat16, seed, scale)
        exact = with_gradients(naive, *(x.double() for x in data), feature_map=feature_map)
        ours = with_gradients(linear_attention, *data, feature_map=feature_map)
        runs.append((ours, with_gradients(einsum_attention, *data, feature_map=feature_map), exact))
    pooled = ([torch.cat(x) for x in zip(*run, strict=True)] for run in zip(*runs, strict=True))
    assert_no_worse(*pooled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("feature_map", MAPS)
def test_reads_a_fused_projection_in_place_and_writes_token_major(backend, feature_map, dtype):
    b, n, h, d = 2, 45, 3, 16
    qkv = torch.randn(b, n, 3, h, d, generator=torch.Generator().manual_seed(1))
    q, k, v = qkv.to(backend_device(), dtype).permute(2, 0, 3, 1, 4).unbind(0)
    grad = torch.ones_like(q)
    got = with_gradients(linear_attention, q, k, v, grad, feature_map=feature_map)
    expected = with_gradients(
        linear_attention, *(x.contiguous() for x in (q, k, v)), grad, feature_map=feature_map
    )
    assert_near(got, expected, 1e-6 if dtype == torch.float32 else 2**-8)
    assert all(x.transpose(1, 2).is_contiguous() for x in got)
    assert got[0].transpose(1, 2).reshape(b, n, h * d).data_ptr() == got[0].data_ptr()


@pytest.mark.parametrize("feature_map", MAPS)
def test_any_strides(backend, feature_map):
    q, k, v, grad = inputs((2, 2, 21, 21, 16, 16))
    strided = [x.mT.contiguous().mT for x in (q, k)] + [v.repeat(1, 1, 1, 2)[..., ::2]]
    strided[2].copy_(v)
    expected = with_gradients(linear_attention, q, k, v, grad, feature_map=feature_map)
    got = with_gradients(linear_attention, *strided, grad, feature_map=feature_map)
    assert_near(got, expected)
    one = torch.ones_like(grad[0, 0, 0, 0]).expand_as(grad)
    expected = with_gradients(linear_attention, q, k, v, one.clone(), feature_map=feature_map)
    assert_near(with_gradients(linear_attention, *strided, one, feature_map=feature_map), expected)
    shared = [x[:, :1].expand(-1, 2, -1, -1) for x in (k, v)]  # one head's keys for all heads
    expected = linear_attention(q, *(x.clone() for x in shared), feature_map=feature_map)
    assert torch.equal(linear_attention(q, *shared, feature_map=feature_map), expected)


@pytest.mark.parametrize("sizes", [(0, 0), (0, 7), (7, 0)], ids=str)
@pytest.mark.parametrize("feature_map", MAPS)
def test_no_tokens(backend, feature_map, sizes):
    data = inputs((2, 2, *sizes, 8, 8))
    out, dq, dk, dv = with_gradients(linear_attention, *data, feature_map=feature_map)
    assert out.shape == data[0].shape
    assert dk.shape == dv.shape == data[1].shape
    assert not out.any()
    assert not dq.any()
    assert not dk.any()
    assert not dv.any()


@pytest.mark.parametrize("batch", [(0, 2), (2, 0)], ids=str)
def test_no_heads(backend, batch):
    out, dq, _, _ = with_gradients(linear_attention, *inputs((*batch, 3, 3, 8, 8)))
    assert out.shape == dq.shape == (*batch, 3, 8)


@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("feature_map", MAPS)
def test_no_valid_key_gives_zeros_and_garbage_behind_the_mask_is_not_read(
    backend, feature_map, eps
):
    q, k, v, grad = inputs((2, 2, 6, 50, 8, 8))
    mask = a_mask(2, 50)
    mask[1] = False
    options = {"feature_map": feature_map, "mask": mask, "eps": eps}
    clean = with_gradients(linear_attention, q, k, v, grad, **options)
    dirty = [x.masked_fill(~mask[:, None, :, None], math.nan) for x in (k, v)]
    for a, b in zip(
        with_gradients(linear_attention, q, *dirty, grad, **options), clean, strict=True
    ):
        assert torch.equal(a, b)
        assert not a[1].any()
    for gradient in clean[2:]:
        assert not gradient.masked_select(~mask[:, None, :, None]).any()


@pytest.mark.parametrize("feature_map", MAPS)
def test_a_mask_equals_leaving_the_keys_out(backend, feature_map):
    q, k, v, _ = inputs((1, 2, 11, 90, 16, 16))
    mask = a_mask(1, 90)
    kept = [x[:, :, mask[0]] for x in (k, v)]
    got = linear_attention(q, k, v, mask=mask, feature_map=feature_map)
    assert_near([got] * 4, [linear_attention(q, *kept, feature_map=feature_map)] * 4)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in Triton's interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("feature_map", MAPS)
def test_what_is_not_finite_stays_in_its_head_and_is_not_hidden(backend, feature_map, dtype):
    data = inputs((1, 2, 5, 7, 4, 4), dtype)
    for which, bad in itertools.product(range(3), (math.nan, math.inf, -math.inf)):
        changed = [x.clone() for x in data]
        changed[which][0, 0, 3, 2] = bad
        with nefkern.backend("reference"):
            expected = with_gradients(linear_attention, *changed, feature_map=feature_map)
        found = with_gradients(linear_attention, *changed, feature_map=feature_map)
        for a, b in zip(found, expected, strict=True):
            assert not (a.isfinite() & ~b.isfinite()).any(), (which, bad)
            assert a[:, 1].isfinite().all(), (which, bad)
        if which < 2 or not math.isinf(bad) or backend != "triton":
            finite = expected[0].isfinite()
            torch.testing.assert_close(found[0][finite], expected[0][finite], rtol=0.05, atol=0.02)


@pytest.mark.parametrize("feature_map", MAPS)
def test_large_and_tiny_logits(backend, feature_map):
    """Logits from 1e-6 to 1e4, far beyond exp's range."""
    data = inputs((1, 2, 30, 600, 16, 16), scale=1.0)
    data[0] *= torch.logspace(-6, 4, 30, device=data[0].device)[:, None]
    data[1] *= torch.logspace(-6, 4, 16, device=data[1].device)
    expected = with_gradients(naive, *data, feature_map=feature_map)
    assert_near(with_gradients(linear_attention, *data, feature_map=feature_map), expected, 1e-5)


@only("cpu", "reference")  # a GPU's exp is another
def test_exp_is_within_two_units_in_the_last_place(backend):
    """With one key, the sum of φ(k) in stats is φ(k) = exp(k) for k ≤ 0."""
    k = -torch.logspace(-8, math.log10(87), 100_001)[None, None, None]
    one = torch.ones(1, 1, 1, 1)
    _, _, stats = torch.ops.nefkern.linear_attention(k, k, one, None, "elu", 0.0)
    exact = k.double().exp()
    unit = torch.exp2(exact.log2().floor() - 23)
    assert ((stats[:, :, 1:].double() - exact) / unit).abs().max() <= 2


@only("cpu", "reference")  # all numbers of a dtype are the channels of one head
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precisions_are_read_and_rounded_like_pytorch(backend, dtype):
    """One channel and one or two equal keys: out is the mean of the values, whatever they are."""
    # A processor's own products of bfloat16 take subnormal numbers as 0.
    flushed = dtype == torch.bfloat16 and multiplies_bfloat16(backend)
    atol = torch.finfo(dtype).smallest_normal if flushed else 0
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    key = torch.zeros(1, 1, 1, 1, dtype=dtype)
    out = linear_attention(key, key, numbers[None, None, None], feature_map="softmax")
    torch.testing.assert_close(out[0, 0, 0], numbers, rtol=0, atol=atol, equal_nan=True)

    pairs = torch.stack((numbers, numbers.roll(-4097)))
    pairs = pairs[:, pairs.isfinite().all(0)]
    out = linear_attention(key, key.expand(1, 1, 2, 1), pairs[None, None], feature_map="softmax")
    expected = ((pairs[0].float() + pairs[1].float()) / 2).to(dtype)
    torch.testing.assert_close(out[0, 0, 0], expected, rtol=0, atol=atol)


@only("cpu")  # PyTorch's own products promise no such thing, and a GPU has no threads of the host's
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("feature_map", MAPS)
def test_results_do_not_depend_on_the_number_of_threads(backend, feature_map, dtype):
    data = inputs((1, 1, 1500, 2100, 16, 32), dtype)
    first, *others = on_threads(
        lambda: with_gradients(linear_attention, *data, feature_map=feature_map)
    )
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("feature_map", MAPS)
def test_every_element_is_written(backend, feature_map):
    data = inputs((1, 2, 37, 41, 19, 24))
    mask = a_mask(1, 41)
    expected = with_gradients(linear_attention, *data, feature_map=feature_map, mask=mask)
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        got = with_gradients(linear_attention, *data, feature_map=feature_map, mask=mask)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("feature_map", MAPS)
def test_opcheck(backend, feature_map, dtype):
    q, k, v, grad = inputs((2, 3, 9, 7, 8, 6), dtype)
    mask = a_mask(2, 7)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    for m in (None, mask):
        torch.library.opcheck(torch.ops.nefkern.linear_attention, (*leaves, m, feature_map, 1e-6))
    _, state, stats = torch.ops.nefkern.linear_attention(q, k, v, mask, feature_map, 1e-6)
    torch.library.opcheck(
        torch.ops.nefkern.linear_attention_backward,
        (grad, *(x.detach() for x in (q, k, v)), mask, state, stats, feature_map, 1e-6),
    )


@pytest.mark.parametrize(
    ("backend", "compiler"),
    # One run through inductor is enough: it never looks inside the operator.
    [
        *((name, "aot_eager") for name in BACKENDS),
        pytest.param(BACKENDS[0], "inductor", marks=pytest.mark.long),
    ],
    indirect=["backend"],
)
def test_compiles_without_graph_breaks(backend, compiler):
    def block(x):
        q, k, v = x.reshape(2, 12, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        out = linear_attention(q, k, v, feature_map="softmax")
        return out.transpose(1, 2).reshape(2, 12, 16)

    x = torch.randn(2, 12, 48, device=backend_device(), requires_grad=True)
    expected = block(x)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), x)
    # Inductor's cache on disk does not know when an operator's fake kernel has changed.
    with torch._inductor.config.patch(force_disable_caches=True):
        got = torch.compile(block, fullgraph=True, backend=compiler)(x)
        (gradient,) = torch.autograd.grad(got.square().sum(), x)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def _ones(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((_ones(3, 4),) * 3, {}, ValueError, r"q: expected shape .* got \[3, 4\]"),
        (([1.0],) * 3, {}, TypeError, "q: expected a torch.Tensor, got list"),
        ((_ones(1, 1, 2, 3, dtype=torch.int64),) * 3, {}, TypeError, "q: .* got int64"),
        (
            (_ones(1, 1, 2, 3), _ones(1, 1, 2, 3, dtype=torch.float64), _ones(1, 1, 2, 3)),
            {},
            TypeError,
            "k: expected the dtype of q, torch.float32, got torch.float64",
        ),
        (
            (_ones(1, 1, 2, 3), _ones(1, 1, 2, 4), _ones(1, 1, 2, 3)),
            {},
            ValueError,
            r"k: expected shape \[1, 1, M, 3\], got \[1, 1, 2, 4\]",
        ),
        (
            (_ones(1, 2, 2, 3), _ones(1, 2, 2, 3), _ones(1, 1, 2, 3)),
            {},
            ValueError,
            r"v: expected shape \[1, 2, 2, E\], got \[1, 1, 2, 3\]",
        ),
        ((_ones(1, 1, 2, 0),) * 3, {}, ValueError, "last dimension of q: expected at least 1"),
        ((_ones(1, 1, 2, 3),) * 3, {"mask": _ones(1, 2)}, TypeError, "mask: .* got float32"),
        (
            (_ones(1, 1, 2, 3),) * 3,
            {"mask": _ones(2, 2, dtype=torch.bool)},
            ValueError,
            r"mask: expected shape \[1, 2\], got \[2, 2\]",
        ),
        ((_ones(1, 1, 2, 3),) * 3, {"feature_map": "relu"}, ValueError, "feature_map: .* 'relu'"),
        ((_ones(1, 1, 2, 3),) * 3, {"eps": -1.0}, ValueError, "eps: .* got -1.0"),
        (
            (_ones(1, 1, 2, 3), _ones(1, 1, 2, 3).to("meta"), _ones(1, 1, 2, 3)),
            {},
            ValueError,
            "k: expected the device of q, cpu, got meta",
        ),
    ],
)
def test_bad_input_is_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        linear_attention(*arguments, **options)


LAYOUTS = {
    "contiguous": lambda x: x,
    "token-major": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "channels apart": lambda x: x.mT.contiguous().mT,
    "with gaps": lambda x: torch.stack((x, torch.full_like(x, math.nan)), -1)[..., 0],
    "one for all heads": lambda x: x[:, :1].expand_as(x),
}


def einsum_of_valid(q, k, v, feature_map, mask=None):
    """PyTorch's own; NaN for "softmax" where no key counts."""
    if mask is not None:
        k = k.masked_fill(~mask[:, None, :, None], -math.inf)
    return einsum_attention(q, k, v, feature_map)


def assert_as_near_as_pytorch(got, theirs, exact, roundings, floor):
    """Largest errors against those of PyTorch in the same dtype, and some roundings.

    Among few values PyTorch's may all be exact by chance. What cancels in dk is as large as dv.
    """
    out, dq, dk, dv = (x.abs().max().clamp(min=floor) for x in exact)
    scales = {"out": out, "dq": dq, "dk": torch.maximum(dk, dv), "dv": dv}
    for (name, scale), a, b, truth in zip(scales.items(), got, theirs, exact, strict=True):
        assert a.shape == truth.shape, name
        error, allowed = ((x.double() - truth).abs().max() for x in (a, b.nan_to_num()))
        allowed = 1.5 * allowed + roundings * torch.finfo(a.dtype).eps * scale
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def check_random_inputs(data, name, largest):
    """Any sizes, dtype, strides of each tensor, mask or none."""
    sizes = [data.draw(st.integers(1, limit)) for limit in (2, 3, *[largest] * 4)]
    seed = data.draw(st.integers(0, 99))
    masked = data.draw(st.booleans())
    dtype = data.draw(st.sampled_from((torch.float32, *HALVES)))
    layouts = [LAYOUTS[data.draw(st.sampled_from(list(LAYOUTS)))] for _ in range(4)]
    with nefkern.backend(name):
        options = {
            "feature_map": data.draw(st.sampled_from(MAPS)),
            "mask": a_mask(sizes[0], sizes[3], seed) if masked else None,
        }
        contiguous = inputs(sizes, dtype, seed, scale=1.0)
        tensors = [lay(x) for lay, x in zip(layouts, contiguous, strict=True)]
        expected = with_gradients(naive, *tensors, **options)
        got = with_gradients(linear_attention, *tensors, **options)
        assert all(x.dtype == dtype for x in got)
        # Gradients of the maps are sums of grad · v that may cancel to nothing: one key has all the
        # attention whatever it is.
        _, _, v, grad = (x.float() for x in tensors)
        floor = max(1.0, 0.1 * (grad.abs() @ v.abs().mT).max().item())
        if dtype == torch.float32:
            return assert_near(got, expected, 2e-5, floor)
        theirs = with_gradients(einsum_of_valid, *tensors, **options)
        # Four where the factors of the products are rounded too, not the result alone.
        roundings = 4 if rounds_factors(name, dtype) else 1
        assert_as_near_as_pytorch(got, theirs, expected, roundings, floor)


@pytest.mark.parametrize("name", backends_of("linear_attention", compiled=True))
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_property_random_inputs(name, data):
    check_random_inputs(data, name, largest=70)


@pytest.mark.skipif("triton" not in BACKENDS, reason=str(backends.why_not("triton")))
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_property_tiny_inputs_on_triton(data):
    check_random_inputs(data, "triton", largest=20)


@pytest.mark.skipif("triton" not in BACKENDS, reason=str(backends.why_not("triton")))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_triton_kernels_leave_wider_heads_to_the_next_backend(monkeypatch, dtype):
    widest = 128

    def chosen(d, e):
        q, k, v, grad = inputs((1, 1, 3, 2, d, e), dtype)
        rest = (None, "elu", 1e-6)
        state, stats = q.new_zeros(1, 1, d, e), q.new_zeros(1, 1, 2, d)
        return (
            registry.select("linear_attention", q, k, v, *rest),
            registry.select(
                "linear_attention_backward", grad, q, k, v, None, state, stats, *rest[1:]
            ),
        )

    own = (reference.linear_attention, reference.linear_attention_backward)
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(backends._PREFERENCE, device, ("triton", "reference"))
    assert not set(chosen(widest, widest)) & set(own)
    assert chosen(widest + 1, widest) == chosen(widest, widest + 1) == own
    q, k, v, _ = inputs((1, 1, 3, 2, widest + 1, 4), dtype)
    refused = "linear_attention: backend 'triton' cannot take this call"
    with nefkern.backend("triton"), pytest.raises(RuntimeError, match=refused):
        linear_attention(q, k, v)


@pytest.mark.long
@pytest.mark.skipif("cpu" not in BACKENDS, reason="the extension is not built")
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa):
    """(The suite itself runs the best.)"""
    tests = "attention_matrix or half_precisions or no_worse or large_and_tiny or exp_is or strides"
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", f"cpu and ({tests})"]
    run = subprocess.run(
        [*command, "-p", "no:cacheprovider"],
        env={**os.environ, "NEFKERN_ISA": isa},
        capture_output=True,
        check=False,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
