from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nefkern import backend, ops
from nefkern.ops import CSRGraph
from tests.ops.graph_common import (
    HALF,
    assert_half_close,
    backend_device,
    backends_of,
    moved,
    on_backend_device,
    on_threads,
    random_graph,
)

spmm, quadratic_form, neuralef_loss = (
    on_backend_device(op) for op in (ops.spmm, ops.quadratic_form, ops.neuralef_loss)
)
BACKENDS = backends_of("spmm")
each_backend = pytest.mark.parametrize("name", BACKENDS)


def float32_error(graph, x):
    """Entry by entry, the largest error that float32 sums of these terms may have."""
    bound = graph.to_dense().double().abs() @ x.double().abs()
    return (graph.nnz / max(graph.num_nodes, 1) + 4) * torch.finfo(torch.float32).eps * bound


@each_backend
@pytest.mark.parametrize("n", [0, 1, 7, 100, 300])
@pytest.mark.parametrize("k", [0, 1, 3, 16, 37, 64, 130, 256])
def test_equals_dense_product(name, n, k, poisoned_memory):
    graph = random_graph(n, 8, symmetric=False)
    x = torch.randn(n, k, generator=torch.Generator().manual_seed(3))
    with backend(name):
        y = spmm(graph, x)
    exact = graph.to_dense().double() @ x.double()
    assert y.dtype == torch.float32
    assert y.is_contiguous()
    assert ((y.double() - exact).abs() <= float32_error(graph, x)).all()


@each_backend
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("k", [1, 31, 32, 100, 256])
def test_half_precision_is_rounded_once(name, dtype, k):
    graph = random_graph(120, 30)
    x = torch.randn(120, k, generator=torch.Generator().manual_seed(3)).to(dtype)
    with backend(name):
        y = spmm(graph, x)
    assert y.dtype == dtype
    assert_half_close(y, graph.to_dense().double() @ x.double(), dtype)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides(name, dtype):
    graph = random_graph(60, 8)
    x = torch.randn(120, 90, generator=torch.Generator().manual_seed(3))
    x = x.to(backend_device(name), dtype)
    with backend(name):
        expected = spmm(graph, x[::2, 3:40].contiguous())
        assert torch.equal(spmm(graph, x[::2, 3:40]), expected)
        assert torch.equal(spmm(graph, x[::2, 3:40].T.contiguous().T), expected)
        assert torch.equal(spmm(graph, x[:1, 3:40].expand(60, 37)),
                           spmm(graph, x[:1, 3:40].repeat(60, 1)))  # fmt: skip


@each_backend
def test_strides_of_the_graph(name):
    (graph,) = moved(name, random_graph(40, 8))
    apart = [torch.stack([y, y + 1], 1)[:, 0] for y in graph.tensors()]
    strided = CSRGraph(*apart, graph.num_nodes, graph.symmetric)
    assert not any(y.is_contiguous() for y in strided.tensors())
    x = torch.randn(40, 20)
    for call in (spmm, lambda g, x: quadratic_form(x, g), lambda g, x: neuralef_loss(x, g, 0.1)[1]):
        with backend(name):
            torch.testing.assert_close(call(strided, x), call(graph, x), rtol=1e-5, atol=1e-4)


def test_float64():
    graph = random_graph(50, 8, dtype=torch.float64, symmetric=False)
    x = torch.randn(50, 9, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(spmm(graph, x), graph.to_dense() @ x, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(spmm(graph, x.float()), (graph.to_dense() @ x).float())
    assert torch.autograd.gradcheck(lambda x: spmm(graph, x), x)
    assert torch.autograd.gradgradcheck(lambda x: spmm(graph, x), x)


@each_backend
@pytest.mark.parametrize("symmetric", [True, False])
def test_gradient(name, symmetric):
    graph = random_graph(80, 8, symmetric=symmetric)
    x = torch.randn(80, 20, requires_grad=True)
    grad = torch.randn(80, 20)
    with backend(name):
        spmm(graph, x).backward(grad)
    exact = graph.to_dense().double().T @ grad.double()
    torch.testing.assert_close(x.grad.double(), exact, rtol=1e-5, atol=1e-5)


@each_backend
@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(0, 30), per_row=st.integers(0, 30), k=st.integers(0, 70), seed=st.integers(0, 99)
)
def test_any_shape(name, n, per_row, k, seed):
    graph = random_graph(n, per_row, seed, symmetric=False)
    x = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    exact = graph.to_dense().double() @ x.double()
    with backend(name):
        assert ((spmm(graph, x).double() - exact).abs() <= float32_error(graph, x)).all()


@each_backend
@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 30), k=st.integers(1, 70), seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, *HALF]), steps=st.tuples(*[st.integers(1, 3)] * 2),
    transposed=st.booleans(), symmetric=st.booleans(),
)  # fmt: skip
def test_any_strides_and_gradient(name, n, k, seed, dtype, steps, transposed, symmetric):
    graph = random_graph(n, 6, seed, symmetric=symmetric)
    generator = torch.Generator().manual_seed(seed)
    full = torch.randn(n * steps[0], k * steps[1], generator=generator).to(dtype)
    full = full.T.contiguous().T if transposed else full
    x, grad = full[:: steps[0], :: steps[1]], torch.randn(n, k, generator=generator).to(dtype)
    dense = graph.to_dense().double()
    leaf = x.detach().requires_grad_()
    with backend(name):
        y = spmm(graph, leaf)
        y.backward(grad)
    for got, exact in ((y.detach(), dense @ x.double()), (leaf.grad, dense.T @ grad.double())):
        if dtype == torch.float32:
            torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)
        else:
            assert_half_close(got, exact, dtype)


@pytest.mark.parametrize("name", backends_of("spmm", compiled=True))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_does_not_depend_on_threads(name, dtype):
    graph = random_graph(500, 30)
    x = torch.randn(500, 72).to(dtype)
    with backend(name):
        first, *others = on_threads(lambda: spmm(graph, x))
    for other in others:
        assert torch.equal(first, other)


@each_backend
def test_opcheck(name):
    (graph,) = moved(name, random_graph(12, 3, symmetric=False))
    with backend(name):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(12, 5, dtype=dtype, device=graph.device, requires_grad=True)
            torch.library.opcheck(torch.ops.nefkern.spmm, (*graph.tensors(), x, False))


@each_backend
def test_fullgraph_compile_with_gradient(name):
    (graph,) = moved(name, random_graph(12, 3, symmetric=False))
    compiled = torch.compile(ops.spmm, fullgraph=True, backend="aot_eager")
    x = torch.randn(12, 5, device=graph.device, requires_grad=True)
    with backend(name):
        y = compiled(graph, x)
        y.sum().backward()
        assert torch.equal(y, ops.spmm(graph, x))
    torch.testing.assert_close(x.grad, graph.to_dense().T @ torch.ones_like(x))


@each_backend
def test_autocast_and_inference_mode(name):
    (graph,) = moved(name, random_graph(12, 3))
    x = torch.randn(12, 5, device=graph.device)
    with backend(name), torch.inference_mode(), torch.autocast(x.device.type, torch.bfloat16):
        assert ops.spmm(graph, x).dtype == torch.float32  # as given: autocast leaves it alone


@each_backend
@pytest.mark.parametrize(
    ("offsets", "columns"),
    [([0, 1, 2], [0, 2]), ([0, 1, 2], [0, -1]), ([0, 3, 2], [0, 1]), ([1, 1, 2], [0, 1])],
)
def test_a_graph_that_contradicts_itself_is_never_followed(name, offsets, columns):
    """On a GPU, where nothing waits for a check, such entries count as absent instead."""
    graph = CSRGraph(
        torch.tensor(offsets), torch.tensor(columns, dtype=torch.int32), torch.ones(2), 2, True
    )
    x = torch.ones(2, 20)
    for call in (
        lambda: spmm(graph, x),
        lambda: quadratic_form(x, graph),
        lambda: neuralef_loss(x, graph, 0.1)[1],
    ):
        with backend(name):
            if backend_device() == "cuda":
                assert set(call().unique().tolist()) <= {0.0, 1.0, 2.0}
                continue
            with pytest.raises(ValueError, match="graph: expected row_offsets"):
                call()


@pytest.mark.parametrize("name", [n for n in BACKENDS if n != "reference"])
def test_fewer_values_than_columns(name):
    graph = random_graph(9, 4)
    parts = graph.row_offsets, graph.columns, graph.values[:-1]
    with backend(name), pytest.raises(ValueError, match=r"values: expected .* as columns has"):
        spmm(CSRGraph(*parts, 9, True), torch.ones(9, 3))


def test_bad_arguments():
    graph, spmm = random_graph(5, 2), ops.spmm
    with pytest.raises(TypeError, match="graph: expected a CSRGraph, got Tensor"):
        spmm(graph.to_dense(), torch.zeros(5, 2))
    with pytest.raises(TypeError, match="x: expected a dense tensor, got"):
        spmm(graph, torch.zeros(5, 2).to_sparse())
    with pytest.raises(TypeError, match="x: expected float32, float64, float16 or bfloat16"):
        spmm(graph, torch.zeros(5, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"x: expected shape \[5, K\] .* got \[4, 2\]"):
        spmm(graph, torch.zeros(4, 2))
    with pytest.raises(ValueError, match="x: expected device cpu"):
        spmm(graph, torch.zeros(5, 2, device="meta"))
