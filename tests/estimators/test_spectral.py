"""Exact spectral embedding and clustering against scikit-learn, new rows, and odd input."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from scipy import sparse
from sklearn.cluster import SpectralClustering as TheirClustering
from sklearn.datasets import load_digits, make_blobs, make_circles, make_moons
from sklearn.exceptions import ConvergenceWarning
from sklearn.manifold import SpectralEmbedding as TheirEmbedding
from sklearn.metrics import adjusted_rand_score
from sklearn.neighbors import kneighbors_graph

from nefkern.estimators import SpectralClustering, SpectralEmbedding
from nefkern.ops import CSRGraph

DIGITS, DIGIT = load_digits(return_X_y=True)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def blobs(n: int = 400, seed: int = 0):
    return make_blobs(n, 8, centers=5, cluster_std=1.0, random_state=seed)


def affinities(rows: np.ndarray, k: int = 10):
    """scikit-learn's matrix of nearest neighbours."""
    graph = kneighbors_graph(rows, k, include_self=True)
    return 0.5 * (graph + graph.T)


def signed(vectors: np.ndarray) -> np.ndarray:
    return vectors * np.sign(vectors[np.abs(vectors).argmax(0), np.arange(vectors.shape[1])])


# ---- against scikit-learn on the same graph ----


@pytest.mark.parametrize(
    ("rows", "clusters"),
    [
        (blobs()[0], 5),
        (make_moons(1000, noise=0.06, random_state=0)[0], 2),
        (make_circles(1000, factor=0.5, noise=0.05, random_state=0)[0], 2),
    ],
    ids=["blobs", "moons", "circles"],
)
@pytest.mark.parametrize("assign_labels", ["kmeans", "unit_kmeans"])
@pytest.mark.filterwarnings("ignore:Graph is not fully connected")
def test_separated_clusters_are_scikit_learns(rows, clusters, assign_labels):
    theirs = TheirClustering(clusters, affinity="nearest_neighbors", random_state=0)
    ours = SpectralClustering(clusters, assign_labels=assign_labels, random_state=0)
    assert adjusted_rand_score(theirs.fit_predict(rows), ours.fit_predict(rows)) == 1


def test_digits_are_scikit_learns_with_their_assignment_and_better_with_ours():
    theirs = TheirClustering(10, affinity="nearest_neighbors", random_state=0).fit_predict(DIGITS)
    same = SpectralClustering(10, assign_labels="kmeans", random_state=0).fit_predict(DIGITS)
    assert adjusted_rand_score(theirs, same) > 0.95
    ours = SpectralClustering(10, random_state=0).fit_predict(DIGITS)
    assert adjusted_rand_score(DIGIT, ours) > adjusted_rand_score(DIGIT, theirs) + 0.03


def test_coordinates_are_scikit_learns():
    noise = np.random.default_rng(0).normal(size=(500, 64))
    rows = DIGITS[:500] + 0.1 * noise  # no ties among neighbours
    theirs = TheirEmbedding(4, n_neighbors=10, eigen_tol=0, random_state=0).fit_transform(rows)
    ours = SpectralEmbedding(4, random_state=0, eigen_tol=1e-7).fit(rows)
    scale = np.abs(theirs).max()
    assert_allclose(signed(ours.embedding_), signed(theirs), atol=1e-4 * scale)
    assert ours.eigenvalues_.shape == ours.residuals_.shape == (5,)
    assert ours.eigenvalues_[0] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", ["array", "csr", "csc", "tensor", "sparse tensor", "graph"])
def test_a_precomputed_affinity_in_every_form(kind):
    rows, _ = blobs()
    matrix = sparse.csr_matrix(affinities(rows))
    given = {
        "array": matrix.toarray,
        "csr": lambda: matrix,
        "csc": matrix.tocsc,
        "tensor": lambda: torch.from_numpy(matrix.toarray()),
        "sparse tensor": lambda: torch.from_numpy(matrix.toarray()).to_sparse_csr(),
        "graph": lambda: CSRGraph.from_scipy(matrix),
    }[kind]()
    found = SpectralClustering(5, affinity="precomputed", random_state=0).fit(given)
    direct = SpectralClustering(5, random_state=0).fit(rows)
    assert adjusted_rand_score(found.labels_, direct.labels_) == 1
    assert_allclose(found.eigenvalues_, direct.eigenvalues_, atol=1e-4)


# ---- new rows ----


@pytest.mark.parametrize("affinity", ["nearest_neighbors", "cosine", "gaussian"])
def test_new_rows_join_the_cluster_they_come_from(affinity):
    rows, truth = blobs(600)
    found = SpectralClustering(5, affinity=affinity, random_state=0).fit(rows[:400])
    assert adjusted_rand_score(truth[400:], found.predict(rows[400:])) > 0.98
    assert (found.predict(rows[:400]) == found.labels_).all()


def test_held_out_digits_are_clustered_as_well_as_the_others():
    found = SpectralClustering(10, random_state=0).fit(DIGITS[:1200])
    inside = adjusted_rand_score(DIGIT[:1200], found.labels_)
    outside = adjusted_rand_score(DIGIT[1200:], found.predict(DIGITS[1200:]))
    assert outside > inside - 0.1
    assert outside > 0.65


def test_new_coordinates_are_near_those_of_a_fit_with_them():
    """A curve, sampled densely: the extension interpolates it."""
    turn = np.linspace(0, 3, 801)
    rows = np.stack([turn, np.sin(turn)], 1)
    old, new = rows[::2], rows[1::2]
    found = SpectralEmbedding(2, random_state=0, eigen_tol=1e-8).fit(old)
    middle = (found.embedding_[:-1] + found.embedding_[1:]) / 2
    error = np.abs(found.transform(new) - middle)
    assert error.max() < 0.05 * np.abs(found.embedding_).max()


@pytest.mark.parametrize("affinity", ["precomputed", "precomputed_nearest_neighbors"])
def test_new_rows_by_what_they_are_to_the_old_ones(affinity):
    rows, truth = blobs(500)
    old, new = rows[:400], rows[400:]
    between = np.linalg.norm(new[:, None] - old[None], axis=2)
    among = np.linalg.norm(old[:, None] - old[None], axis=2)
    if affinity == "precomputed":
        between, among = np.exp(-(between**2)), np.exp(-(among**2))
    found = SpectralClustering(5, affinity=affinity, random_state=0).fit(among)
    assert adjusted_rand_score(truth[:400], found.labels_) == 1
    assert adjusted_rand_score(truth[400:], found.predict(between)) == 1
    assert (found.predict(sparse.csr_array(between)) == found.predict(between)).all()


def test_new_rows_change_nothing_of_the_estimator():
    """Not the dtype of its results either, which is that of the fit."""
    rows = blobs(60)[0]
    affinities = np.exp(-np.linalg.norm(rows[:, None] - rows[None], axis=2))
    for affinity, given in (("precomputed", affinities), ("nearest_neighbors", rows)):
        found = SpectralEmbedding(2, affinity=affinity, n_neighbors=50, random_state=0).fit(given)
        before = dict(vars(found))
        assert found.transform(given[:5].astype(np.float32)).dtype == given.dtype
        assert vars(found) == before


# ---- kinds of input ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.filterwarnings("ignore:Graph is not fully connected")
def test_tensors_give_tensors(dtype):
    rows = torch.from_numpy(blobs()[0]).to(dtype)
    clustering = SpectralClustering(5, random_state=0)
    labels = clustering.fit_predict(rows)
    assert isinstance(labels, torch.Tensor)
    assert torch.equal(clustering.predict(rows), labels)
    expected = clustering.fit_predict(rows.float().numpy())
    assert adjusted_rand_score(expected, labels.numpy()) == 1
    embedding = SpectralEmbedding(3, random_state=0)
    found = embedding.fit_transform(rows)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert found.dtype == embedding.transform(rows[:5]).dtype == wide
    assert isinstance(embedding.embedding_, np.ndarray)


def test_neither_the_origin_nor_the_unit_of_the_rows_matters():
    rows, _ = blobs()
    plain = SpectralClustering(5, random_state=0).fit(rows)
    for moved in (rows + 1e6, rows * 1e30, rows * 1e-30):
        found = SpectralClustering(5, random_state=0).fit(moved)
        assert adjusted_rand_score(plain.labels_, found.labels_) == 1
        assert (found.predict(moved) == found.labels_).all()


@pytest.mark.filterwarnings("ignore:Graph is not fully connected")
def test_a_seed_decides_and_a_pickle_keeps():
    rows, _ = blobs()
    one, two = (SpectralEmbedding(3, random_state=3).fit(rows) for _ in range(2))
    assert (one.embedding_ == two.embedding_).all()
    new = rows[:50] + 0.1
    assert (pickle.loads(pickle.dumps(one)).transform(new) == one.transform(new)).all()


def test_stages_are_printed_when_asked(capsys):
    SpectralClustering(5, random_state=0, verbose=True).fit(blobs()[0])
    printed = capsys.readouterr().out
    for stage in ("nearest neighbours", "graph and eigenvectors", "K-means"):
        assert stage in printed


# ---- odd input ----


def test_as_many_clusters_as_rows_but_no_more():
    rows = blobs(12)[0]
    found = SpectralClustering(12, n_neighbors=5, random_state=0).fit(rows)
    assert len(set(found.labels_)) == 12
    with pytest.raises(ValueError, match="n_samples=12 should be >= n_clusters=13"):
        SpectralClustering(13, n_neighbors=5).fit(rows)
    with pytest.raises(ValueError, match=r"n_components=12.*at most n_samples = 12 .*got 13"):
        SpectralEmbedding(12, n_neighbors=5).fit(rows)


def test_more_neighbours_than_rows_are_refused():
    rows = blobs(9)[0]
    with pytest.raises(ValueError, match="n_neighbors <= n_samples, but n_neighbors = 10, n_sa"):
        SpectralClustering(2).fit(rows)
    SpectralClustering(2, n_neighbors=9).fit(rows)


@pytest.mark.parametrize("affinity", ["nearest_neighbors", "cosine", "gaussian"])
@pytest.mark.filterwarnings("ignore:Graph is not fully connected")
@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_equal_and_zero_rows(affinity):
    for rows in (np.ones((30, 3)), np.zeros((30, 3)), np.repeat(np.eye(3), 20, axis=0)):
        found = SpectralClustering(3, affinity=affinity, random_state=0).fit(rows)
        assert found.labels_.shape == (len(rows),)
        assert np.isfinite(SpectralEmbedding(2, affinity=affinity).fit_transform(rows)).all()
        assert np.isfinite(SpectralEmbedding(2, affinity=affinity).fit(rows).transform(rows)).all()
    assert adjusted_rand_score(np.repeat([0, 1, 2], 20), found.labels_) == 1


def test_parts_that_are_not_connected():
    cloud = np.random.default_rng(0).normal(size=(50, 2))
    rows = np.concatenate([cloud, 1000 + cloud])
    truth = np.repeat([0, 1], 50)
    found = SpectralClustering(2, random_state=0).fit(rows)
    assert adjusted_rand_score(truth, found.labels_) == 1
    with pytest.warns(UserWarning, match=r"Graph is not fully connected \(\d+ parts\)"):
        SpectralEmbedding().fit(rows)


def test_a_matrix_that_is_not_an_affinity():
    fit = SpectralClustering(2, affinity="precomputed").fit
    with pytest.raises(ValueError, match=r"expected a square matrix, got shape \(4, 3\)"):
        fit(np.ones((4, 3)))
    with pytest.raises(ValueError, match="Negative values in data passed to SpectralClustering"):
        fit(-np.ones((4, 4)))
    with pytest.warns(UserWarning, match="not symmetric"):
        fit(np.triu(np.ones((4, 4))))
    with pytest.warns(ConvergenceWarning, match="Number of distinct clusters"):
        found = SpectralClustering(2, affinity="precomputed", random_state=0).fit(np.zeros((4, 4)))
    assert found.labels_.shape == (4,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"affinity": "rbf"}, "affinity: expected 'nearest_neighbors' or 'cosine'"),
        ({"n_neighbors": 1}, "n_neighbors: expected at least 2, got 1"),
        ({"n_clusters": 0}, "n_clusters: expected at least 1, got 0"),
        ({"n_init": 0}, "n_init: expected at least 1, got 0"),
        ({"assign_labels": "discretize"}, "assign_labels: expected 'unit_kmeans' or 'kmeans'"),
        ({"eigen_tol": -1}, "eigen_tol: expected a finite number of at least 0"),
        ({"eigen_tol": 1.5}, "eigen_tol: expected 'auto' or a number from 0 to below 1, got 1.5"),
    ],
)
def test_parameters_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SpectralClustering(**options).fit(blobs()[0])


def test_values_that_are_not_finite_are_refused():
    rows = blobs()[0]
    found = SpectralClustering(5, random_state=0).fit(rows)
    rows[3, 2] = np.nan
    for call in (found.predict, SpectralClustering(5).fit, SpectralEmbedding().fit):
        with pytest.raises(ValueError, match="Input X contains NaN"):
            call(rows)
