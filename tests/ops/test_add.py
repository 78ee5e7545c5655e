from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nefkern import backend
from nefkern.ops import CSRGraph, add
from tests.ops.graph_common import backends_of, moved, on_threads, random_graph

each_backend = pytest.mark.parametrize("name", backends_of("add"))


def total_by(name, a, b, alpha):
    """The sum that backend ``name`` makes, on the CPU."""
    a, b = moved(name, a, b)
    with backend(name):
        return add(a, b, alpha).to("cpu")


def pattern(graph: CSRGraph):
    return graph.to_dense().ne(0)


@each_backend
@pytest.mark.parametrize("n", [0, 1, 2, 33, 130])
@pytest.mark.parametrize("alpha", [0.3, -2.0, 0.0])
def test_equals_dense_sum(name, n, alpha, poisoned_memory):
    a, b = random_graph(n, 5, 1), random_graph(n, 9, 2, symmetric=False)
    total = total_by(name, a, b, alpha).validate()
    assert not total.symmetric
    exact = a.to_dense().double() + alpha * b.to_dense().double()
    torch.testing.assert_close(total.to_dense().double(), exact, rtol=1e-6, atol=1e-7)
    assert total.nnz == (pattern(a) | pattern(b)).sum()


@each_backend
def test_symmetry_and_dtype(name):
    a, b = random_graph(20, 4, 1), random_graph(20, 4, 2)
    assert total_by(name, a, b, 0.3).validate().symmetric
    assert total_by(name, a, a, -1.0).nnz == a.nnz  # cancelled places stay stored
    wide = random_graph(20, 4, 2, dtype=torch.float64)
    total = add(a, wide, 0.3)
    assert total.dtype == torch.float64
    torch.testing.assert_close(total.to_dense(), a.to_dense().double() + 0.3 * wide.to_dense())


@each_backend
@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(0, 25), one=st.integers(0, 12), two=st.integers(0, 12), seed=st.integers(0, 99)
)
def test_any_graphs(name, n, one, two, seed):
    a, b = random_graph(n, one, seed), random_graph(n, two, seed + 1, symmetric=False)
    exact = a.to_dense().double() + 0.3 * b.to_dense().double()
    total = total_by(name, a, b, 0.3).validate()
    torch.testing.assert_close(total.to_dense().double(), exact, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", backends_of("add", compiled=True))
def test_result_does_not_depend_on_threads(name):
    a, b = random_graph(700, 30, 1), random_graph(700, 9, 2, symmetric=False)
    first, *others = on_threads(lambda: total_by(name, a, b, 0.3).tensors())
    for other in others:
        assert all(torch.equal(x, y) for x, y in zip(first, other, strict=True))


@each_backend
def test_opcheck(name):
    a, b = moved(name, random_graph(6, 3, 1), random_graph(6, 3, 2))
    with backend(name):
        torch.library.opcheck(torch.ops.nefkern.add, (*a.tensors(), *b.tensors(), 0.3))


@each_backend
def test_fullgraph_compile(name):
    a, b = moved(name, random_graph(12, 3, 1), random_graph(12, 3, 2))
    compiled = torch.compile(lambda a, b: add(a, b, 0.3), fullgraph=True, backend="aot_eager")
    with backend(name):
        assert torch.equal(compiled(a, b).to_dense(), add(a, b, 0.3).to_dense())


@each_backend
@pytest.mark.parametrize("offsets", [[0, 3, 2], [1, 1, 2], [0, 1, 1], [0, -1, 2], [0, 1, 9]])
def test_offsets_that_contradict_the_entries_are_never_followed(name, offsets):
    good = CSRGraph.from_torch(torch.ones(2, 2) - torch.eye(2))
    bad = CSRGraph(torch.tensor(offsets), good.columns, good.values, 2)
    for a, b in ((good, bad), (bad, good)):
        with pytest.raises(ValueError, match="graph: expected row_offsets"):
            total_by(name, a, b, 0.3)


def test_bad_arguments():
    a = random_graph(5, 2)
    with pytest.raises(TypeError, match="graph_b: expected a CSRGraph, got Tensor"):
        add(a, a.to_dense(), 0.3)
    with pytest.raises(ValueError, match="graph_b: expected 5 nodes"):
        add(a, random_graph(6, 2), 0.3)
    with pytest.raises(ValueError, match="graph_b: expected device cpu"):
        add(a, a.to("meta"), 0.3)
    with pytest.raises(ValueError, match="alpha: expected a finite number"):
        add(a, a, math.nan)
