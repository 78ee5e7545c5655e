from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import scipy.sparse
import torch

from nefkern.ops import CSRGraph
from tests.ops.graph_common import random_graph


def test_conversions_agree():
    graph = random_graph(40, 5, symmetric=False).validate()
    dense = graph.to_dense()
    assert torch.equal(torch.from_numpy(graph.to_scipy().toarray()), dense)
    assert torch.equal(graph.to_torch().to_dense(), dense)
    for again in (
        CSRGraph.from_scipy(graph.to_scipy()),
        CSRGraph.from_scipy(graph.to_scipy().tocoo()),
        CSRGraph.from_torch(graph.to_torch()),
        CSRGraph.from_torch(dense),
        CSRGraph.from_torch(dense.to_sparse()),
        graph.to("cpu"),
    ):
        again.validate()
        assert not again.symmetric
        assert all(torch.equal(a, b) for a, b in zip(again.tensors(), graph.tensors(), strict=True))


def test_transpose():
    graph = random_graph(30, 4, symmetric=False)
    flipped = graph.transpose().validate()
    assert torch.equal(flipped.to_dense(), graph.to_dense().T)
    symmetric = random_graph(30, 4).validate()
    assert symmetric.transpose() is symmetric


def test_symmetry_is_found():
    assert CSRGraph.from_torch(random_graph(30, 4).to_dense()).symmetric
    assert not CSRGraph.from_torch(random_graph(30, 4, symmetric=False).to_dense()).symmetric


def test_nan_is_as_symmetric_as_any_value():
    matrix = torch.tensor([[1.0, torch.nan], [torch.nan, 0.0]])
    assert CSRGraph.from_torch(matrix).validate().symmetric
    matrix[0, 1] = 1
    assert not CSRGraph.from_torch(matrix).symmetric
    with pytest.raises(ValueError, match="symmetric: True, but"):
        CSRGraph.from_torch(matrix, symmetric=True).validate()


def test_scipy_duplicates_are_summed_and_the_argument_is_kept():
    matrix = scipy.sparse.csr_array(([1.0, 2.0, 4.0], [1, 1, 0], [0, 3, 3]), shape=(2, 2))
    assert CSRGraph.from_scipy(matrix).to_dense().tolist() == [[4.0, 3.0], [0.0, 0.0]]
    assert matrix.nnz == 3


@pytest.mark.parametrize("n", [0, 1])
def test_smallest(n):
    graph = CSRGraph.from_torch(torch.zeros(n, n)).validate()
    assert graph.nnz == 0
    assert graph.symmetric
    assert graph.to_dense().shape == graph.to_torch().shape == graph.to_scipy().shape == (n, n)
    assert graph.transpose().num_nodes == n


def make(offsets=(0, 1, 2), columns=(1, 0), values=(1.0, 1.0), n=2, symmetric=False):
    return CSRGraph(
        torch.tensor(offsets),
        torch.tensor(columns, dtype=torch.int32),
        torch.as_tensor(values),
        n,
        symmetric,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": (0, 2, 1)}, "row_offsets: expected to ascend"),
        ({"offsets": (1, 1, 2)}, "row_offsets: expected to ascend"),
        ({"columns": (2, 0)}, "columns: expected 0 to 1"),
        ({"columns": (-1, 0)}, "columns: expected 0 to 1"),
        ({"offsets": (0, 2, 2), "columns": (1, 0)}, "strictly ascending"),
        ({"offsets": (0, 2, 2), "columns": (1, 1)}, "strictly ascending"),
        ({"values": (1.0,)}, "values: expected 2 entries"),
        ({"values": (1.0, 2.0), "symmetric": True}, "symmetric: True"),
    ],
)
def test_validate_names_what_is_wrong(change, message):
    make().validate()
    with pytest.raises(ValueError, match=message):
        make(**change).validate()


def test_construction_checks_shapes_and_dtypes():
    good = make()
    with pytest.raises(TypeError, match="row_offsets: expected int64"):
        CSRGraph(good.row_offsets.int(), good.columns, good.values, 2)
    with pytest.raises(TypeError, match="columns: expected int32"):
        CSRGraph(good.row_offsets, good.columns.long(), good.values, 2)
    with pytest.raises(TypeError, match="values: expected float32"):
        CSRGraph(good.row_offsets, good.columns, good.values.half(), 2)
    with pytest.raises(ValueError, match=r"row_offsets: expected shape \[4\]"):
        CSRGraph(good.row_offsets, good.columns, good.values, 3)
    with pytest.raises(TypeError, match="symmetric: expected True or False, got str"):
        CSRGraph(*good.tensors(), 2, "no")
    assert CSRGraph(*good.tensors(), 2, np.True_).symmetric is True
    with pytest.raises(ValueError, match=r"matrix: expected shape \[N, N\]"):
        CSRGraph.from_torch(torch.zeros(2, 3))
    with pytest.raises(TypeError, match="matrix: expected a scipy sparse matrix"):
        CSRGraph.from_scipy([[0.0]])


@pytest.mark.parametrize("kind", ["complex64", "complex128"])
def test_imaginary_parts_are_refused(kind):
    matrix = scipy.sparse.csr_array(np.array([[0, 1j], [-1j, 0]], dtype=kind))
    with pytest.raises(TypeError, match=f"matrix: expected real values, got {kind}"):
        CSRGraph.from_scipy(matrix)
    dense = torch.from_numpy(matrix.toarray())
    for one in (dense, dense.to_sparse(), dense.to_sparse_csr()):
        with pytest.raises(TypeError, match=f"matrix: expected real values, got torch.{kind}"):
            CSRGraph.from_torch(one)


def test_equality_is_of_the_content():
    graph = make()
    assert graph == make()
    assert graph == copy.deepcopy(graph)
    assert graph != make(values=(1.0, 2.0))
    assert graph != make(columns=(0, 1))
    assert graph != make(offsets=(0, 2, 2))
    assert graph != make(offsets=(0, 1, 2, 2), n=3)
    assert graph != make(symmetric=True)
    assert graph != make(values=torch.ones(2, dtype=torch.float64))
    assert graph != graph.to("meta")
    assert graph != "a graph"
    assert graph in [make()]
    with pytest.raises(TypeError, match="unhashable"):
        hash(graph)


@pytest.mark.parametrize("weights_only", [True, False])
def test_save_and_load(weights_only):
    graph, file = random_graph(20, 4), io.BytesIO()
    torch.save({"kappa": graph}, file)
    file.seek(0)
    assert torch.load(file, weights_only=weights_only)["kappa"] == graph
    assert pickle.loads(pickle.dumps(graph)) == graph


def test_a_damaged_graph_is_refused_on_loading():
    graph, file = make(), io.BytesIO()
    object.__setattr__(graph, "num_nodes", 3)
    torch.save(graph, file)
    file.seek(0)
    with pytest.raises(Exception, match=r"row_offsets: expected shape \[4\]"):
        torch.load(file, weights_only=True)


def test_number_of_nodes_is_any_integer_but_no_float():
    good = make()
    for n in (np.int64(2), np.int32(2), torch.tensor(2)):
        found = CSRGraph(*good.tensors(), n).num_nodes
        assert found == 2
        assert type(found) is int
    for n in (2.0, np.float64(2), True, "2", None):
        with pytest.raises(TypeError, match="num_nodes: expected an int, got "):
            CSRGraph(*good.tensors(), n)
    with pytest.raises(TypeError, match=r"columns: expected a torch\.Tensor, got list"):
        CSRGraph(good.row_offsets, [0, 1], good.values, 2)
