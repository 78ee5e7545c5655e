"""The extension of eigenvectors to new rows: the eigen-equation, a smooth kernel, independence."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from nefkern.ops import CSRGraph, add, knn, normalized_adjacency
from nefkern.spectral.eigenpairs import leading_eigenpairs
from nefkern.spectral.nystrom import cross_weights, degrees, extend

ALPHA = 0.3


def points(n: int, seed: int = 0) -> Tensor:
    """Rows about six centres."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(6, 16, generator=torch.Generator().manual_seed(9))
    return centres[torch.randint(6, (n,), generator=generator)] + torch.randn(
        n, 16, generator=generator
    )


def pixels(n: int, images: int, seed: int = 1) -> CSRGraph:
    """Neighbours within each of ``images`` images."""
    place = torch.rand(n, 3, generator=torch.Generator().manual_seed(seed))
    offsets = torch.arange(images + 1) * (n // images)
    near = knn(place, 5, metric="euclidean", segments=offsets)[1]
    return normalized_adjacency(near, num_nodes=n, symmetrize="union")


def rows_of(graph: CSRGraph) -> tuple[Tensor, Tensor]:
    """The graph as lists, the shorter rows padded with -1."""
    dense = graph.to_dense()
    width = int(graph.row_offsets.diff().max())
    weights, indices = dense.topk(width, dim=1)
    return torch.where(weights > 0, indices, -1), weights


def random_lists(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Seven of 50 old rows for each of n new ones."""
    indices = torch.randint(50, (n, 7), generator=generator)
    return indices, torch.rand(n, 7, generator=generator)


# ---- the equation ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_old_rows_extend_to_themselves(dtype):
    """With κ_F's own rows and P, (λ − αP) v = κ_F v is the eigen-equation of κ = κ_F + αP."""
    similarities, neighbours = knn(points(240), 20)
    features = normalized_adjacency(neighbours, similarities, num_nodes=240)
    pixel = pixels(240, 4)
    values, vectors, _ = leading_eigenpairs(add(features, pixel, ALPHA), 12, tol=0)
    assert values[-1] > 1.2 * ALPHA
    cross = rows_of(features)
    found = extend(values, vectors.to(dtype), cross, pixel=pixel, alpha=ALPHA)
    assert found.dtype == dtype
    assert_close(found, vectors.to(dtype), atol=3e-6, rtol=0)
    without = extend(values, vectors.to(dtype), cross)
    assert (without - vectors).abs().max() > 0.01, "the term matters"


@pytest.mark.parametrize("ratio", [1.5, 1.01])
@pytest.mark.parametrize("tol", [1e-3, 1e-10])
def test_the_error_is_below_the_tolerance(ratio, tol):
    """A share of what the pixel term adds, against a dense solution; λ differs by column."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(50, 3, generator=generator).double()
    values = ALPHA * ratio * torch.tensor([1, 1.7, 4]).double()
    cross = (
        torch.randint(50, (80, 7), generator=generator),
        torch.rand(80, 7, generator=generator),
    )
    pixel = pixels(80, 2)
    found = extend(values, vectors, cross, pixel=pixel, alpha=ALPHA, tol=tol)
    right = (vectors[cross[0]] * cross[1].double()[..., None]).sum(1)
    p = pixel.to_dense().double()
    for j, value in enumerate(values):
        exact = torch.linalg.solve(value * torch.eye(80).double() - ALPHA * p, right[:, j])
        added = exact - right[:, j] / value
        assert (found[:, j] - exact).norm() <= tol * added.norm() * 1.0001 + 1e-12


def test_images_do_not_influence_each_other():
    """To the bit, whatever else is in the batch."""
    generator = torch.Generator().manual_seed(0)
    vectors, values = torch.randn(50, 20, generator=generator), torch.linspace(1.2, 0.5, 20)
    cross = (
        torch.randint(50, (90, 7), generator=generator),
        torch.rand(90, 7, generator=generator),
    )
    together = pixels(90, 3)
    alone = CSRGraph.from_torch(together.to_dense()[:30, :30], symmetric=True)
    options = {"alpha": ALPHA}
    both = extend(values, vectors, cross, pixel=together, **options)
    one = extend(values, vectors, (cross[0][:30], cross[1][:30]), pixel=alone, **options)
    assert torch.equal(both[:30], one)


# ---- new rows ----


def test_held_out_points_of_a_smooth_kernel_come_close():
    """A circle's harmonics at points between those that the graph was made of."""
    turn = torch.linspace(0, 2 * math.pi, 401)[:-1]
    every = torch.stack([turn.cos(), turn.sin()], dim=1)
    old, new = every[::2], every[1::2]
    similarities, neighbours = knn(old, 12)
    graph = normalized_adjacency(neighbours, similarities, num_nodes=200)
    values, vectors, _ = leading_eigenpairs(graph, 5, tol=0)
    values_new, neighbours_new = (new @ old.T).topk(12)
    weights = cross_weights(neighbours_new, values_new, degrees(neighbours, similarities, 200))
    found = extend(values, vectors, (neighbours_new, weights))
    middle = (vectors + vectors.roll(-1, 0)) / 2
    assert_close(found, middle, atol=0.01 * vectors.abs().max().item(), rtol=0)


def test_new_points_of_clusters_land_on_their_cluster():
    old, new = points(600), points(200, seed=5)
    similarities, neighbours = knn(old, 20)
    graph = normalized_adjacency(neighbours, similarities, num_nodes=600)
    values, vectors, _ = leading_eigenpairs(graph, 6, tol=0)
    near = (F.normalize(new) @ F.normalize(old).T).topk(20)
    weights = cross_weights(near.indices, near.values, degrees(neighbours, similarities, 600))
    found = extend(values, vectors, (near.indices, weights))
    label = torch.cdist(old, new).argmin(0)
    cosines = F.cosine_similarity(found, vectors[label], dim=1)
    assert cosines.median() > 0.95


# ---- weights ----


def test_degrees_and_weights_are_those_of_the_symmetrised_graph():
    """Where the lists are mutual, cross weights of the old rows are κ_F itself."""
    similarities, neighbours = knn(points(60), 59)  # all pairs: every edge is mutual
    graph = normalized_adjacency(neighbours, similarities, num_nodes=60)
    degree = degrees(neighbours, similarities, 60)
    dense = torch.zeros(60, 60).scatter(1, neighbours.long(), similarities.clamp_min(0))
    assert_close(degree, ((dense + dense.T) / 2).double().sum(1))
    weights = cross_weights(neighbours, similarities, degree)
    assert_close(torch.zeros(60, 60).scatter(1, neighbours.long(), weights), graph.to_dense())


def test_one_sided_edges_count_half():
    neighbours, similarities = (
        torch.tensor([[1, 2], [0, -1], [0, 1]]),
        torch.tensor([[1.0, 0.5], [1.0, -math.inf], [0.5, 0.25]]),
    )
    assert degrees(neighbours, similarities, 3).tolist() == [1.5, 1.125, 0.625]


def test_missing_neighbours_and_rows_without_edges_are_zero_not_nan():
    indices = torch.tensor([[0, -1], [-1, -1], [1, 0]], dtype=torch.int32)
    similarities = torch.tensor([[0.5, -math.inf], [-math.inf, -math.inf], [0.5, -0.5]])
    weights = cross_weights(indices, similarities, torch.tensor([4.0, 0.0]))
    assert_close(weights, torch.tensor([[math.sqrt(0.5) / 2, 0], [0, 0], [0, 0]]))
    found = extend(torch.ones(3), torch.ones(2, 3), (indices, weights))
    assert_close(found[:, 0], weights.sum(1))


@pytest.mark.parametrize(("n", "k", "m"), [(0, 3, 2), (4, 0, 2), (4, 3, 0)])
def test_nothing_to_extend(n, k, m):
    cross = (torch.zeros(n, k, dtype=torch.int64), torch.zeros(n, k))
    found = extend(torch.ones(m), torch.ones(5, m), cross)
    assert found.shape == (n, m)
    assert not found.any()


def test_half_precision_vectors_are_read_as_float32():
    vectors = torch.randn(9, 2, generator=torch.Generator().manual_seed(0)).half()
    cross = (torch.tensor([[0, 4]]), torch.tensor([[0.25, 0.5]]))
    found = extend(torch.ones(2), vectors, cross)
    assert found.dtype == torch.float32
    assert_close(found[0], vectors[0].float() * 0.25 + vectors[4].float() * 0.5)


# ---- mistakes ----


def test_wrong_arguments_are_named():
    vectors, values = torch.ones(5, 2), torch.tensor([1.0, 0.3])
    lists = (torch.zeros(4, 3, dtype=torch.int64), torch.ones(4, 3))
    pixel = pixels(4, 1)
    with pytest.raises(ValueError, match=r"values: .* above alpha = 0.3, got 0.3 at position 1"):
        extend(values, vectors, lists, pixel=pixel, alpha=0.3)
    with pytest.raises(ValueError, match=r"values: .* above alpha = 0, got -1 at position 0"):
        extend(-torch.ones(2), vectors, lists)
    with pytest.raises(ValueError, match=r"values: .*got nan at position 0"):
        extend(torch.full((2,), math.nan), vectors, lists)
    with pytest.raises(ValueError, match=r"values: expected shape \[2\], got \[3\]"):
        extend(torch.ones(3), vectors, lists)
    with pytest.raises(ValueError, match="pixel: expected 4 nodes, the new rows, got 6"):
        extend(values, vectors, lists, pixel=pixels(6, 1), alpha=0.1)
    with pytest.raises(ValueError, match="pixel: expected a symmetric graph"):
        extend(values, vectors, lists, pixel=CSRGraph.from_torch(torch.rand(4, 4)), alpha=0.1)
    for alpha in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match="alpha: expected a finite weight of at least 0"):
            extend(values, vectors, lists, pixel=pixel, alpha=alpha)
    with pytest.raises(ValueError, match="tol: expected a number between 0 and 1, got 0"):
        extend(values, vectors, lists, tol=0)
    with pytest.raises(ValueError, match="indices: expected -1 to 4, the old rows, got 0 to 5"):
        extend(values, vectors, (torch.tensor([[5, 0]]), torch.ones(1, 2)))
    with pytest.raises(TypeError, match="indices: expected one of int32, int64, got float32"):
        extend(values, vectors, (lists[1], lists[1]))
    with pytest.raises(ValueError, match=r"weights: expected shape \[4, 3\], got \[4, 2\]"):
        extend(values, vectors, (lists[0], lists[1][:, :2]))
    broken = lists[1].clone()
    broken[2, 0] = math.nan
    with pytest.raises(ValueError, match="weights: expected finite values, got NaN or inf in row"):
        extend(values, vectors, (lists[0], broken))
    with pytest.raises(ValueError, match="indices: expected 5 rows, the nodes, got 4"):
        degrees(*lists, 5)
