"""Nothing in spmm, neuralef_loss and linear_attention waits for the host, forward or backward.

Traced with fake tensors on a GPU that need not exist, which refuse to be read; and, where there is
one, captured into a CUDA graph and replayed on other data.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

pytest.importorskip("triton")
from nefkern.ops import linear_attention, neuralef_loss, registry, spmm
from nefkern.ops.csr import check_content
from nefkern.reference.neuralef_loss import neuralef_loss_backward
from nefkern.triton import linear_attention as attention_kernels
from nefkern.triton import spmm as spmm_kernels
from nefkern.triton.rates import GPUS
from tests.ops.graph_common import random_graph

FEATURE_MAPS = ("elu", "softmax")
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:]
)


# ---- traced with fake tensors ----


class Launch:
    """In place of a kernel: notes that it was launched."""

    def __init__(self, name, kernel, launched):
        self.name, self.launched = name, launched
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid):
        return lambda *args, **options: self.launched.append(self.name)


@pytest.fixture
def launched(monkeypatch):
    """Fake tensors, and kernels that are only noted: the list of their names."""
    found = []
    kernels = {
        spmm_kernels: ("_tuned", "_expand_kernel"),
        attention_kernels: ("_sum_keys", "_join_keys", "_answer_queries", "_query_gradients",
                            "_join_gradients", "_key_gradients"),
    }  # fmt: skip
    for module, names in kernels.items():
        monkeypatch.setattr(module, "device_of", lambda tensor: contextlib.nullcontext())
        for name in names:
            monkeypatch.setattr(module, name, Launch(name, getattr(module, name), found))
    monkeypatch.setattr(spmm_kernels, "rates_of", lambda device: GPUS["sm_90"])
    with FakeTensorMode():
        yield found


def fake_graph(n=100, entries=2000):
    offsets = torch.empty(n + 1, dtype=torch.int64, device="cuda")
    columns = torch.empty(entries, dtype=torch.int32, device="cuda")
    return offsets, columns, torch.empty(entries, device="cuda")


def implementation(name):
    """What the Triton backend runs for an operator."""
    return registry._kernels[name]["triton"][0]


def test_a_read_would_be_seen(launched):
    with pytest.raises(DataDependentOutputException):
        check_content(*fake_graph()[:2])


def assert_spmm_is_traced(dtype):
    """Its backward pass is the same product."""
    x = torch.empty(100, 20, dtype=dtype, device="cuda")
    y = implementation("spmm")(*fake_graph(), x, True)
    assert (y.shape, y.dtype, y.device.type) == (x.shape, x.dtype, "cuda")


@each_dtype
def test_spmm_reads_nothing(launched, dtype):
    assert_spmm_is_traced(dtype)
    assert launched == ["_tuned"]


def test_spmm_by_dense_rows_reads_nothing(launched, monkeypatch):
    monkeypatch.setattr(spmm_kernels, "prefers_dense", lambda *args: True)
    monkeypatch.setattr(spmm_kernels, "dense_rows", lambda n: 60)
    assert_spmm_is_traced(torch.bfloat16)
    assert launched == ["_expand_kernel", "_expand_kernel"]


@each_dtype
def test_neuralef_loss_reads_nothing(launched, dtype):
    psi = torch.empty(100, 20, dtype=dtype, device="cuda")
    loss, r, y = implementation("neuralef_loss")(*fake_graph(), psi, 0.1, 0.01)
    gradient = neuralef_loss_backward(torch.ones_like(loss), y, r, 0.1, 0.01)
    assert loss.shape == ()
    assert gradient.shape == psi.shape
    assert launched == ["_tuned"]


@each_dtype
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_linear_attention_reads_nothing(launched, dtype, feature_map, masked):
    q, k, v = torch.empty(3, 2, 4, 300, 64, dtype=dtype, device="cuda")
    mask = torch.empty(2, 300, dtype=torch.bool, device="cuda") if masked else None
    out, *kept = implementation("linear_attention")(q, k, v, mask, feature_map, 1e-6)
    gradients = implementation("linear_attention_backward")(
        out, q, k, v, mask, *kept, feature_map, 1e-6
    )
    assert [g.shape for g in gradients] == [q.shape, k.shape, v.shape]
    assert launched == ["_sum_keys", "_join_keys", "_answer_queries",
                        "_query_gradients", "_join_gradients", "_key_gradients"]  # fmt: skip


# ---- captured ----

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="a CUDA graph needs a GPU: PyTorch finds no CUDA device"
)


def replayed(function, *inputs):
    """What a captured ``function`` gives for the inputs doubled, and what it gives directly."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles and tunes first: that may wait
        for _ in range(2):
            function(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function(*inputs)
    with torch.no_grad():
        for x in inputs:
            x.mul_(2)
    graph.replay()
    return results, function(*inputs)


def with_gradients(operator):
    """The operator's first result, and its gradients by all inputs."""

    def run(*inputs):
        out = operator(*inputs)
        return out, *torch.autograd.grad(out.square().sum(), inputs)

    return run


def assert_same(function, *inputs):
    for again, expected in zip(*replayed(function, *inputs), strict=True):
        assert torch.equal(again, expected)


def on_gpu(*shape, dtype=torch.float32):
    return torch.randn(*shape, device="cuda").to(dtype).requires_grad_()


@needs_gpu
@each_dtype
def test_capture_of_spmm(dtype):
    graph = random_graph(300, 20).to("cuda")
    assert_same(with_gradients(lambda x: spmm(graph, x)), on_gpu(300, 64, dtype=dtype))


@needs_gpu
def test_capture_of_spmm_by_dense_rows(monkeypatch):
    monkeypatch.setattr(spmm_kernels, "prefers_dense", lambda *args: True)
    graph = random_graph(300, 20).to("cuda")
    x = on_gpu(300, 64, dtype=torch.bfloat16)
    assert_same(with_gradients(lambda x: spmm(graph, x)), x)


@needs_gpu
@each_dtype
def test_capture_of_neuralef_loss(dtype):
    graph = random_graph(300, 20).to("cuda")
    operator = with_gradients(lambda psi: neuralef_loss(psi, graph, 0.1)[0])
    assert_same(operator, on_gpu(300, 64, dtype=dtype))


@needs_gpu
@each_dtype
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_capture_of_linear_attention(dtype, feature_map):
    inputs = [on_gpu(2, 3, 200, 64, dtype=dtype) for _ in range(3)]
    operator = with_gradients(lambda q, k, v: linear_attention(q, k, v, feature_map=feature_map))
    assert_same(operator, *inputs)
