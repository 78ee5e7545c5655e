"""From rows to eigenvectors and to new rows: against dense float64, stored and read again."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor
from torch.testing import assert_close

from nefkern.ops import CSRGraph, knn, normalized_adjacency
from nefkern.spectral.embedding import (
    AFFINITIES,
    Embedding,
    NeighbourLists,
    embed,
    embed_adjacency,
    embed_lists,
    neighbour_lists,
)
from nefkern.spectral.landmarks import landmarks

ALPHA = 0.3


def points(n: int, seed: int = 0) -> Tensor:
    """Rows about five centres."""
    centres = 2 * torch.randn(5, 12, generator=torch.Generator().manual_seed(9))
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(5, (n,), generator=generator)
    return centres[which] + torch.randn(n, 12, generator=generator)


def similarity(rows: Tensor, others: Tensor, affinity: str, k: int) -> Tensor:
    """The definition, dense: float64 [n, N], 0 but for the k nearest."""
    rows, others = rows.double(), others.double()
    if affinity == "cosine":
        near = torch.cosine_similarity(rows[:, None], others[None], dim=2)
    else:
        near = -torch.cdist(rows, others, compute_mode="donot_use_mm_for_euclid_dist")
    own = rows.shape == others.shape and torch.equal(rows, others)
    best = near.masked_fill(torch.eye(*near.shape).bool() & own, -math.inf).topk(k, dim=1)
    if affinity == "cosine":
        weights = best.values.clamp_min(0)
    elif affinity == "connectivity":
        weights = torch.ones_like(best.values)
    else:
        width = -best.values[:, -1:]
        among = others if own else torch.cat([rows, others])
        distances = torch.cdist(others, among if own else others)
        others_width = distances.sort(1).values[:, k]
        weights = (-best.values.square() / (width * others_width[best.indices])).exp()
    return torch.zeros_like(near).scatter(1, best.indices, weights)


def dense_kappa(rows: Tensor, affinity: str, k: int) -> tuple[Tensor, Tensor]:
    a = similarity(rows, rows, affinity, k)
    a = (a + a.T) / 2
    degree = a.sum(1)
    return a / (degree[:, None] * degree).sqrt(), degree


# ---- rows to eigenvectors ----


@pytest.mark.parametrize("affinity", AFFINITIES)
def test_eigenpairs_are_those_of_the_definition(affinity):
    rows = points(150)
    kappa, degree = dense_kappa(rows, affinity, 8)
    found = embed(rows, 5, k=8, affinity=affinity)
    assert_close(found.degrees, degree, atol=1e-5, rtol=1e-5)
    assert_close(found.values, torch.linalg.eigvalsh(kappa).flip(0)[:5], atol=1e-5, rtol=0)
    product = kappa @ found.vectors.double()
    assert_close(product, found.vectors.double() * found.values, atol=1e-5, rtol=0)
    assert_close(
        found.coordinates().double(), found.vectors.double() / degree.sqrt()[:, None],
        atol=1e-5, rtol=1e-4,
    )  # fmt: skip


def test_the_second_graph_is_added_with_its_weight():
    rows = points(120)
    near = knn(points(120, seed=5), 4)[1]
    pixel = normalized_adjacency(near, num_nodes=120, symmetrize="union")
    found = embed(rows, 4, k=8, second=pixel, alpha=ALPHA)
    kappa = dense_kappa(rows, "cosine", 8)[0] + ALPHA * pixel.to_dense().double()
    assert_close(found.values, torch.linalg.eigvalsh(kappa).flip(0)[:4], atol=1e-5, rtol=0)
    assert found.alpha == ALPHA


def test_an_adjacency_leaves_out_its_diagonal():
    a = torch.rand(40, 40, generator=torch.Generator().manual_seed(0))
    a = (a + a.T) * (a + a.T > 1.2)
    found = embed_adjacency(CSRGraph.from_torch(a), 3)
    a.fill_diagonal_(0)
    degree = a.sum(1)
    kappa = a / (degree[:, None] * degree).sqrt()
    assert_close(found.values, torch.linalg.eigvalsh(kappa.double()).flip(0)[:3], atol=1e-5, rtol=0)
    assert_close(found.degrees.float(), degree)


def test_duplicates_rows_without_edges_and_too_many_neighbours_are_finite():
    same = torch.ones(20, 3)
    for affinity in AFFINITIES:
        found = embed(same, 2, k=30, affinity=affinity)
        assert_close(found.values[0].item(), 1.0, atol=1e-6, rtol=0)
        assert found.coordinates().isfinite().all()
    lonely = torch.cat([points(30), torch.zeros(1, 12)])  # similarity 0 with all
    found = embed(lonely, 3, k=4)
    assert not found.coordinates()[30].any()
    assert not found.extend(torch.zeros(2, 12)).any()


@pytest.mark.parametrize("affinity", AFFINITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_affinity_depends_on_the_unit_of_the_rows(affinity, dtype):
    rows = points(40).to(dtype)
    exponents = (-90, 90) if dtype == torch.float32 else (-800, 800)
    expected = neighbour_lists(rows, 5, affinity)
    for exponent in exponents:
        found = neighbour_lists(torch.ldexp(rows, torch.tensor(exponent)), 5, affinity)
        assert torch.equal(found.indices, expected.indices)
        assert_close(found.similarities, expected.similarities)


# ---- new rows ----


@pytest.mark.parametrize("affinity", AFFINITIES)
def test_extension_is_the_average_over_neighbours(affinity):
    """λ u(x) = Σ_j w_j u_j / Σ_j w_j, u the random-walk eigenvectors."""
    rows, new = points(150), points(40, seed=3)
    found = embed(rows, 4, k=8, affinity=affinity, tol=1e-6)
    weights = similarity(new, rows, affinity, 8)
    u = found.coordinates().double()
    expected = weights @ u / weights.sum(1, keepdim=True) / found.values
    assert_close(found.extend_coordinates(new).double(), expected, atol=1e-5, rtol=1e-3)


def test_extension_with_the_pixel_term_solves_its_equation():
    rows, new = points(120), points(40, seed=3)
    pixel = normalized_adjacency(knn(rows, 4)[1], num_nodes=120, symmetrize="union")
    found = embed(rows, 4, k=8, second=pixel, alpha=ALPHA)
    among = normalized_adjacency(knn(new, 4)[1], num_nodes=40, symmetrize="union")
    v = found.extend(new, among).double()
    plain = found.extend(new).double() * found.values  # κ_F V
    p = among.to_dense().double()
    assert_close(v * found.values - ALPHA * p @ v, plain, atol=1e-5, rtol=1e-3)
    assert (v - plain / found.values).abs().max() > 1e-3, "the term matters"


def test_vectors_that_have_no_continuation_are_zero():
    """A bipartite graph: eigenvalues 1 and -1."""
    lists = NeighbourLists(torch.tensor([[1], [0]]), torch.ones(2, 1), None)
    found = embed_lists(lists, 2)
    assert found.values.tolist() == pytest.approx([1, -1])
    new = found.extend(NeighbourLists(torch.tensor([[0]]), torch.ones(1, 1), None))
    assert new[0, 0] != 0
    assert new[0, 1] == 0


def test_same_rows_are_recognised():
    rows = points(60)
    found = embed(rows, 2, k=5)
    new = torch.cat([rows[[7, 3]], rows[[7]] + 1e-3])
    assert found.same_rows(new, found.neighbours(new)).tolist() == [7, 3, -1]


# ---- kept ----


@pytest.mark.parametrize("affinity", AFFINITIES)
@pytest.mark.parametrize("keep", [torch.float32, torch.float16])
def test_what_is_stored_extends_as_before(affinity, keep):
    rows, new = points(90), points(20, seed=4)
    found = embed(rows, 4, k=6, affinity=affinity, keep=keep)
    again = Embedding.from_state(load(save(found.state())))
    assert again.rows.dtype == keep
    assert (again.k, again.affinity, again.alpha) == (6, affinity, 0.0)
    assert torch.equal(again.extend(new), found.extend(new))
    full = embed(rows, 4, k=6, affinity=affinity).extend_coordinates(new)
    assert_close(again.extend_coordinates(new), full, atol=0.02 * full.abs().max().item(), rtol=0)
    assert torch.equal(again.leading(2).extend(new), found.extend(new)[:, :2])


def test_more_neighbours_than_rows_are_as_many_as_there_are():
    """Stored and read again, and extended from some of the rows, as if so many were asked for."""
    rows, new = points(20), points(5, seed=4)
    found, all_others = (embed(rows, 3, k=k) for k in (50, 19))
    again = Embedding.from_state(load(save(found.state())))
    assert again.k == 19
    assert torch.equal(again.extend(new), all_others.extend(new))
    some = landmarks(found, 10)
    assert torch.equal(some.degrees, landmarks(all_others, 10).degrees)
    assert torch.equal(some.extend(new), landmarks(all_others, 10).extend(new))
    one = embed(torch.ones(1, 3), 1, k=2, affinity="connectivity")
    assert Embedding.from_state(one.state()).k == 1


def test_mistakes_are_named():
    wide = torch.tensor([[0.0] * 12, [1e300] * 12], dtype=torch.float64)
    with pytest.raises(ValueError, match="new: expected finite values, got NaN or inf in row 1"):
        embed(points(30), 2, k=4).extend(wide)
    with pytest.raises(ValueError, match=r"widths: expected shape \[30\], got \[3\]"):
        dataclasses.replace(embed(points(30), 2, k=4, affinity="gaussian"), widths=torch.ones(3))
    rows = points(30)
    found = embed(rows, 2, k=4)
    with pytest.raises(ValueError, match="affinity: expected 'cosine' or 'connectivity'"):
        neighbour_lists(rows, 3, "rbf")
    with pytest.raises(ValueError, match="features: expected finite values"):
        embed(rows * math.nan, 2, k=4)
    with pytest.raises(ValueError, match="keep: expected float32 or float16"):
        embed(rows, 2, k=4, keep=torch.float64)
    with pytest.raises(ValueError, match=r"keep: expected rows within 65504.*got 1e\+06"):
        embed(torch.full((5, 2), 1e6), 2, k=4, keep=torch.float16)
    with pytest.raises(ValueError, match=r"new: expected shape \[n, 12\], got \[3, 5\]"):
        found.extend(torch.ones(3, 5))
    with pytest.raises(ValueError, match="new: expected finite values"):
        found.extend(torch.full((1, 12), math.inf))
    with pytest.raises(ValueError, match="rows: none were kept"):
        embed_lists(neighbour_lists(rows, 4, "cosine"), 2).extend(rows)
    state = found.state()
    del state["degrees"]
    with pytest.raises(ValueError, match="degrees is missing"):
        Embedding.from_state(state)
    with pytest.raises(ValueError, match=r"degrees: expected shape \[30\], got \[29\]"):
        Embedding.from_state(found.state() | {"degrees": torch.ones(29).double()})
    with pytest.raises(ValueError, match="affinity: expected 0 to 2, got 7"):
        Embedding.from_state(found.state() | {"affinity": torch.tensor(7)})
    with pytest.raises(ValueError, match="graph: expected similarities of at least 0"):
        embed_adjacency(CSRGraph.from_torch(-torch.ones(3, 3)), 1)
