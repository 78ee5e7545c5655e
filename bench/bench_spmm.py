"""kappa U against torch.sparse.mm (CSR, both index types), scipy and the dense product."""

from __future__ import annotations

import warnings

import torch

from bench.graph_inputs import DENSE_ROWS, kappa, lists, psi_of, sizes_of
from bench.harness import DEVICE, Work, on_reference
from nefkern.ops import spmm


def assert_right(graph, x):
    """All of kappa x against float64; float32 sums err no more than torch.sparse.mm's do."""
    exact = torch.from_numpy(graph.to_scipy().astype("float64") @ x.double().cpu().numpy())
    theirs = torch.sparse.mm(graph.to_torch(), x.float())

    def error(found):
        return (found.double().cpu() - exact).abs().max()

    rounding = torch.finfo(x.dtype).eps * exact.abs().max()
    assert error(spmm(graph, x)) <= 1.5 * error(theirs) + rounding


def torch_csr(graph, index_type):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.sparse_csr_tensor(
            graph.row_offsets.to(index_type),
            graph.columns.to(index_type),
            graph.values,
            (graph.num_nodes,) * 2,
        )


def work_of(graph, x):
    """kappa and x read, the product written, in x's precision."""
    name = str(x.dtype).removeprefix("torch.")
    return Work(8.0 * graph.nnz + 2.0 * x.nbytes, {name: 2.0 * graph.nnz * x.shape[1]})


def test_spmm(race, size):
    graph = kappa(*lists(size))
    x = psi_of(size, graph)
    assert_right(graph, x)
    narrow, wide = torch_csr(graph, torch.int32), torch_csr(graph, torch.int64)
    contestants = {
        "nefkern": lambda: spmm(graph, x),
        "torch.sparse.mm int32": lambda: torch.sparse.mm(narrow, x),
        "torch.sparse.mm int64": lambda: torch.sparse.mm(wide, x),
        "reference": on_reference(lambda: spmm(graph, x)),
    }
    if DEVICE.type == "cpu":
        rows = graph.to_scipy()
        contestants["scipy.sparse"] = lambda: rows @ x.numpy()
    if graph.num_nodes <= DENSE_ROWS:
        dense = graph.to_dense()
        contestants["dense product"] = lambda: dense @ x
    race("spmm, float32", contestants, sizes=sizes_of(size, graph), work=work_of(graph, x))


def test_spmm_bfloat16(race, size):
    graph = kappa(*lists(size))
    x = psi_of(size, graph).bfloat16()
    assert_right(graph, x)
    contestants = {
        "nefkern": lambda: spmm(graph, x),
        "nefkern float32": lambda: spmm(graph, x.float()),
        "reference": on_reference(lambda: spmm(graph, x)),
    }
    if graph.num_nodes <= DENSE_ROWS:
        dense = graph.to_dense().bfloat16()
        contestants["dense product bfloat16"] = lambda: dense @ x
    race("spmm, bfloat16", contestants, sizes=sizes_of(size, graph), work=work_of(graph, x))
