"""Exact eigenpairs against dense ones, and the fit of spans whose fit is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from nefkern.eigenpairs import leading_eigenpairs, span_fit
from nefkern.ops import CSRGraph, knn, normalized_adjacency


def clustered_graph(n: int = 240, seed: int = 0, copies: int = 1) -> CSRGraph:
    """κ of points about six centres; ``copies`` of it, unconnected: equal eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(6, 16, generator=generator)
    x = centres[torch.randint(6, (n,), generator=generator)]
    x = (x + torch.randn(n, 16, generator=generator)).repeat(copies, 1)
    similarity, neighbours = knn(x, 20, segments=torch.arange(copies + 1) * n)
    return normalized_adjacency(neighbours, similarity, num_nodes=n * copies)


def dense_eigenpairs(graph: CSRGraph) -> tuple[torch.Tensor, torch.Tensor]:
    values, vectors = torch.linalg.eigh(graph.to_dense().double())
    return values.flip(0), vectors.flip(1)


# ---- exact eigenpairs ----


@pytest.mark.parametrize("count", [1, 12, 59, 61, 240])
def test_eigenpairs_equal_the_dense_ones(count):
    """By Lanczos up to a quarter of the spectrum, by LAPACK beyond; the spectrum has no ties."""
    graph = clustered_graph()
    values, vectors = leading_eigenpairs(graph, count)
    expected_values, expected = dense_eigenpairs(graph)
    assert_close(values, expected_values[:count], atol=1e-12, rtol=0)
    cosines = (vectors * expected[:, :count]).sum(0).abs()
    assert cosines.min() > 1 - 1e-8
    assert_close(vectors.T @ vectors, torch.eye(count).double(), atol=1e-10, rtol=0)


def test_leading_is_by_value_not_by_magnitude():
    """A bipartite graph has -1 for every 1."""
    left = torch.zeros(40, 40)
    left[:20, 20:] = torch.rand(20, 20, generator=torch.Generator().manual_seed(0)) + 0.1
    a = left + left.T
    scale = a.sum(1).rsqrt()
    graph = CSRGraph.from_torch(scale[:, None] * a * scale, symmetric=True)
    values, _ = leading_eigenpairs(graph, 3)
    assert values[0].item() == pytest.approx(1, abs=1e-6)
    assert values.min() > 0


def test_equal_eigenvalues_come_as_often_as_they_are():
    graph = clustered_graph(n=120, copies=3)
    values, vectors = leading_eigenpairs(graph, 9)
    expected, _ = dense_eigenpairs(graph)
    assert_close(values, expected[:9], atol=1e-12, rtol=0)
    kappa = graph.to_dense().double()
    assert_close(kappa @ vectors, vectors * values, atol=1e-10, rtol=0)


def test_the_seed_decides_to_the_bit():
    graph = clustered_graph(n=120, copies=3)
    first, again, other = (leading_eigenpairs(graph, 9, seed=s)[1] for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_an_empty_graph_has_a_basis():
    empty = torch.empty(0)
    graph = CSRGraph(torch.zeros(41, dtype=torch.int64), empty.int(), empty, 40, True)
    values, vectors = leading_eigenpairs(graph, 3)
    assert not values.any()
    assert_close(vectors.T @ vectors, torch.eye(3).double())


def test_wrong_arguments_are_named():
    graph = clustered_graph(n=30)
    for count in (0, 31):
        with pytest.raises(ValueError, match=f"count: expected 1 to 30.*got {count}"):
            leading_eigenpairs(graph, count)
    one_way = CSRGraph.from_torch(torch.rand(5, 5))
    with pytest.raises(ValueError, match="expected a symmetric one"):
        leading_eigenpairs(one_way, 2)


# ---- the fit of a span ----


def test_any_basis_of_the_leading_eigenspace_fits_exactly():
    graph = clustered_graph()
    values, vectors = leading_eigenpairs(graph, 6)
    mixed = vectors @ torch.randn(6, 6, generator=torch.Generator().manual_seed(1)).double()
    fit = span_fit(1000 * mixed, graph, vectors)
    assert fit.rank == 6
    assert_close(fit.ritz, values, atol=1e-10, rtol=0)
    assert_close(fit.inside, torch.ones(6).double())
    assert fit.angles.max() < 1e-5
    assert fit.rayleigh[0] < values[0], "the columns are mixed: their quotients are not eigenvalues"


def test_trailing_eigenvectors_do_not_fit_at_all():
    graph = clustered_graph()
    values, vectors = dense_eigenpairs(graph)
    fit = span_fit(vectors[:, 10:14], graph, vectors[:, :4])
    assert_close(fit.rayleigh, values[10:14], atol=1e-10, rtol=0)
    assert_close(fit.angles, torch.full((4,), 90.0).double())
    assert fit.inside.max() < 1e-12


def test_a_turned_direction_has_its_angle():
    """One of three directions is turned 30 degrees out of the eigenspace."""
    graph = clustered_graph()
    _, vectors = dense_eigenpairs(graph)
    angle = math.radians(30)
    psi = vectors[:, :3].clone()
    psi[:, 1] = math.cos(angle) * vectors[:, 1] + math.sin(angle) * vectors[:, 50]
    fit = span_fit(psi, graph, vectors[:, :3])
    assert_close(fit.angles, torch.tensor([0, 0, 30]).double(), atol=1e-5, rtol=0)
    assert_close(fit.inside, torch.tensor([1, 0.75, 1]).double())


def test_dead_and_duplicate_columns_add_no_dimension():
    graph = clustered_graph()
    _, vectors = leading_eigenpairs(graph, 5)
    psi = torch.cat([vectors[:, :3], 7 * vectors[:, :1], torch.zeros(240, 2)], dim=1).float()
    fit = span_fit(psi, graph, vectors)
    assert (fit.rank, len(fit.ritz), len(fit.rayleigh), len(fit.angles)) == (3, 3, 4, 3)
    assert_close(fit.inside, torch.tensor([1, 1, 1, 0, 0]).double(), atol=1e-5, rtol=0)


def test_ritz_values_interlace():
    """Cauchy: the j-th Ritz value is at most the j-th eigenvalue, whatever the span."""
    graph = clustered_graph()
    values, vectors = dense_eigenpairs(graph)
    psi = torch.randn(240, 20, generator=torch.Generator().manual_seed(2)).softmax(1)
    fit = span_fit(psi, graph, vectors[:, :20])
    assert bool((fit.ritz <= values[:20] + 1e-12).all())
    assert bool((fit.ritz >= values[-20:] - 1e-12).all())
