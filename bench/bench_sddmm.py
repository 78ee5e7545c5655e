"""Scalar products at κ's places against the dense product and torch.sparse.sampled_addmm."""

from __future__ import annotations

import dataclasses

import torch

from bench.graph_inputs import DENSE_ROWS, kappa, lists, psi_of, sizes_of
from bench.harness import Work, on_reference
from nefkern.ops import sddmm
from nefkern.reference.csr import row_of_entry


def places(graph):
    return row_of_entry(graph.row_offsets, graph.nnz), graph.columns.long()


def by_torch(graph, x, y):
    zeros = dataclasses.replace(graph, values=torch.zeros_like(graph.values)).to_torch()
    return lambda: torch.sparse.sampled_addmm(zeros, x, y.T)


def test_sddmm(race, size):
    graph = kappa(*lists(size))
    x = psi_of(size, graph)
    y = x.flip(0).contiguous()
    found = sddmm(graph, x, y)
    rows, columns = (index[:: max(1, graph.nnz // 10_000)] for index in places(graph))
    exact = (x[rows].double() * y[columns].double()).sum(1)
    wrong = (found[:: max(1, graph.nnz // 10_000)].double() - exact).abs().max()
    assert wrong <= 1e-5 * (x[rows].double() * y[columns].double()).abs().sum(1).max()
    contestants = {
        "nefkern": lambda: sddmm(graph, x, y),
        "reference": on_reference(lambda: sddmm(graph, x, y)),
    }
    try:
        theirs = by_torch(graph, x, y)
        theirs()
        contestants["torch.sparse.sampled_addmm"] = theirs
    except RuntimeError:  # a PyTorch without MKL has none for the CPU
        pass
    if graph.num_nodes <= DENSE_ROWS:
        rows, columns = places(graph)
        contestants["dense product"] = lambda: (x @ y.T)[rows, columns]
    work = Work(8.0 * graph.nnz + 2.0 * x.nbytes, {"float32": 2.0 * graph.nnz * x.shape[1]})
    race("sddmm, float32", contestants, sizes=sizes_of(size, graph), work=work)
