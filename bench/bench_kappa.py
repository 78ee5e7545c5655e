"""kappa from the neighbour lists of both graphs, and its gradient, against scipy and PyTorch."""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.sparse
import torch

from bench.graph_inputs import (
    ALPHA,
    DENSE_ROWS,
    composed_kappa,
    dense_kappa,
    kappa,
    lists,
    sizes_of,
)
from bench.harness import DEVICE, Work, on_reference
from nefkern import backend


def scipy_kappa(neighbours, similarities, pixels):
    """kappa as one writes it down in scipy.sparse, float32."""
    neighbours, similarities, pixels = (x.cpu() for x in (neighbours, similarities, pixels))
    n = len(neighbours)

    def graph(indices, weights):
        rows = np.repeat(np.arange(n, dtype=np.int32), indices.shape[1])
        return scipy.sparse.csr_array((weights, (rows, indices.numpy().ravel())), shape=(n, n))

    def normalized(a):
        degree = a.sum(1)
        scale = np.zeros_like(degree)
        np.power(degree, -0.5, where=degree > 0, out=scale)
        return scipy.sparse.diags_array(scale) @ a @ scipy.sparse.diags_array(scale)

    a = graph(neighbours, np.maximum(similarities.numpy().ravel(), 0))
    b = graph(pixels, np.ones(pixels.numel(), np.float32))
    b.data[:] = 1  # duplicates were summed
    half = np.float32(0.5)
    return normalized((a + a.T) * half) + np.float32(ALPHA) * normalized(b.maximum(b.T))


def assert_right(arguments):
    """Every entry against scipy in float32, and the symmetry bit for bit."""
    graph = kappa(*arguments).validate()
    difference = graph.to_scipy() - scipy_kappa(*arguments)
    assert abs(difference).max() <= 1e-6 * graph.values.max()
    return graph


def test_kappa(race, size):
    arguments = lists(size)
    graph = assert_right(arguments)
    contestants = {
        "nefkern": lambda: kappa(*arguments),
        "normalized_adjacency, add": lambda: composed_kappa(*arguments),
    }
    if DEVICE.type == "cpu":
        contestants["scipy.sparse"] = lambda: scipy_kappa(*arguments)
    contestants["reference"] = on_reference(lambda: kappa(*arguments))
    if graph.num_nodes <= DENSE_ROWS:
        contestants["dense PyTorch"] = lambda: dense_kappa(*arguments)
    moved = 8.0 * graph.nnz + sum(x.nbytes for x in arguments)
    race(
        "kappa from neighbour lists",
        contestants,
        sizes=sizes_of(size, graph),
        work=Work(moved),
    )


def backward_of(values, weights, gradient):
    """A call of it is the backward pass alone: from the values' gradient to the weights'."""
    return lambda: torch.autograd.grad(values, weights, gradient, retain_graph=True)[0]


def test_kappa_backward(race, size):
    neighbours, similarities, pixels = lists(size)
    weights = similarities.clone().requires_grad_()
    graph = kappa(neighbours, weights, pixels)
    values = graph.values
    gradient = torch.randn(graph.nnz, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    ours = backward_of(values, weights, gradient)
    contestants = {"nefkern": ours}
    with backend("reference"):  # a backward pass is the backend's that its forward pass was
        values = kappa(neighbours, weights, pixels).values
    contestants["reference"] = backward_of(values, weights, gradient)
    exact = contestants["reference"]()
    assert (ours() - exact).abs().max() <= 1e-5 * exact.abs().max()
    if graph.num_nodes <= DENSE_ROWS:
        dense = dense_kappa(neighbours, weights, pixels)
        whole = dataclasses.replace(graph, values=gradient).to_dense()
        contestants["dense autograd"] = backward_of(dense, weights, whole)
    moved = 8.0 * graph.nnz + neighbours.nbytes + 2.0 * similarities.nbytes
    sizes = sizes_of(size, graph)
    race("kappa, gradient of the similarities", contestants, sizes=sizes, work=Work(moved))
