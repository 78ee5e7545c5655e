"""Nothing in spmm, neuralef_loss and linear_attention waits for the host, forward or backward.

Traced with fake tensors on a GPU that need not exist, which refuse to be read; and, where there is
one, captured into a CUDA graph and replayed on other data.
"""

from __future__ import annotations

import contextlib
import sys
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
from nefkern import backend, backends
from nefkern.backends import interpreting
from nefkern.ops import (
    add,
    kappa,
    linear_attention,
    neuralef_loss,
    normalized_adjacency,
    registry,
    spmm,
)
from nefkern.reference.csr import check_content, transpose
from nefkern.reference.neuralef_loss import neuralef_loss_backward
from nefkern.triton import add as add_kernels
from nefkern.triton import knn as knn_kernels
from nefkern.triton import knn_estimates
from nefkern.triton import linear_attention as attention_kernels
from nefkern.triton import normalized_adjacency as adjacency_kernels
from nefkern.triton import spmm as spmm_kernels
from tests.ops.graph_common import moved, random_graph, random_lists

needs_triton = pytest.mark.skipif(
    backends.why_not("triton") is not None, reason=str(backends.why_not("triton"))
)
FEATURE_MAPS = ("elu", "softmax")
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:]
)


# ---- traced with fake tensors ----


#: What a launch may have of programs along each axis.
GRID = (2**31 - 1, 65_535, 65_535)
#: The smallest tiles, for grids that depend on them.
TILE = {"BLOCK_K": 64, "BM": 64, "BN": 128}


class Launch:
    """In place of a kernel: notes that it was launched, with a grid that a GPU takes."""

    def __init__(self, name, kernel, launched):
        self.name, self.launched = name, launched
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid):
        sizes = grid(TILE) if callable(grid) else grid
        assert all(0 < size <= most for size, most in zip(sizes, GRID, strict=False)), self.name
        return lambda *args, **options: self.launched.append(self.name)


@pytest.fixture
def launched(monkeypatch):
    """Fake tensors, and kernels that are only noted: the list of their names."""
    found = []
    kernels = {
        spmm_kernels: ("_tuned",),
        attention_kernels: ("sum_keys", "join_keys", "answer_queries", "query_gradients",
                            "join_gradients", "key_gradients"),
        knn_kernels: ("tuned_score", "select_kernel", "rerank_kernel", "exact_kernel",
                      "select_exact_kernel", "unpack_kernel"),
        knn_estimates: ("pack_kernel",),
        adjacency_kernels: ("_write_keys", "_count_entries", "_merge_edges", "_scale_entries"),
        add_kernels: ("_count_entries", "_merge_rows"),
    }  # fmt: skip
    for module, names in kernels.items():
        monkeypatch.setattr(
            module, "device_of", lambda tensor: contextlib.nullcontext(), raising=False
        )
        for name in names:
            monkeypatch.setattr(module, name, Launch(name, getattr(module, name), found))
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


@each_dtype
@pytest.mark.parametrize("one", [True, False], ids=["one operand", "two"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", ""])
def test_backward_of_spmm_and_quadratic_form_reads_nothing(launched, dtype, one, symmetric):
    """The transposed graph included. What autograd would call, as its engine needs a driver."""
    graph, x = fake_graph(), torch.empty(100, 20, dtype=dtype, device="cuda")
    transposed = graph if symmetric else transpose(*graph)
    assert implementation("spmm")(*transposed, x, symmetric).shape == x.shape
    r, y = implementation("quadratic_form")(*graph, x, None if one else x, symmetric)
    assert (r.shape, r.dtype, y.shape) == ((20, 20), torch.float32, x.shape)
    assert launched == ["_tuned", "_tuned"]


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
    assert launched == ["sum_keys", "join_keys", "answer_queries",
                        "query_gradients", "join_gradients", "key_gradients"]  # fmt: skip


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_any_number_of_tokens_fits_a_grid(launched, feature_map):
    q = torch.empty(1, 2, 5_000_000, 64, dtype=torch.bfloat16, device="cuda")
    out, *kept = implementation("linear_attention")(q, q, q, None, feature_map, 1e-6)
    implementation("linear_attention_backward")(out, q, q, q, None, *kept, feature_map, 1e-6)
    assert len(launched) == len(set(launched)) == 6


class LargestTensor(TorchDispatchMode):
    """The bytes of the largest tensor that any operation makes."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for x in results if isinstance(results, tuple | list) else [results]:
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return results


@pytest.mark.parametrize("preselect", [True, False])
@pytest.mark.parametrize("metric", ["cosine", "euclidean", "inner_product"])
def test_knn_reads_nothing_and_holds_no_n_by_n(launched, metric, preselect):
    """The scores of 40,000 rows alone would be 6.4 GB."""
    n, k = 40_000, 16
    with LargestTensor() as largest:
        x = torch.empty(n, 64, device="cuda")
        values, indices = knn_kernels.knn(x, k, metric, None, [0, n], False, preselect=preselect)
    assert values.shape == indices.shape == (n, k)
    assert largest.bytes <= knn_kernels.WORKSPACE
    assert ("tuned_score" in launched) == preselect


def test_knn_within_images_reads_nothing(launched):
    """Offsets known to the host: the device counts them by itself."""
    x, segments = torch.empty(4 * 900, 5, device="cuda"), list(range(0, 3601, 900))
    its = sys.modules["nefkern.ops.knn"]._on_device(
        torch.empty(5, dtype=torch.int64), segments, x.device
    )
    assert its.device.type == "cuda"
    values, indices = knn_kernels.knn(x, 10, "euclidean", its, segments, False)
    assert values.shape == indices.shape == (3600, 10)


@pytest.mark.parametrize("near", [0, 3])
def test_kappa_with_room_reads_nothing(launched, near):
    indices = torch.empty(100, 7, dtype=torch.int32, device="cuda")
    pixels = torch.empty(100, near, dtype=torch.int32, device="cuda")
    weights = torch.empty(100, 7, device="cuda")
    offsets, columns, values = implementation("kappa_padded")(
        indices, weights, pixels, 100, 0.3, 0.0
    )
    assert offsets.shape == (101,)
    assert columns.shape == values.shape == (200 * (7 + near),)
    with pytest.raises(DataDependentOutputException):
        implementation("kappa")(indices, weights, pixels, 100, 0.3, 0.0, False)


# ---- one message to the host ----


@pytest.fixture
def reads(monkeypatch):
    """The list of what was read back: the name of every call that waits for a GPU."""
    found = []
    for name in ("tolist", "item", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
        method = getattr(torch.Tensor, name)

        def noted(tensor, *args, name=name, method=method, **options):
            found.append(name)
            return method(tensor, *args, **options)

        monkeypatch.setattr(torch.Tensor, name, noted)
    return found


def assemblies():
    """Calls of the operators that make graphs."""
    indices, weights = moved("triton", *random_lists(12, 3))
    (pixels,) = moved("triton", random_lists(12, 2, seed=1)[0])
    graph = moved("triton", random_graph(12, 3, 1), random_graph(12, 2, 2))
    return {
        "normalized_adjacency": lambda: normalized_adjacency(indices, weights, num_nodes=12),
        "add": lambda: add(*graph, 0.3),
        "kappa": lambda: kappa(indices, weights, pixels, num_nodes=12),
    }


@needs_triton
@pytest.mark.parametrize("operator", assemblies())
def test_a_graph_is_assembled_with_one_read_back(operator, request):
    assemble = assemblies()[operator]
    with backend("triton"):
        assemble()  # compiles
        reads = request.getfixturevalue("reads")
        assemble()
        assert reads == ["tolist"]
        if torch.cuda.is_available() and not interpreting():
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as waits:
                warnings.simplefilter("always")
                assemble()
            torch.cuda.set_sync_debug_mode("default")
            assert len(waits) == 1, [str(w.message) for w in waits]


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
