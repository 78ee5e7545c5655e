"""Trees of clusters against SciPy's and against figures worked by hand."""

import math

import numpy as np
import pytest
import torch
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from nefkern.spectral.merging import cut, merge, ward


def points(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, dtype=torch.float64, generator=generator)


def test_single_points_merge_as_scipy_merges_them():
    rows = points(40)
    expected = hierarchy.linkage(rows.numpy(), "ward")
    np.testing.assert_allclose(ward(rows, torch.ones(40)).numpy(), expected, rtol=1e-10)
    distances = torch.cdist(rows, rows)
    expected = hierarchy.linkage(squareform(distances.numpy(), checks=False), "average")
    found = merge(distances, torch.ones(40), "average").numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def inertia(rows: torch.Tensor, groups: torch.Tensor) -> float:
    parts = (rows[groups == g] for g in groups.unique())
    return sum((part - part.mean(0)).square().sum().item() for part in parts)


def test_clusters_merge_as_their_points_do():
    """Clusters of many points: a merger's height squared is twice what inertia rises by."""
    rows, labels = points(300), torch.arange(300) % 7
    centers = torch.stack([rows[labels == k].mean(0) for k in range(7)])
    tree = ward(centers, labels.bincount())
    for count in range(6, 0, -1):
        before, after = (cut(tree, n)[labels] for n in (count + 1, count))
        rise = inertia(rows, after) - inertia(rows, before)
        assert tree[6 - count, 2].item() == pytest.approx(math.sqrt(2 * rise))
    assert tree[-1, 3] == 7


def test_sizes_count():
    """On a line at 0, 3 and 5: equally large, 3 and 5 are nearest; but it costs less to move one
    point from 0 to 3 than fifty from 5: |c_a - c_b|² n_a n_b / (n_a + n_b) is 4.95 against 101."""
    centers = torch.tensor([[0.0], [3.0], [5.0]])
    assert ward(centers, torch.tensor([1, 1, 1]))[0, :2].tolist() == [1, 2]
    tree = ward(centers, torch.tensor([1, 50, 51]))
    assert tree[0, :2].tolist() == [0, 1]
    assert tree[0, 2].item() == pytest.approx(math.sqrt(2 * 9 * 50 / 51))


def test_average_linkage_weighs_by_size():
    """0 and 1 merge first; from both, of 1 and 3 points, 2 is (1·4 + 3·8)/4 = 7 away."""
    distances = torch.tensor([[0.0, 1, 4], [1, 0, 8], [4, 8, 0]])
    tree = merge(distances, torch.tensor([1, 3, 1]), "average")
    assert tree.tolist() == [[0, 1, 1, 2], [2, 3, 7, 3]]


def test_empty_clusters_go_first_and_cost_nothing():
    tree = ward(points(5), torch.tensor([4, 0, 3, 0, 2]))
    assert tree[:2, 2].tolist() == [0, 0]
    assert tree.isfinite().all()
    assert (tree[:, 2].diff() >= 0).all()
    assert hierarchy.is_valid_linkage(tree.numpy(), throw=True)


def test_cuts_nest():
    tree = ward(points(20), torch.arange(1, 21))
    assert torch.equal(cut(tree, 20), torch.arange(20))
    assert not cut(tree, 1).any()
    for count in range(1, 20):
        coarse, fine = cut(tree, count), cut(tree, count + 1)
        assert coarse.unique().tolist() == list(range(count))
        assert all(len(coarse[fine == g].unique()) == 1 for g in range(count + 1))
        # Numbered by their first clusters.
        firsts = [int((coarse == g).nonzero()[0]) for g in range(count)]
        assert firsts == sorted(firsts)
    assert cut(ward(points(1), torch.ones(1)), 1).tolist() == [0]


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="count must be 1 to 4, the clusters, got 5"):
        cut(ward(points(4), torch.ones(4)), 5)
    with pytest.raises(ValueError, match="count must be 1 to 4, the clusters, got 0"):
        cut(ward(points(4), torch.ones(4)), 0)
    with pytest.raises(ValueError, match=r"\[K, K\] and \[K\], got \[4, 4\] and \[3\]"):
        merge(torch.zeros(4, 4), torch.ones(3))
    with pytest.raises(ValueError, match="'ward' or 'average', got 'single'"):
        merge(torch.zeros(4, 4), torch.ones(4), "single")
    with pytest.raises(TypeError, match="count: expected an int, got float"):
        cut(ward(points(4), torch.ones(4)), 1.5)
    far = torch.tensor([[0.0, 1.0, torch.inf], [1.0, 0.0, 1.0], [torch.inf, 1.0, 0.0]])
    with pytest.raises(
        ValueError, match="distances: expected finite values, got NaN or inf in row 0"
    ):
        merge(far, torch.ones(3), "average")
