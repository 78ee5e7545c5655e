"""kappa from the neighbour lists of both graphs, against scipy.sparse and dense PyTorch."""

from __future__ import annotations

import numpy as np
import scipy.sparse

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
