"""Scalar products at a graph's places: every backend against the dense product."""

from __future__ import annotations

import pytest
import torch

from nefkern import backend, ops
from tests.ops.graph_common import backend_device, backends_of, moved, on_threads, random_graph

each_backend = pytest.mark.parametrize("name", backends_of("sddmm"))


def places(graph):
    rows = torch.arange(graph.num_nodes).repeat_interleave(graph.row_offsets.diff())
    return rows, graph.columns.long()


def dense(graph, x, y):
    return (x.double() @ y.double().T)[places(graph)]


def run(name, graph, x, y):
    graph, x, y = moved(name, graph, x, y)
    with backend(name):
        return ops.sddmm(graph, x, y).cpu()


@each_backend
@pytest.mark.parametrize(("n", "k"), [(40, 1), (70, 7), (65, 16), (33, 37), (300, 256), (9, 0)])
def test_equals_the_dense_product(name, n, k, poisoned_memory):
    graph, x, y = random_graph(n, 6, symmetric=False), torch.randn(n, k), torch.randn(n, k)
    found = run(name, graph, x, y)
    assert found.dtype == torch.float32
    scale = (x.abs() @ y.abs().T).amax() if k else 0
    assert (found.double() - dense(graph, x, y)).abs().max() <= 3e-7 * scale


@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(name, dtype):
    graph = random_graph(60, 6)
    x, y = torch.randn(60, 33).to(dtype), torch.randn(33, 60).to(dtype).T
    torch.testing.assert_close(
        run(name, graph, x, y).double(), dense(graph, x, y), rtol=1e-5, atol=1e-5
    )


@each_backend
def test_exchanged_operands_give_the_transposed_bits(name):
    graph, x, y = random_graph(90, 9), torch.randn(90, 45), torch.randn(90, 45)
    forth, back = run(name, graph, x, y), run(name, graph, y, x)
    there = ops.CSRGraph(graph.row_offsets, graph.columns, forth, 90)
    assert torch.equal(there.transpose().values, back)


@pytest.mark.parametrize("name", backends_of("sddmm", compiled=True))
def test_does_not_depend_on_threads(name):
    graph, x = random_graph(700, 30), torch.randn(700, 50)
    first, *others = on_threads(lambda: run(name, graph, x, x))
    assert all(torch.equal(first, other) for other in others)


@each_backend
def test_empty(name):
    assert run(name, random_graph(0, 3), torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0,)


@each_backend
def test_opcheck(name):
    graph, x, y = moved(name, random_graph(12, 3), torch.randn(12, 5), torch.randn(12, 5))
    x.requires_grad_()
    with backend(name):
        torch.library.opcheck(torch.ops.nefkern.sddmm, (graph.row_offsets, graph.columns, x, y))


@each_backend
@pytest.mark.parametrize("column", [-1, 4])
def test_a_column_out_of_range_is_never_followed(name, column):
    offsets = torch.tensor([0, 1, 2, 2, 2])
    columns = torch.tensor([1, column], dtype=torch.int32)
    graph, x = ops.CSRGraph(offsets, columns, torch.ones(2), 4), torch.ones(4, 3)
    if backend_device(name) == "cuda":  # where nothing waits for a check
        assert run(name, graph, x, x).tolist() == [3, 0]
        return
    with pytest.raises(ValueError, match="graph: expected row_offsets"):
        run(name, graph, x, x)


def test_bad_arguments():
    graph, x = random_graph(5, 2), torch.ones(5, 3)
    with pytest.raises(ValueError, match=r"y: expected shape \[5, 3\] \(x's\), got \[5, 2\]"):
        ops.sddmm(graph, x, torch.ones(5, 2))
    with pytest.raises(ValueError, match=r"x: expected shape \[5, K\]"):
        ops.sddmm(graph, torch.ones(4, 3), x)
    with pytest.raises(TypeError, match="y: expected float32"):
        ops.sddmm(graph, x, x.int())
