"""What only the Triton kernels of the graph have: wide keys, tiles of long rows, a largest size."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from nefkern import backend, backends
from nefkern.ops import CSRGraph, add, normalized_adjacency
from nefkern.triton import add as add_module
from nefkern.triton import normalized_adjacency as adjacency_module
from tests.ops.graph_common import moved, random_graph, random_lists

pytestmark = pytest.mark.skipif(
    backends.why_not("triton") is not None, reason=str(backends.why_not("triton"))
)


def build(name, indices, weights, symmetrize="mean") -> CSRGraph:
    indices, weights = moved(name, indices, weights)
    with backend(name):
        graph = normalized_adjacency(
            indices, weights, num_nodes=len(indices), symmetrize=symmetrize
        )
    return graph.to("cpu")


def lists_with_a_hub(n, k):
    """Node 3 is in all lists, and in its own and node 5's over and over."""
    indices, weights = random_lists(n, k)
    indices[:, 0] = 3
    indices[3, : k // 2] = 5
    indices[5] = 3
    return indices, weights


def assert_close(found: CSRGraph, expected: CSRGraph):
    assert torch.equal(found.row_offsets, expected.row_offsets)
    assert torch.equal(found.columns, expected.columns)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("symmetrize", ["mean", "union"])
@pytest.mark.parametrize("weighted", [True, False])
def test_rows_of_many_tiles(monkeypatch, symmetrize, weighted):
    indices, weights = lists_with_a_hub(20, 24)
    weights = weights if weighted else None
    expected = build("reference", indices, weights, symmetrize)
    monkeypatch.setattr(adjacency_module, "BLOCK", 16)
    assert_close(build("triton", indices, weights, symmetrize).validate(), expected)


def test_keys_of_64_bits(monkeypatch):
    indices, weights = lists_with_a_hub(30, 12)
    assert adjacency_module._key_dtype(46340) == torch.int32  # 46340^2 < 2^31 < 46341^2
    assert adjacency_module._key_dtype(46341) == torch.int64
    narrow = build("triton", indices, weights)
    monkeypatch.setattr(adjacency_module, "_key_dtype", lambda num_nodes: torch.int64)
    wide = build("triton", indices, weights)
    assert all(torch.equal(a, b) for a, b in zip(wide.tensors(), narrow.tensors(), strict=True))


def test_more_edges_than_can_be_sorted_are_left_to_another_backend(monkeypatch):
    indices, weights = random_lists(5, 4)
    monkeypatch.setattr(adjacency_module, "MAX_EDGES", 20)
    build("triton", indices, weights)
    monkeypatch.setattr(adjacency_module, "MAX_EDGES", 19)
    with pytest.raises(RuntimeError, match="backend 'triton' cannot take this call"):
        build("triton", indices, weights)


@pytest.mark.parametrize("per_row", [(9, 2), (2, 9), (9, 9)])
def test_sums_of_rows_of_many_tiles(monkeypatch, per_row):
    a, b = (random_graph(24, size, seed, symmetric=False) for seed, size in enumerate(per_row))
    with backend("reference"):
        expected = add(a, b, 0.3)
    monkeypatch.setattr(add_module, "BLOCK", 4)
    with backend("triton"):
        assert_close(add(*moved("triton", a, b), 0.3).to("cpu").validate(), expected)


def test_a_row_that_breaks_its_promise_spoils_no_other():
    """Columns that don't ascend give a wrong sum, and write nowhere else."""
    a = random_graph(12, 6, 1, symmetric=False)
    b = random_graph(12, 6, 2, symmetric=False)
    row = int(a.row_offsets.diff().argmax())
    own = slice(*a.row_offsets[row : row + 2].tolist())
    for order in ("descending", "the same"):
        columns = a.columns.clone()
        columns[own] = columns[own].flip(0) if order == "descending" else columns[own][0]
        broken = CSRGraph(a.row_offsets, columns, a.values, 12)
        with backend("triton"):
            found = add(*moved("triton", broken, b), 0.3).to("cpu")
        with backend("reference"):
            expected = add(a, b, 0.3)
        for i in (i for i in range(12) if i != row):
            for one, two in ((found.columns, expected.columns), (found.values, expected.values)):
                here = slice(*found.row_offsets[i : i + 2].tolist())
                there = slice(*expected.row_offsets[i : i + 2].tolist())
                torch.testing.assert_close(one[here], two[there])
