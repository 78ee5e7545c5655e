"""Eigenpairs against dense ones, and the fit of spans whose fit is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch.testing import assert_close

from nefkern.ops import CSRGraph, feature_kappa, knn, normalized_adjacency, quadratic_form
from nefkern.spectral import chebyshev
from nefkern.spectral.eigenpairs import leading_eigenpairs, span_fit


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


def with_spectrum(values: torch.Tensor, seed: int = 0) -> CSRGraph:
    """A dense matrix with these eigenvalues, to float32's rounding."""
    n, generator = len(values), torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(n, n, generator=generator).double())[0]
    matrix = (q * values.double()) @ q.T
    return CSRGraph.from_torch(((matrix + matrix.T) / 2).float(), symmetric=True)


# ---- to machine precision ----


@pytest.mark.parametrize("count", [1, 12, 59, 61, 240])
def test_eigenpairs_equal_the_dense_ones(count):
    """By Lanczos up to a quarter of the spectrum, by LAPACK beyond; the spectrum has no ties."""
    graph = clustered_graph()
    values, vectors, residuals = leading_eigenpairs(graph, count, tol=0)
    expected_values, expected = dense_eigenpairs(graph)
    assert_close(values, expected_values[:count], atol=1e-12, rtol=0)
    assert residuals.max() < 1e-12
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
    values = leading_eigenpairs(graph, 3, tol=0).values
    assert values[0].item() == pytest.approx(1, abs=1e-6)
    assert values.min() > 0


def test_equal_eigenvalues_come_as_often_as_they_are():
    graph = clustered_graph(n=120, copies=3)
    values, vectors, _ = leading_eigenpairs(graph, 9, tol=0)
    expected, _ = dense_eigenpairs(graph)
    assert_close(values, expected[:9], atol=1e-12, rtol=0)
    kappa = graph.to_dense().double()
    assert_close(kappa @ vectors, vectors * values, atol=1e-10, rtol=0)


def test_small_graphs_are_exact_whatever_the_tolerance():
    graph = clustered_graph(n=120)
    values, vectors, _ = leading_eigenpairs(graph, 9, tol=0.1)
    assert_close(values, dense_eigenpairs(graph)[0][:9], atol=1e-12, rtol=0)
    assert vectors.dtype == torch.float32


# ---- by filtered iteration ----

N = 600
SPECTRA: dict[str, Callable[[], torch.Tensor]] = {
    "even": lambda: torch.linspace(1, -1, N),
    "more copies than columns": lambda: torch.cat([torch.ones(90), torch.linspace(0.9, -0.5, 510)]),
    "one far off": lambda: torch.cat([torch.ones(1), torch.linspace(0.1, -0.1, N - 1)]),
    "one far below": lambda: torch.cat([torch.linspace(1, 0, N - 1), -torch.ones(1)]),
    "low rank": lambda: torch.cat([torch.linspace(1, 0.5, 5), torch.zeros(N - 5)]),
    "negative": lambda: torch.linspace(-1, -5, N),
    "identity": lambda: torch.ones(N),
    "large": lambda: 1e25 * torch.linspace(1, -1, N),
    "small": lambda: 1e-25 * torch.linspace(1, -1, N),
}


@pytest.mark.parametrize(("count", "tol"), [(1, 1e-3), (20, 1e-3), (100, 1e-3), (20, 2e-5)])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_residuals_hold_and_bound_the_distance_to_the_spectrum(spectrum, count, tol):
    """Residuals are what they are called, below the tolerance, and the values the leading ones."""
    graph = with_spectrum(SPECTRA[spectrum]())
    values, vectors, residuals = leading_eigenpairs(graph, count, tol=tol)
    kappa, expected = graph.to_dense().double(), dense_eigenpairs(graph)[0]
    norm, v = expected.abs().max(), vectors.double()
    assert vectors.dtype == torch.float32
    assert_close((kappa @ v - v * values).norm(dim=0), residuals, atol=2e-6 * norm, rtol=0.1)
    assert residuals.max() <= tol * norm
    distance = (values[:, None] - expected).abs().amin(1)
    assert bool((distance <= residuals + 1e-6 * norm).all())
    assert_close(values, expected[:count], atol=(0.4 * tol + 1e-6) * norm, rtol=0)
    assert_close(v.T @ v, torch.eye(count).double(), atol=1e-5, rtol=0)


def test_vectors_are_the_dense_ones_where_the_gap_allows():
    """Davis-Kahan: the sine of the angle is at most the residual over the gap."""
    spectrum = torch.cat([torch.tensor([1, 0.9, 0.8, 0.7]), torch.linspace(0.5, -0.5, N - 4)])
    graph = with_spectrum(spectrum)
    _, vectors, residuals = leading_eigenpairs(graph, 4, tol=1e-4)
    v, expected = vectors.double(), dense_eigenpairs(graph)[1][:, :4]
    sines = (v - expected * (v * expected).sum(0)).norm(dim=0)
    assert bool((sines <= residuals / 0.1 + 1e-6).all())
    assert sines.max() < 1e-3


@pytest.mark.parametrize("wide", [True, False], ids=["graph", "tolerance"])
def test_float64_reaches_tolerances_that_float32_cannot(wide):
    graph = with_spectrum(torch.linspace(1, -1, N))
    if wide:
        graph = CSRGraph.from_torch(graph.to_dense().double(), symmetric=True)
    values, vectors, residuals = leading_eigenpairs(graph, 10, tol=1e-9)
    assert vectors.dtype == torch.float64
    assert residuals.max() <= 1e-9
    assert_close(values, dense_eigenpairs(graph)[0][:10], atol=1e-12, rtol=0)


def test_unconnected_copies_and_empty_rows():
    """Eigenvalue 1 once a component; rows without an entry are 0 in every vector."""
    graph = clustered_graph(n=120, copies=6)
    n = graph.num_nodes + 50
    offsets = torch.cat([graph.row_offsets, graph.row_offsets[-1:].expand(50)])
    graph = CSRGraph(offsets, graph.columns, graph.values, n, True)
    values, vectors, _ = leading_eigenpairs(graph, 10, tol=1e-4)
    assert_close(values, dense_eigenpairs(graph)[0][:10], atol=1e-5, rtol=0)
    assert_close(values[:6], torch.ones(6).double(), atol=1e-5, rtol=0)
    assert vectors[-50:].abs().max() < 1e-3


def test_what_is_not_reached_is_returned_with_a_warning():
    graph = with_spectrum(torch.linspace(1, -1, N))
    with pytest.warns(RuntimeWarning, match=r"of 20 eigenpairs have residuals above 1\.\de-05.*"):
        _, vectors, residuals = leading_eigenpairs(graph, 20, tol=1e-5, max_rounds=1)
    kappa, v = graph.to_dense().double(), vectors.double()
    actual = (kappa @ v - v * (v * (kappa @ v)).sum(0)).norm(dim=0)
    assert_close(actual, residuals, atol=1e-5, rtol=0.01)
    assert actual.max() > 1e-4


def test_every_round_is_told_and_can_end_the_iteration():
    graph, told = clustered_graph(600), []
    found = leading_eigenpairs(graph, 20, tol=1e-4, on_round=told.append)
    assert told[-1] <= 1e-4 < told[0]
    assert found.residuals.max() / told[-1] == pytest.approx(1, rel=0.1)  # ‖κ‖ is 1

    def stop(residual: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        leading_eigenpairs(graph, 20, tol=1e-4, on_round=stop)


def test_precision_does_not_follow_what_the_caller_switched_on():
    graph = with_spectrum(torch.linspace(1, -1, N))
    expected = leading_eigenpairs(graph, 5, tol=1e-4)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = leading_eigenpairs(graph, 5, tol=1e-4)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(found.vectors, expected.vectors)


def test_precision_may_have_been_switched_by_the_new_names():
    """Once they are used, PyTorch refuses to be asked by the old ones."""
    graph = with_spectrum(torch.linspace(1, -1, N))
    expected = leading_eigenpairs(graph, 5, tol=1e-4)
    matmul = torch.backends.mkldnn.matmul
    matmul.fp32_precision = "bf16"
    try:
        found = leading_eigenpairs(graph, 5, tol=1e-4)
        assert matmul.fp32_precision == "bf16"
    finally:
        matmul.fp32_precision = "none"
    assert torch.equal(found.vectors, expected.vectors)


def test_cholesky_gives_way_to_reflections_where_columns_depend():
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(200, 3, generator=generator)
    block = torch.cat([block, block[:, :1], torch.zeros(200, 1)], dim=1)
    q = chebyshev._orthonormalized(block)
    assert_close(q.T @ q, torch.eye(5), atol=1e-5, rtol=0)


def test_ill_conditioned_columns_become_orthonormal():
    """A condition number that squared exceeds float32, as after a first filter."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(9000, 1, generator=generator)
    block = common + 1e-5 * torch.randn(9000, 20, generator=generator)
    q = chebyshev._orthonormalized(block.clone())
    assert_close(q.T @ q, torch.eye(20), atol=1e-5, rtol=0)
    lost = block - q @ (q.T @ block)
    assert lost.norm(dim=0).max() < 1e-6 * block.norm(dim=0).min()


# ---- both ----


@pytest.mark.parametrize(("copies", "tol"), [(3, 0), (6, 1e-3)])
def test_the_seed_decides_to_the_bit(copies, tol):
    graph = clustered_graph(n=120, copies=copies)
    found = [leading_eigenpairs(graph, 9, tol=tol, seed=seed).vectors for seed in (1, 1, 2)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_largest_entries_are_positive():
    for tol in (0, 1e-3):
        vectors = leading_eigenpairs(clustered_graph(n=600), 9, tol=tol).vectors
        assert bool((vectors.amax(0) >= -vectors.amin(0)).all())


@pytest.mark.parametrize("n", [60, 600])  # by LAPACK, by filters
def test_gradients_of_eigenvalues_by_the_rayleigh_quotient(n):
    features = torch.randn(n, 3, generator=torch.Generator().manual_seed(0)).double()
    graph = feature_kappa(features.requires_grad_(), 8)
    pairs = leading_eigenpairs(graph, 4, tol=1e-9)
    assert not pairs.vectors.requires_grad
    found = quadratic_form(pairs.vectors, graph).diagonal()
    exact = torch.linalg.eigvalsh(graph.to_dense()).flip(0)[:4]
    weight = torch.tensor([1.0, -2.0, 3.0, 0.5]).double()
    assert_close(found, exact)
    (gradient,) = torch.autograd.grad((found * weight).sum(), features, retain_graph=True)
    (wanted,) = torch.autograd.grad((exact * weight).sum(), features)
    assert (gradient - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("n", [40, 100_000])
@pytest.mark.parametrize("stored", [False, True], ids=["no entries", "entries of 0"])
def test_an_empty_graph_has_a_basis(n, stored):
    nodes = torch.arange(n + 1)
    graph = CSRGraph(
        nodes * stored, nodes[:n].int()[: n * stored], torch.zeros(n * stored), n, True
    )
    values, vectors, residuals = leading_eigenpairs(graph, 3)
    assert not values.any()
    assert not residuals.any()
    assert_close(vectors.T @ vectors, torch.eye(3))


def test_wrong_arguments_are_named():
    graph = clustered_graph(n=30)
    with pytest.raises(ValueError, match="count: expected 1 to 30, the graph's nodes, got 31"):
        leading_eigenpairs(graph, 31)
    with pytest.raises(ValueError, match="count: expected at least 1, got 0"):
        leading_eigenpairs(graph, 0)
    with pytest.raises(TypeError, match="count: expected an int, got float"):
        leading_eigenpairs(graph, 2.5)
    with pytest.raises(TypeError, match="max_rounds: expected an int, got float"):
        leading_eigenpairs(graph, 2, max_rounds=2.5)
    for tol in (-1e-3, 1.0, math.nan):
        with pytest.raises(ValueError, match="tol: expected a number from 0 to below 1"):
            leading_eigenpairs(graph, 2, tol=tol)
    with pytest.raises(ValueError, match="max_rounds: expected at least 1, got 0"):
        leading_eigenpairs(graph, 2, max_rounds=0)
    one_way = CSRGraph.from_torch(torch.rand(5, 5))
    with pytest.raises(ValueError, match="expected a symmetric one"):
        leading_eigenpairs(one_way, 2)
    with pytest.raises(TypeError, match="graph: expected a CSRGraph, got Tensor"):
        leading_eigenpairs(torch.eye(5), 2)
    broken = CSRGraph.from_torch(torch.full((5, 5), math.nan), symmetric=True)
    with pytest.raises(ValueError, match="graph: expected finite values, got NaN or inf"):
        leading_eigenpairs(broken, 2)


# ---- the fit of a span ----


def test_any_basis_of_the_leading_eigenspace_fits_exactly():
    graph = clustered_graph()
    values, vectors, _ = leading_eigenpairs(graph, 6, tol=0)
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
    vectors = leading_eigenpairs(graph, 5, tol=0).vectors
    psi = torch.cat([vectors[:, :3], 7 * vectors[:, :1], torch.zeros(240, 2)], dim=1).float()
    fit = span_fit(psi, graph, vectors)
    assert (fit.rank, len(fit.ritz), len(fit.rayleigh), len(fit.angles)) == (3, 3, 4, 3)
    assert_close(fit.inside, torch.tensor([1, 1, 1, 0, 0]).double(), atol=1e-5, rtol=0)


def test_columns_that_are_not_finite_are_no_dead_ones():
    graph = clustered_graph(n=30)
    psi = torch.rand(30, 2)
    psi[3, 1] = math.nan
    with pytest.raises(ValueError, match="psi: expected finite values, got NaN or inf in row 3"):
        span_fit(psi, graph, leading_eigenpairs(graph, 2).vectors)
    for name, these in (("psi", (29, 30)), ("vectors", (30, 29))):
        with pytest.raises(ValueError, match=rf"{name}: expected shape \[30, .\], got \[29, 2\]"):
            span_fit(torch.rand(these[0], 2), graph, torch.rand(these[1], 2))


def test_ritz_values_interlace():
    """Cauchy: the j-th Ritz value is at most the j-th eigenvalue, whatever the span."""
    graph = clustered_graph()
    values, vectors = dense_eigenpairs(graph)
    psi = torch.randn(240, 20, generator=torch.Generator().manual_seed(2)).softmax(1)
    fit = span_fit(psi, graph, vectors[:, :20])
    assert bool((fit.ritz <= values[:20] + 1e-12).all())
    assert bool((fit.ritz >= values[-20:] - 1e-12).all())
