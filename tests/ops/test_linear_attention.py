"""linear_attention on every backend: against naive float64 formulas, and as a PyTorch operator."""

from __future__ import annotations

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
from nefkern import backends
from nefkern.ops import linear_attention, registry

MAPS = ("elu", "softmax")
HALVES = (torch.float16, torch.bfloat16)
BACKENDS = [
    name
    for name in registry.implemented()["linear_attention"]
    if not backends.why_not(name) and name != "cuda"
]
SHAPES = {  # B, H, N, M, D, E
    "head": (2, 3, 70, 70, 64, 64),
    "ragged": (1, 2, 37, 53, 19, 33),
    "wide": (1, 1, 9, 130, 72, 40),
    "one token": (3, 1, 1, 1, 64, 64),
    "one channel": (1, 2, 5, 4, 1, 1),
    "blocks": (1, 2, 40, 1100, 16, 24),
    "large head": (1, 1, 33, 35, 160, 144),
}


@pytest.fixture(params=BACKENDS)
def backend(request):
    with nefkern.backend(request.param):
        yield request.param


def skip_wide_heads(backend):
    if backend == "triton":
        pytest.skip("the Triton kernels take heads of at most 128 channels")


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
    return [x.to(dtype) for x in (q * scale, k * scale, v, grad)]


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
    return mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("feature_map", MAPS)
def test_equals_the_attention_matrix_written_out(backend, feature_map, shape, masked):
    if max(shape[4:]) > 128:
        skip_wide_heads(backend)
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
def test_half_precisions_round_only_the_result(backend, feature_map, masked, dtype):
    shape = (2, 2, 90, 85, 64, 48)
    data = inputs(shape, dtype)
    options = {"feature_map": feature_map, "mask": a_mask(2, 85) if masked else None}
    got = with_gradients(linear_attention, *data, **options)
    assert all(x.dtype == dtype for x in got)
    expected = with_gradients(naive, *(x.double() for x in data), **options)
    rounded = torch.finfo(dtype).eps / 2
    if backend == "triton" and dtype == torch.bfloat16:
        rounded += 2 * 2**-11  # two factors rounded to TF32: a quarter of the result's rounding
    assert_near(got, expected, rounded + 4e-6 + torch.finfo(dtype).smallest_normal)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("feature_map", MAPS)
def test_reads_a_fused_projection_in_place_and_writes_token_major(backend, feature_map, dtype):
    b, n, h, d = 2, 45, 3, 16
    qkv = torch.randn(b, n, 3, h, d, generator=torch.Generator().manual_seed(1)).to(dtype)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    grad = torch.ones(b, h, n, d, dtype=dtype)
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
    one = torch.ones(()).expand_as(grad)
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


@pytest.mark.parametrize("feature_map", MAPS)
def test_large_and_tiny_logits(backend, feature_map):
    """Logits from 1e-6 to 1e4, far beyond exp's range."""
    data = inputs((1, 2, 30, 600, 16, 16), scale=1.0)
    data[0] *= torch.logspace(-6, 4, 30)[:, None]
    data[1] *= torch.logspace(-6, 4, 16)
    expected = with_gradients(naive, *data, feature_map=feature_map)
    assert_near(with_gradients(linear_attention, *data, feature_map=feature_map), expected, 1e-5)


def test_exp_is_within_two_units_in_the_last_place(backend):
    """With one key, the sum of φ(k) in stats is φ(k) = exp(k) for k ≤ 0."""
    skip_wide_heads(backend)
    k = -torch.logspace(-8, math.log10(87), 100_001)[None, None, None]
    one = torch.ones(1, 1, 1, 1)
    _, _, stats = torch.ops.nefkern.linear_attention(k, k, one, None, "elu", 0.0)
    exact = k.double().exp()
    unit = torch.exp2(exact.log2().floor() - 23)
    assert ((stats[:, :, 1:].double() - exact) / unit).abs().max() <= 2


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precisions_are_read_and_rounded_like_pytorch(backend, dtype):
    """One channel and one or two equal keys: out is the mean of the values, whatever they are."""
    skip_wide_heads(backend)
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    key = torch.zeros(1, 1, 1, 1, dtype=dtype)
    out = linear_attention(key, key, numbers[None, None, None], feature_map="softmax")
    torch.testing.assert_close(out[0, 0, 0], numbers, rtol=0, atol=0, equal_nan=True)

    pairs = torch.stack((numbers, numbers.roll(-4097)))
    pairs = pairs[:, pairs.isfinite().all(0)]
    out = linear_attention(key, key.expand(1, 1, 2, 1), pairs[None, None], feature_map="softmax")
    expected = ((pairs[0].float() + pairs[1].float()) / 2).to(dtype)
    assert torch.equal(out[0, 0, 0], expected)


def test_results_do_not_depend_on_the_number_of_threads(backend):
    if backend == "reference":
        pytest.skip("PyTorch's own products promise no such thing")
    if backend == "triton":
        pytest.skip("no threads of the host's: each sum belongs to one program")
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(with_gradients(linear_attention, *inputs((1, 1, 1500, 2100, 16, 32))))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


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


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_without_graph_breaks(backend, compiler):
    if compiler == "inductor" and backend != BACKENDS[0]:
        pytest.skip("one run through inductor is enough: it never looks inside the operator")

    def block(x):
        q, k, v = x.reshape(2, 12, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        out = linear_attention(q, k, v, feature_map="softmax")
        return out.transpose(1, 2).reshape(2, 12, 16)

    x = torch.randn(2, 12, 48, requires_grad=True)
    expected = block(x)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), x)
    # Inductor's cache on disk does not know when an operator's fake kernel has changed.
    with torch._inductor.config.patch(force_disable_caches=True):
        got = torch.compile(block, fullgraph=True, backend=compiler)(x)
        (gradient,) = torch.autograd.grad(got.square().sum(), x)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_no_second_derivative(backend):
    q, k, v, _ = inputs((1, 1, 3, 3, 4, 4))
    q.requires_grad_()
    (gradient,) = torch.autograd.grad(linear_attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        gradient.sum().backward()


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


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_property_random_shapes(data):
    sizes = [data.draw(st.integers(1, limit)) for limit in (2, 3, 70, 70, 70, 70)]
    seed = data.draw(st.integers(0, 99))
    options = {
        "feature_map": data.draw(st.sampled_from(MAPS)),
        "mask": a_mask(sizes[0], sizes[3], seed) if data.draw(st.booleans()) else None,
    }
    tensors = inputs(sizes, seed=seed, scale=1.0)
    expected = with_gradients(naive, *tensors, **options)
    for name in BACKENDS:
        if name == "triton" and backends.interpreting():
            continue  # 40 examples would take the interpreter minutes
        with nefkern.backend(name):
            got = with_gradients(linear_attention, *tensors, **options)
            assert_near(got, expected, 3e-5, floor=1.0)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the extension is not built")
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa):
    """(The suite itself runs the best.)"""
    tests = "attention_matrix or half_precisions or large_and_tiny or exp_is"
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", f"cpu and ({tests})"]
    run = subprocess.run(
        [*command, "-p", "no:cacheprovider"],
        env={**os.environ, "NEFKERN_ISA": isa},
        capture_output=True,
        check=False,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
