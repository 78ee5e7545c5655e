"""Graphs of nearest neighbours, as scikit-learn, scanpy and UMAP exchange them."""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import csr_matrix
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from nefkern.estimators.inputs import Units, device_of, like, valid_rows
from nefkern.ops import checks, knn
from nefkern.spectral.neighbours import knn_blocks

_MODES = ("distance", "connectivity")
_METRICS = {"euclidean": "euclidean", "minkowski": "euclidean", "cosine": "cosine"}


class KNeighborsTransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """The exact graph of nearest neighbours, a drop-in for scikit-learn's class of this name.

    scanpy takes it as ``sc.pp.neighbors(adata, transformer=KNeighborsTransformer(n_neighbors=15))``
    and UMAP what :meth:`kneighbors` returns, as ``precomputed_knn=(indices, distances)``.

    Rows of float64, too, are compared in float32, from their mean on and by their largest entry:
    what differs by less than a ten-millionth of that counts as equal.

    Args:
        mode: "distance": the matrix holds distances; "connectivity": ones.
        n_neighbors: neighbours of a row. As in scikit-learn a row of the training set is its own
            neighbour: in "connectivity" mode it counts, in "distance" mode it comes in addition.
        metric: "euclidean" (or "minkowski", the same), or "cosine": 1 − cosine similarity.

    Attributes:
        n_features_in_, n_samples_fit_: columns and rows seen by ``fit``.
        effective_metric_: "euclidean" or "cosine".
    """

    def __init__(self, *, mode="distance", n_neighbors=5, metric="euclidean"):
        self.mode = mode
        self.n_neighbors = n_neighbors
        self.metric = metric

    def fit(self, X, y=None):
        """Keep the rows ``X``, ``[N, C]``; ``y`` is ignored."""
        checks.choice("mode", self.mode, _MODES)
        checks.choice("metric", self.metric, tuple(_METRICS))
        checks.integer("n_neighbors", self.n_neighbors, 1)
        array = valid_rows(self, X, fitting=True)
        self.effective_metric_ = _METRICS[self.metric]
        self._units = Units.of(array, self.effective_metric_)
        self._rows = self._units.rows(array, device_of(X))
        self._dtype = array.dtype
        self.n_samples_fit_ = self._n_features_out = len(array)
        return self

    def transform(self, X):
        """The neighbours of rows ``[n, C]`` among those fitted, a ``csr_matrix`` ``[n, N]``."""
        check_is_fitted(self)
        return self._matrix(*self._search(X, self.n_neighbors, self.mode == "distance"))

    def fit_transform(self, X, y=None):
        """``fit(X).transform(X)``, at half the work."""
        self.fit(X)
        return self._matrix(*self._search(None, self.n_neighbors, self.mode == "distance"))

    def kneighbors(self, X=None, n_neighbors=None, return_distance=True):
        """Neighbours of every row, nearest first.

        Args:
            X: ``[n, C]``; None: the rows that were fitted, which then are not their own neighbours.
            n_neighbors: how many; None: as many as the parameter says.
            return_distance: whether distances are wanted too.

        Returns:
            distances ``[n, k]`` and indices ``[n, k]`` int64, or the indices only.
        """
        check_is_fitted(self)
        k = self.n_neighbors if n_neighbors is None else n_neighbors
        k = checks.integer("n_neighbors", k, 1)
        distances, indices = self._search(X, k, X is None)
        if X is None:
            distances, indices = distances[:, 1:], indices[:, 1:]
        return (distances, indices) if return_distance else indices

    def _search(self, X, n_neighbors: int, one_more: bool):
        """Distances and indices; of the fitted rows with themselves first if X is None."""
        k = n_neighbors + one_more
        if k > self.n_samples_fit_:
            limit = "<" if one_more else "<="
            raise ValueError(
                f"Expected n_neighbors {limit} n_samples_fit, but n_neighbors = {n_neighbors}, "
                f"n_samples_fit = {self.n_samples_fit_}"
            )
        if X is None:
            values, indices, dtype = *self._among_themselves(k), self._dtype
        else:
            array = valid_rows(self, X, fitting=False)
            new = self._units.rows(array, self._rows.device)
            metric = self.effective_metric_
            values, indices = knn_blocks(new.float(), self._rows, k, metric=metric)
            dtype = array.dtype
        return like(X, self._distances(values), dtype), like(X, indices.long())

    def _among_themselves(self, k: int) -> tuple[Tensor, Tensor]:
        n, cosine = self.n_samples_fit_, self.effective_metric_ == "cosine"
        own = torch.arange(n, dtype=torch.int32, device=self._rows.device)[:, None]
        first = torch.full((n, 1), float(cosine), device=self._rows.device)
        if k == 1:
            return first, own
        values, indices = knn(self._rows, k - 1, metric=self.effective_metric_)
        return torch.cat([first, values], 1), torch.cat([own, indices], 1)

    def _distances(self, values: Tensor) -> Tensor:
        if self.effective_metric_ == "cosine":
            return (1 - values.double()).clamp_min(0)
        return values.double() * self._units.scale

    def _matrix(self, distances, indices) -> csr_matrix:
        distances, indices = (
            np.asarray(torch.as_tensor(one).cpu()) for one in (distances, indices)
        )
        n, k = indices.shape
        data = distances if self.mode == "distance" else np.ones_like(distances)
        shape = (n, self.n_samples_fit_)
        return csr_matrix((data.ravel(), indices.ravel(), np.arange(0, n * k + 1, k)), shape=shape)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags
