"""kappa U against torch.sparse.mm (CSR, both index types), scipy and the dense product."""

from __future__ import annotations

import warnings

import torch

from bench.graph_inputs import DENSE_ROWS, kappa, lists, psi_of, sizes_of
from nefkern.ops import spmm


def assert_right(graph, x):
    """All of kappa x against scipy in float64: float32 sums; bfloat16 rounded once."""
    found = spmm(graph, x).double()
    exact = torch.from_numpy(graph.to_scipy().astype("float64") @ x.double().numpy())
    unit = torch.finfo(x.dtype).eps
    assert (found - exact).abs().max() <= 4 * unit * exact.abs().max()


def torch_csr(graph, index_type):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.sparse_csr_tensor(
            graph.row_offsets.to(index_type),
            graph.columns.to(index_type),
            graph.values,
            (graph.num_nodes,) * 2,
        )


def test_spmm(race, size):
    graph = kappa(*lists(size))
    x = psi_of(size, graph)
    assert_right(graph, x)
    narrow, wide, rows = (
        torch_csr(graph, torch.int32),
        torch_csr(graph, torch.int64),
        graph.to_scipy(),
    )
    contestants = {
        "nefkern": lambda: spmm(graph, x),
        "torch.sparse.mm int32": lambda: torch.sparse.mm(narrow, x),
        "torch.sparse.mm int64": lambda: torch.sparse.mm(wide, x),
        "scipy.sparse": lambda: rows @ x.numpy(),
    }
    if graph.num_nodes <= DENSE_ROWS:
        dense = graph.to_dense()
        contestants["dense product"] = lambda: dense @ x
    race("spmm, float32", contestants, sizes=sizes_of(size, graph))


def test_spmm_bfloat16(race, size):
    graph = kappa(*lists(size))
    x = psi_of(size, graph).bfloat16()
    assert_right(graph, x)
    contestants = {
        "nefkern": lambda: spmm(graph, x),
        "nefkern float32": lambda: spmm(graph, x.float()),
    }
    if graph.num_nodes <= DENSE_ROWS:
        dense = graph.to_dense().bfloat16()
        contestants["dense product bfloat16"] = lambda: dense @ x
    race("spmm, bfloat16", contestants, sizes=sizes_of(size, graph))
