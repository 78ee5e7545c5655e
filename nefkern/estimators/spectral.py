"""Spectral embedding and clustering by exact eigenvectors, for new rows too."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    ClusterMixin,
    TransformerMixin,
)
from sklearn.cluster import KMeans
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, check_symmetric, validate_data
from torch import Tensor

from nefkern.estimators.inputs import Units, as_array, device_of, like, seed_of, valid_rows
from nefkern.ops import CSRGraph, checks
from nefkern.spectral.embedding import (
    AFFINITIES,
    Embedding,
    NeighbourLists,
    embed_adjacency,
    embed_lists,
    neighbour_lists,
)

#: scikit-learn's name for connectivity, and ours for the others.
ROW_AFFINITIES = {"nearest_neighbors": "connectivity", "cosine": "cosine", "gaussian": "gaussian"}
PRECOMPUTED = ("precomputed", "precomputed_nearest_neighbors")
LABELS = ("unit_kmeans", "kmeans")
#: Residual that "auto" asks for: long thin clusters have eigenvalues within 1e-5 of each other.
EIGEN_TOL = 1e-5


class GraphEstimator(BaseEstimator):
    """What embedding and clustering share: from X to eigenpairs, and their values at new rows."""

    def _embed(self, X, count: int) -> None:
        """Sets ``graph_embedding_`` of ``count`` eigenpairs, and what describes it."""
        checks.choice("affinity", self.affinity, (*ROW_AFFINITIES, *PRECOMPUTED))
        checks.integer("n_neighbors", self.n_neighbors, 2)
        options = {"tol": self._tolerance(), "seed": seed_of(self.random_state)}
        if self.affinity in ROW_AFFINITIES:
            self.graph_embedding_ = self._of_rows(X, count, options)
        elif self.affinity == "precomputed":
            self.graph_embedding_ = self._of_affinities(X, count, options)
        else:
            self.graph_embedding_ = self._of_distances(X, count, options)
        self.eigenvalues_ = self.graph_embedding_.values.numpy()
        self.residuals_ = self.graph_embedding_.residuals.numpy()

    def _tolerance(self) -> float:
        if self.eigen_tol == "auto":
            return EIGEN_TOL
        tol = checks.finite_number("eigen_tol", self.eigen_tol, 0)
        if tol >= 1:
            raise ValueError(f"eigen_tol: expected 'auto' or a number from 0 to below 1, got {tol}")
        return tol

    def _of_rows(self, X, count: int, options: dict) -> Embedding:
        array = valid_rows(self, X, fitting=True)
        self._dtype = array.dtype
        self._check_sizes(len(array), count)
        affinity = ROW_AFFINITIES[self.affinity]
        with self._stage("nearest neighbours"):
            self._units = Units.of(array, AFFINITIES[affinity])
            rows = self._units.rows(array, device_of(X))
            lists = neighbour_lists(rows, self.n_neighbors - 1, affinity)
        self._check_connected(lambda: _as_graph(lists, len(rows)))
        with self._stage("graph and eigenvectors"):
            found = embed_lists(lists, count, **options)
        return dataclasses.replace(
            found, rows=rows, widths=lists.widths, k=self.n_neighbors - 1, affinity=affinity
        )

    def _of_affinities(self, X, count: int, options: dict) -> Embedding:
        matrix = self._valid_matrix(X, fitting=True)
        self._check_sizes(matrix.shape[0], count, neighbours=False)
        matrix = sparse.csr_array(check_symmetric(matrix, raise_warning=True))
        self._check_connected(lambda: matrix)
        graph = CSRGraph.from_scipy(matrix, symmetric=True).to(device_of(X))
        with self._stage("eigenvectors"):
            return embed_adjacency(graph, count, **options)

    def _of_distances(self, X, count: int, options: dict) -> Embedding:
        matrix = self._valid_matrix(X, fitting=True)
        self._check_sizes(matrix.shape[0], count)
        lists = _nearest(matrix, self.n_neighbors - 1, own=True, device=device_of(X))
        self._check_connected(lambda: _as_graph(lists, matrix.shape[0]))
        with self._stage("graph and eigenvectors"):
            return embed_lists(lists, count, **options)

    def _check_sizes(self, rows: int, count: int, *, neighbours: bool = True) -> None:
        if neighbours and self.n_neighbors > rows:
            raise ValueError(
                f"Expected n_neighbors <= n_samples, but n_neighbors = {self.n_neighbors}, "
                f"n_samples = {rows}"
            )
        if count > rows:
            raise ValueError(
                f"n_components={self.n_components}: expected at most n_samples = {rows} "
                f"eigenvectors, got {count}"
            )

    def _check_connected(self, graph: Callable[[], sparse.csr_array]) -> None:
        """Warns of a graph in parts, where coordinates are wanted: clusters may well be parts."""
        if not isinstance(self, TransformerMixin):
            return
        parts = connected_components(graph(), directed=False, return_labels=False)
        if parts > 1:
            warnings.warn(
                f"Graph is not fully connected ({parts} parts): the first coordinates tell the "
                "parts apart, and which direction among them is left out is arbitrary.",
                stacklevel=5,
            )

    def _valid_matrix(self, X, *, fitting: bool):
        """A checked matrix of affinities or distances, ``[n, N]``, N = n when fitting."""
        matrix = validate_data(
            self,
            as_array(X),
            accept_sparse="csr",
            dtype=[np.float64, np.float32],
            reset=fitting,
            ensure_min_samples=2 if fitting else 1,
        )
        if fitting and matrix.shape[0] != matrix.shape[1]:
            raise ValueError(
                f"affinity={self.affinity!r}: expected a square matrix, got shape {matrix.shape}"
            )
        if matrix.shape[0] and matrix.min() < 0:
            name = type(self).__name__
            raise ValueError(
                f"Negative values in data passed to {name} with affinity={self.affinity!r}"
            )
        if fitting:
            self._dtype = matrix.dtype
        return matrix

    def _coordinates(self, X) -> Tensor:
        """Random-walk eigenvectors at new rows, ``[n, m]``; a row that was fitted has its own."""
        found = self.graph_embedding_
        if self.affinity in ROW_AFFINITIES:
            array = valid_rows(self, X, fitting=False)
            new = self._units.rows(array, found.vectors.device)
            lists = found.neighbours(new)
            same = found.same_rows(new, lists)
        else:
            matrix = self._valid_matrix(X, fitting=False)
            if self.affinity == "precomputed":
                lists = _padded(sparse.csr_array(matrix), found.vectors.device)
            else:
                count = self.n_neighbors - 1
                lists = _nearest(matrix, count, own=False, device=found.vectors.device)
            same = torch.full((len(lists.indices),), -1, device=found.vectors.device)
        new = found.extend_coordinates(lists)
        known = same >= 0
        new[known] = found.coordinates()[same[known]]
        return new

    @contextmanager
    def _stage(self, name: str):
        start = time.perf_counter()
        yield
        if self.verbose:
            print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        given = self.affinity in PRECOMPUTED
        tags.input_tags.sparse = tags.input_tags.pairwise = tags.input_tags.positive_only = given
        return tags


class SpectralEmbedding(ClassNamePrefixFeaturesOutMixin, TransformerMixin, GraphEstimator):
    """Laplacian eigenmaps of the graph of nearest neighbours, with ``transform`` for new rows.

    As scikit-learn's class: with the same graph the same coordinates, D^(-1/2) v of the leading
    eigenvectors v of D^(-1/2) A D^(-1/2), without the first, constant one; signs may differ.

    Args:
        n_components: eigenvectors.
        affinity: "nearest_neighbors": 1 between neighbours; "cosine": cosine similarity of
            neighbours by angle; "gaussian": exp(−d²/(σ_i σ_j)) of the distance d, σ a row's
            distance to its last neighbour; "precomputed": X is the matrix of similarities,
            symmetric, of which the diagonal is not used; "precomputed_nearest_neighbors": X is a
            sparse matrix of distances, as a ``KNeighborsTransformer`` makes it.
        n_neighbors: neighbours of a row, itself counted, as in scikit-learn.
        random_state: of the solver's random start.
        eigen_tol: residual of the eigenvectors, a share of the norm of the matrix; "auto" is 1e-5.
        verbose: whether to print the seconds of each stage.

    Attributes:
        embedding_: ``[N, n_components]``.
        eigenvalues_, residuals_: of D^(-1/2) A D^(-1/2), descending from 1, the first one included;
            |κv − θv| of each.
        graph_embedding_: eigenpairs and rows (:class:`nefkern.spectral.embedding.Embedding`).
        n_features_in_: columns of X.
    """

    def __init__(
        self,
        n_components=2,
        *,
        affinity="nearest_neighbors",
        n_neighbors=10,
        random_state=None,
        eigen_tol="auto",
        verbose=False,
    ):
        self.n_components = n_components
        self.affinity = affinity
        self.n_neighbors = n_neighbors
        self.random_state = random_state
        self.eigen_tol = eigen_tol
        self.verbose = verbose

    def fit(self, X, y=None):
        """Embed ``X``: rows ``[N, C]``, or what ``affinity`` says; ``y`` is ignored."""
        count = checks.integer("n_components", self.n_components, 1) + 1
        self._embed(X, count)
        coordinates = self.graph_embedding_.coordinates()[:, 1:]
        self.embedding_ = like(None, coordinates, self._dtype)
        self._n_features_out = self.n_components
        return self

    def fit_transform(self, X, y=None):
        """``fit(X)`` and the embedding, as a tensor if X is one."""
        self.fit(X)
        return like(X, self.embedding_)

    def transform(self, X):
        """Coordinates of rows ``[n, C]``, ``[n, n_components]``, by Nyström's extension.

        A row that was fitted has its own; columns of eigenvalues that are not positive are 0. With
        a precomputed affinity, ``X`` is ``[n, N]``: similarities or distances to the fitted rows.
        Those don't say whether a row was fitted itself, so that it counts as new.
        """
        check_is_fitted(self)
        return like(X, self._coordinates(X)[:, 1:], self._dtype)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


class ClusteringMixin(ClusterMixin):
    """K-means on coordinates, and the nearest centre for new ones."""

    def _cluster(self, coordinates: Tensor) -> None:
        state = check_random_state(self.random_state)
        n_init = checks.integer("n_init", self.n_init, 1)
        kmeans = KMeans(self.n_clusters, n_init=n_init, random_state=state)
        with self._stage("K-means"):
            self.labels_ = kmeans.fit_predict(self._points(coordinates))
        self._kmeans = kmeans

    def _points(self, coordinates: Tensor) -> np.ndarray:
        unit = self.assign_labels == "unit_kmeans"
        return (F.normalize(coordinates) if unit else coordinates).float().cpu().numpy()

    def _nearest_centres(self, X, coordinates: Tensor):
        return like(X, self._kmeans.predict(self._points(coordinates)))

    def _check_clusters(self) -> int:
        checks.choice("assign_labels", self.assign_labels, LABELS)
        return checks.integer("n_clusters", self.n_clusters, 1)

    def _check_count(self, rows: int) -> None:
        if self.n_clusters > rows:
            raise ValueError(f"n_samples={rows} should be >= n_clusters={self.n_clusters}.")

    def fit_predict(self, X, y=None):
        """``fit(X)`` and the labels, as a tensor if X is one; ``y`` is ignored."""
        self.fit(X)
        return like(X, self.labels_)


class SpectralClustering(ClusteringMixin, GraphEstimator):
    """Spectral clustering on the graph of nearest neighbours, with ``predict`` for new rows.

    With ``assign_labels="kmeans"`` what scikit-learn's class computes on the same graph.

    Args:
        n_clusters: K.
        n_components: eigenvectors; None: K.
        affinity, n_neighbors, random_state, eigen_tol, verbose: as for :class:`SpectralEmbedding`;
            the random state also seeds K-means.
        n_init: how often K-means starts; the best counts.
        assign_labels: "unit_kmeans": K-means on rows of unit length (Ng, Jordan, Weiss, "On
            spectral clustering", NIPS 2001), where the size of a row, which tells how well it is
            connected, is no reason to be a cluster; "kmeans": on D^(-1/2) v, as scikit-learn.

    Attributes:
        labels_: int32 ``[N]``.
        eigenvalues_, residuals_, graph_embedding_, n_features_in_: as for
            :class:`SpectralEmbedding`.
    """

    def __init__(
        self,
        n_clusters=8,
        *,
        n_components=None,
        affinity="nearest_neighbors",
        n_neighbors=10,
        random_state=None,
        n_init=10,
        eigen_tol="auto",
        assign_labels="unit_kmeans",
        verbose=False,
    ):
        self.n_clusters = n_clusters
        self.n_components = n_components
        self.affinity = affinity
        self.n_neighbors = n_neighbors
        self.random_state = random_state
        self.n_init = n_init
        self.eigen_tol = eigen_tol
        self.assign_labels = assign_labels
        self.verbose = verbose

    def fit(self, X, y=None):
        """Cluster ``X``: rows ``[N, C]``, or what ``affinity`` says; ``y`` is ignored."""
        count = self._check_clusters()
        if self.n_components is not None:
            count = checks.integer("n_components", self.n_components, 1)
        self._embed(X, count)
        self._cluster(self.graph_embedding_.coordinates())
        return self

    def predict(self, X):
        """The cluster of each row ``[n, C]``: that of the centre nearest to its coordinates, which
        :meth:`SpectralEmbedding.transform` describes. int32 ``[n]``."""
        check_is_fitted(self)
        return self._nearest_centres(X, self._coordinates(X))

    def _check_sizes(self, rows: int, count: int, *, neighbours: bool = True) -> None:
        self._check_count(rows)
        super()._check_sizes(rows, count, neighbours=neighbours)


def _as_graph(lists: NeighbourLists, rows: int) -> sparse.csr_array:
    """Edges as a matrix, for its components."""
    edge = (lists.similarities > 0).cpu()
    offsets = np.concatenate([[0], edge.sum(1).cumsum(0).numpy()])
    columns = lists.indices.cpu()[edge].numpy()
    return sparse.csr_array((np.ones(len(columns), np.int8), columns, offsets), (rows, rows))


def _padded(matrix: sparse.csr_array, device: torch.device) -> NeighbourLists:
    """Rows of a sparse matrix of similarities as lists as long as the longest."""
    lengths = np.diff(matrix.indptr)
    places = np.arange(lengths.max(initial=0)) < lengths[:, None]
    indices = np.full(places.shape, -1, np.int32)
    values = np.zeros(places.shape, np.float32)
    indices[places], values[places] = matrix.indices, matrix.data
    return NeighbourLists(
        torch.from_numpy(indices).to(device), torch.from_numpy(values).to(device), None
    )


def _nearest(matrix, count: int, *, own: bool, device: torch.device) -> NeighbourLists:
    """The ``count`` nearest of each row of a matrix of distances, similarity 1, ties to the lower
    index; without the diagonal if ``own``. Explicit zeros of a sparse matrix are distances."""
    if not sparse.issparse(matrix):
        columns = np.broadcast_to(np.arange(matrix.shape[1]), matrix.shape)
        rows = np.repeat(np.arange(matrix.shape[0]), matrix.shape[1])
        entries = rows, columns.ravel(), np.asarray(matrix).ravel()
    else:
        coo = matrix.tocoo()
        entries = coo.row, coo.col, coo.data
    rows, columns, distances = (part[entries[0] != entries[1]] if own else part for part in entries)
    order = np.lexsort((columns, distances, rows))
    rows, columns = rows[order], columns[order]
    offsets = np.searchsorted(rows, np.arange(matrix.shape[0] + 1))
    rank = np.arange(len(rows)) - offsets[rows]
    kept = rank < count
    indices = np.full((matrix.shape[0], count), -1, np.int32)
    indices[rows[kept], rank[kept]] = columns[kept]
    if (indices[:, -1] < 0).any() and own:
        warnings.warn(
            f"some rows have fewer than n_neighbors - 1 = {count} neighbours in the matrix",
            stacklevel=4,
        )
    found = torch.from_numpy(indices).to(device)
    return NeighbourLists(found, (found >= 0).float(), None)
