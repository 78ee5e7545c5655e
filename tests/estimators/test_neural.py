"""Networks that learn the embedding: close to what they learn from, on new rows too."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits, make_blobs
from sklearn.metrics import adjusted_rand_score

from nefkern.estimators import (
    NeuralSpectralClustering,
    NeuralSpectralEmbedding,
    SpectralEmbedding,
)

DIGITS, DIGIT = load_digits(return_X_y=True)
SMALL = {"hidden_layer_sizes": (64,), "max_iter": 200, "batch_size": 256, "random_state": 0}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_regression_comes_close_to_the_eigenvectors_also_on_new_rows():
    old, new = DIGITS[:1200], DIGITS[1200:]
    exact = SpectralEmbedding(4, random_state=0).fit(old)
    found = NeuralSpectralEmbedding(4, **SMALL | {"max_iter": 500}).fit(old)
    for ours, theirs in (
        (found.embedding_, exact.embedding_),
        (found.transform(new), exact.transform(new)),
    ):
        for column in range(4):
            assert np.corrcoef(ours[:, column], theirs[:, column])[0, 1] > 0.85
        assert 0.8 < ours.std() / theirs.std() < 1.2, "the scale is the eigenvectors'"
    assert np.allclose(found.eigenvalues_, exact.eigenvalues_, atol=1e-6)


def test_neuralef_finds_the_leading_subspace_in_order():
    """Two overlapping pairs of clusters: λ_2 tells the pairs apart, far above λ_3 and λ_4."""
    centres = np.array([[0, 0], [4, 0], [14, 0], [18, 0]])
    rows, truth = make_blobs(1600, centers=centres, cluster_std=1.2, random_state=0)
    options = SMALL | {"max_iter": 300, "n_neighbors": 40}
    found = NeuralSpectralEmbedding(3, loss="neuralef", **options).fit(rows)
    first = found.embedding_[:, 0]
    assert abs(np.corrcoef(first, truth >= 2)[0, 1]) > 0.9
    values = found.eigenvalues_
    assert (np.diff(values) <= 1e-9).all()
    assert values[0] > 0.98
    assert values[0] < 1.0001


@pytest.mark.parametrize(("loss", "least"), [("regression", 0.98), ("neuralef", 0.9)])
def test_clusters_of_training_and_new_rows(loss, least):
    rows, truth = make_blobs(900, 8, centers=5, random_state=0)
    found = NeuralSpectralClustering(5, loss=loss, **SMALL).fit(rows[:600])
    assert adjusted_rand_score(truth[:600], found.labels_) > least
    assert adjusted_rand_score(truth[600:], found.predict(rows[600:])) > least
    assert (found.predict(rows[:600]) == found.labels_).all()


@pytest.mark.parametrize("loss", ["regression", "neuralef"])
def test_the_seed_decides_and_the_global_one_is_left_alone(loss):
    rows = DIGITS[:200]
    options = SMALL | {"max_iter": 20, "loss": loss}
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, two = (NeuralSpectralEmbedding(3, **options).fit(rows) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert (one.embedding_ == two.embedding_).all()
    other = NeuralSpectralEmbedding(3, **options | {"random_state": 1}).fit(rows)
    assert (one.embedding_ != other.embedding_).any()


def test_nothing_of_an_earlier_fit_is_left():
    model = NeuralSpectralEmbedding(n_neighbors=4, max_iter=2, hidden_layer_sizes=(4,))
    rows = np.random.default_rng(0).standard_normal((30, 3))
    model.fit(rows)
    again = clone(model).set_params(loss="neuralef").fit(rows)
    assert vars(model.set_params(loss="neuralef").fit(rows)).keys() == vars(again).keys()


@pytest.mark.filterwarnings("ignore:Graph is not fully connected")
def test_tensors_give_tensors():
    rows = torch.from_numpy(DIGITS[:300]).float()
    found = NeuralSpectralEmbedding(3, **SMALL | {"max_iter": 5})
    assert isinstance(found.fit_transform(rows), torch.Tensor)
    assert found.transform(rows).dtype == torch.float32


@pytest.mark.parametrize("loss", ["regression", "neuralef"])
@pytest.mark.filterwarnings("ignore:Graph is not fully connected")
def test_equal_rows_are_finite(loss):
    found = NeuralSpectralEmbedding(2, loss=loss, **SMALL | {"max_iter": 5})
    assert np.isfinite(found.fit_transform(np.ones((40, 3)))).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "mse"}, "loss: expected 'regression' or 'neuralef', got 'mse'"),
        ({"affinity": "precomputed"}, "affinity: expected 'nearest_neighbors'"),
        ({"max_iter": 0}, "max_iter: expected at least 1, got 0"),
        ({"hidden_layer_sizes": (0,)}, "hidden_layer_sizes: expected at least 1, got 0"),
        ({"n_clusters": 301}, "n_samples=300 should be >= n_clusters=301"),
        ({"n_neighbors": 301}, "n_neighbors = 301, n_samples = 300"),
    ],
)
@pytest.mark.parametrize("loss", ["regression", "neuralef"])
def test_parameters_out_of_range_are_named(options, message, loss):
    with pytest.raises(ValueError, match=message):
        NeuralSpectralClustering(**{"loss": loss} | options).fit(DIGITS[:300])
