"""The graph of neighbours against scikit-learn's class of the same name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from scipy.sparse import csr_matrix
from sklearn.datasets import load_wine
from sklearn.manifold import TSNE
from sklearn.neighbors import KNeighborsTransformer as Theirs
from sklearn.pipeline import make_pipeline

from nefkern.estimators import KNeighborsTransformer, SpectralClustering

X = load_wine().data.astype(np.float32)


@pytest.mark.parametrize("mode", ["distance", "connectivity"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_the_matrices_are_scikit_learns(mode, metric):
    ours = KNeighborsTransformer(mode=mode, n_neighbors=6, metric=metric)
    theirs = Theirs(mode=mode, n_neighbors=6, metric=metric)
    for found, expected in (
        (ours.fit_transform(X), theirs.fit_transform(X.astype(float))),
        (ours.transform(X[:9] + 0.5), theirs.transform(X[:9].astype(float) + 0.5)),
    ):
        assert isinstance(found, csr_matrix)
        # By distance, not by index: rows may be equally far to the rounding of float32.
        ours_sorted, theirs_sorted = (
            np.sort(m.data.reshape(m.shape[0], -1)) for m in (found, expected)
        )
        assert_allclose(ours_sorted, theirs_sorted, rtol=1e-4, atol=2e-7)
        common = (found.toarray() != 0) & (expected.toarray() != 0)
        assert common.sum() > 0.99 * (expected.data != 0).sum()
        assert (found.getnnz(1) == 6 + (mode == "distance")).all()


def test_a_row_is_its_own_first_neighbour_even_among_duplicates():
    rows = np.zeros((5, 2), np.float32)
    matrix = KNeighborsTransformer(n_neighbors=2).fit_transform(rows)
    assert (matrix.indices.reshape(5, 3)[:, 0] == np.arange(5)).all()
    assert not matrix.data.any()


def test_lists_as_umap_takes_them():
    found = KNeighborsTransformer(n_neighbors=4).fit(X)
    distances, indices = found.kneighbors(X)
    assert indices.dtype == np.int64
    assert (indices[:, 0] == np.arange(len(X))).all()
    expected = Theirs(n_neighbors=4).fit(X.astype(float))
    assert_allclose(distances, expected.kneighbors(X.astype(float))[0], rtol=1e-4, atol=1e-6)
    others = found.kneighbors(n_neighbors=3, return_distance=False)
    assert (others == indices[:, 1:4]).all()
    tensors = found.kneighbors(torch.from_numpy(X))
    assert torch.equal(tensors[1], torch.from_numpy(indices))


def test_what_takes_scikit_learns_takes_ours():
    flat = make_pipeline(
        KNeighborsTransformer(n_neighbors=45),
        TSNE(metric="precomputed", init="random", perplexity=10, max_iter=250, random_state=0),
    ).fit_transform(X)
    assert flat.shape == (len(X), 2)
    clusters = make_pipeline(
        KNeighborsTransformer(n_neighbors=10),
        SpectralClustering(3, affinity="precomputed_nearest_neighbors", random_state=0),
    ).fit_predict(X)
    direct = SpectralClustering(3, random_state=0).fit_predict(X)
    assert (clusters == direct).all()


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="n_neighbors = 5, n_samples_fit = 4"):
        KNeighborsTransformer(n_neighbors=5).fit_transform(X[:4])
    with pytest.raises(ValueError, match="n_neighbors = 4, n_samples_fit = 4"):
        KNeighborsTransformer(n_neighbors=4).fit(X[:4]).kneighbors()
    fitted = KNeighborsTransformer(n_neighbors=2).fit(X[:4])
    with pytest.raises(
        ValueError, match="<= n_samples_fit, but n_neighbors = 5, n_samples_fit = 4"
    ):
        fitted.kneighbors(X, 5)
    with pytest.raises(ValueError, match="< n_samples_fit, but n_neighbors = 4, n_samples_fit = 4"):
        fitted.kneighbors(n_neighbors=4)
    with pytest.raises(ValueError, match=r"X: expected rows within 3.4e.38 times the fitted"):
        fitted.transform(np.full((2, X.shape[1]), 1e300))
    with pytest.raises(ValueError, match="metric: expected 'euclidean'"):
        KNeighborsTransformer(metric="manhattan").fit(X)
    with pytest.raises(ValueError, match="mode: expected 'distance'"):
        KNeighborsTransformer(mode="weights").fit(X)
    with pytest.raises(ValueError, match="contains NaN"):
        KNeighborsTransformer().fit(X * np.nan)
