"""Estimators against scikit-learn's of the same names, on the same graph of nearest neighbours."""

from __future__ import annotations

import warnings

import numpy as np
import sklearn.cluster
import sklearn.manifold
import sklearn.neighbors
from sklearn.metrics import adjusted_rand_score

from bench.harness import opponent
from nefkern.estimators import KNeighborsTransformer, SpectralClustering, SpectralEmbedding

# rows, columns, clusters
SIZES = {"small": (2000, 16, 6), "paper": (20_000, 64, 10), "large": (40_000, 64, 10)}
NEIGHBOURS = 10


def clustered(n: int, columns: int, clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """float64 [n, columns] rows and their clusters, which spread in a few directions of their own
    and touch: the graph is connected, its eigenvalues lie within 1e-3 of 1."""
    random = np.random.default_rng(0)
    centres = 0.08 * random.normal(size=(clusters, columns))
    directions = 2 * random.normal(size=(clusters, 4, columns)) / np.sqrt(columns)
    which = random.integers(clusters, size=n)
    place = random.normal(size=(n, 1, 4))
    rows = centres[which] + (place @ directions[which])[:, 0]
    return rows + 0.1 * random.normal(size=rows.shape), which


def quietly(function):
    """Without the warning that clusters are not connected: they needn't be."""

    def run():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Graph is not fully connected")
            return function()

    return run


def rounds_of(size, request):
    return request.config.getoption("--benchmark-rounds") if size == "small" else 3


def test_clustering(race, size, request):
    n, columns, clusters = SIZES[size]
    rows, truth = clustered(n, columns, clusters)

    def ours(**options):
        return SpectralClustering(clusters, random_state=0, **options).fit_predict(rows)

    def theirs(solver):
        return sklearn.cluster.SpectralClustering(
            clusters,
            affinity="nearest_neighbors",
            n_neighbors=NEIGHBOURS,
            eigen_solver=solver,
            random_state=0,
        ).fit_predict(rows)

    assert adjusted_rand_score(truth, ours()) > 0.99
    contestants = {
        "nefkern": ours,
        "nefkern, K-means as theirs": lambda: ours(assign_labels="kmeans"),
    }
    for solver in ["arpack", *(["amg"] if opponent("pyamg", "pyamg") else [])]:
        contestants[f"scikit-learn {solver}"] = quietly(lambda solver=solver: theirs(solver))
    labels = {name: function() for name, function in contestants.items()}
    for name, found in labels.items():
        print(f"{name}: ARI {adjusted_rand_score(truth, found):.4f}")
    assert adjusted_rand_score(labels["scikit-learn arpack"], labels["nefkern"]) > 0.99
    sizes = {"N": n, "C": columns, "K": clusters, "k": NEIGHBOURS}
    race(
        "SpectralClustering",
        contestants,
        sizes=sizes,
        rounds=rounds_of(size, request),
        clock="wall",
    )


def test_embedding(race, size, request):
    n, columns, clusters = SIZES[size]
    rows, _ = clustered(n, columns, clusters)
    count = clusters + 2

    def ours():
        return SpectralEmbedding(count, n_neighbors=NEIGHBOURS, random_state=0).fit_transform(rows)

    def theirs():
        return sklearn.manifold.SpectralEmbedding(
            count, n_neighbors=NEIGHBOURS, random_state=0
        ).fit_transform(rows)

    sizes = {"N": n, "C": columns, "m": count, "k": NEIGHBOURS}
    contestants = {"nefkern": quietly(ours), "scikit-learn arpack": quietly(theirs)}
    race(
        "SpectralEmbedding", contestants, sizes=sizes, rounds=rounds_of(size, request), clock="wall"
    )


def test_neighbours(race, size, request):
    n, columns, clusters = SIZES[size]
    rows, _ = clustered(n, columns, clusters)
    from sklearn.neighbors import KNeighborsTransformer as Theirs

    ours, theirs = (one(n_neighbors=NEIGHBOURS) for one in (KNeighborsTransformer, Theirs))
    found, expected = ours.fit_transform(rows), theirs.fit_transform(rows)
    np.testing.assert_allclose(
        np.sort(found.data.reshape(n, -1)), np.sort(expected.data.reshape(n, -1)), atol=1e-5
    )
    contestants = {
        "nefkern": lambda: ours.fit_transform(rows),
        "scikit-learn": lambda: theirs.fit_transform(rows),
    }
    sizes = {"N": n, "C": columns, "k": NEIGHBOURS}
    race(
        "KNeighborsTransformer",
        contestants,
        sizes=sizes,
        rounds=rounds_of(size, request),
        clock="wall",
    )


def test_new_rows(race, size):
    """Labels of an eighth as many new rows; scikit-learn would cluster all rows anew."""
    n, columns, clusters = SIZES[size]
    rows, truth = clustered(n + n // 8, columns, clusters)
    found = SpectralClustering(clusters, random_state=0).fit(rows[:n])
    assert adjusted_rand_score(truth[n:], found.predict(rows[n:])) > 0.95
    knn = sklearn.neighbors.KNeighborsClassifier(NEIGHBOURS).fit(rows[:n], found.labels_)
    contestants = {
        "nefkern, Nyström": lambda: found.predict(rows[n:]),
        "scikit-learn k-NN vote": lambda: knn.predict(rows[n:]),
    }
    sizes = {"N": n, "n": n // 8, "C": columns, "K": clusters}
    race("SpectralClustering.predict", contestants, sizes=sizes, rounds=3, clock="wall")
