"""Spectral embedding and clustering by a small network: new rows cost one forward pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from nefkern.estimators.inputs import Units, device_of, like, seed_of, valid_rows
from nefkern.estimators.spectral import ROW_AFFINITIES, ClusteringMixin, GraphEstimator
from nefkern.ops import checks, quadratic_form
from nefkern.spectral.embedding import AFFINITIES, adjacency, neighbour_lists
from nefkern.spectral.nystrom import degrees
from nefkern.spectral.objective import objective

LOSSES = ("regression", "neuralef")
#: Weight of the penalty where the trace has weight 1: above 1/λ of all eigenvalues λ that count.
_BETA = 4.0
#: Rows whose graph tells the learnt functions apart in the end.
_RITZ_ROWS = 8192
_BLOCK = 16384


class _Standardized(nn.Module):
    """Every channel with mean 0 and variance 1 over the training rows."""

    mean: Tensor
    spread: Tensor

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", rows.mean(0))
        spread = rows.std(0, correction=0)
        self.register_buffer("spread", torch.where(spread > 1e-6, spread, 1))

    def forward(self, rows: Tensor) -> Tensor:
        return (rows - self.mean) / self.spread


def network(rows: Tensor, hidden: tuple[int, ...], outputs: int) -> nn.Sequential:
    """An MLP on standardised rows, on their device."""
    layers: list[nn.Module] = [_Standardized(rows)]
    width = rows.shape[1]
    for size in hidden:
        layers += [nn.Linear(width, size), nn.GELU()]
        width = size
    return nn.Sequential(*layers, nn.Linear(width, outputs)).to(rows.device)


class NeuralEstimator(GraphEstimator):
    """What both share: a network f whose outputs are random-walk eigenvectors D^(-1/2) v."""

    def _learn(self, X, count: int) -> Tensor:
        """Fits the network, and returns its outputs at the rows, ``[N, count]``."""
        checks.choice("affinity", self.affinity, tuple(ROW_AFFINITIES))
        checks.choice("loss", self.loss, LOSSES)
        checks.integer("max_iter", self.max_iter, 1)
        checks.integer("batch_size", self.batch_size, 2)
        sizes = np.atleast_1d(self.hidden_layer_sizes)
        hidden = tuple(checks.integer("hidden_layer_sizes", size, 1) for size in sizes)
        checks.finite_number("learning_rate_init", self.learning_rate_init, 0)
        teacher = self.loss == "regression"
        if teacher:
            self._embed(X, count)
            rows = self.graph_embedding_.rows
            targets = self.graph_embedding_.coordinates()
            del self.graph_embedding_  # the network takes its place
        else:
            if hasattr(self, "residuals_"):  # of an earlier fit
                del self.residuals_
            rows = self._rows_alone(X, count)
        seed = seed_of(self.random_state)
        devices = [rows.device] if rows.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), self._stage("network"):
            torch.manual_seed(seed)
            self._network = network(rows, hidden, count)
            if teacher:
                self._regress(rows, targets)
            else:
                self._train(rows, self._neuralef)
                self._separate(rows)
        self.n_iter_ = self.max_iter
        return self._outputs(rows)

    def _rows_alone(self, X, count: int) -> Tensor:
        checks.integer("n_neighbors", self.n_neighbors, 2)
        array = valid_rows(self, X, fitting=True)
        self._dtype = array.dtype
        self._check_sizes(len(array), count)
        self._units = Units.of(array, AFFINITIES[ROW_AFFINITIES[self.affinity]])
        return self._units.rows(array, device_of(X))

    def _train(self, rows: Tensor, loss) -> None:
        """``max_iter`` steps of Adam on ``loss(rows of a batch, their indices)``."""
        parameters = self._network.parameters()
        optimizer = torch.optim.Adam(parameters, lr=self.learning_rate_init)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.max_iter)
        size = min(self.batch_size, len(rows))
        generator = torch.Generator().manual_seed(torch.initial_seed())
        order = torch.empty(0, dtype=torch.int64)
        for _ in range(self.max_iter):
            if len(order) < size:
                order = torch.randperm(len(rows), generator=generator)
            batch, order = order[:size].to(rows.device), order[size:]
            optimizer.zero_grad(set_to_none=True)
            loss(rows[batch], batch).backward()
            optimizer.step()
            schedule.step()

    def _regress(self, rows: Tensor, targets: Tensor) -> None:
        """Mean squared error to the teacher's coordinates, each scaled to a mean square of 1."""
        scale = targets.square().mean(0).sqrt().clamp_min(torch.finfo(targets.dtype).tiny)
        scaled = targets / scale
        self._train(rows, lambda x, batch: F.mse_loss(self._network(x), scaled[batch]))
        self._then(torch.diag(scale))

    def _neuralef(self, rows: Tensor, _) -> Tensor:
        """The objective of eqs 5-7 on the batch's own graph: U = D^(1/2) f(rows), t = 1."""
        graph, root = self._graph_of(rows)
        psi = root * self._network(rows)
        return objective(psi, graph, beta=_BETA, t=1.0, minimum=1e-6).loss

    def _graph_of(self, rows: Tensor):
        """κ of some rows, and the square roots of their degrees ``[n, 1]``."""
        lists = neighbour_lists(rows, self.n_neighbors - 1, ROW_AFFINITIES[self.affinity])
        degree = degrees(lists.indices, lists.similarities, len(rows))
        return adjacency(lists), degree.sqrt().to(rows.dtype)[:, None]

    @torch.no_grad()
    def _separate(self, rows: Tensor) -> None:
        """Rayleigh-Ritz on a large sample: the functions become orthonormal, ordered by value."""
        generator = torch.Generator().manual_seed(torch.initial_seed())
        sample = torch.randperm(len(rows), generator=generator)[:_RITZ_ROWS].sort().values
        rows = rows[sample.to(rows.device)]
        graph, root = self._graph_of(rows)
        u = root * self._outputs(rows)
        u, kept = _orthonormalized(u)
        values, rotation = torch.linalg.eigh(quadratic_form(u, graph).double().cpu())
        self.eigenvalues_ = values.flip(0).numpy()
        self._then(kept @ rotation.flip(1).to(kept))

    def _then(self, matrix: Tensor) -> None:
        """Multiplies the network's outputs by a matrix: one more linear layer, folded into the last
        one."""
        last: Any = self._network[-1]
        with torch.no_grad():
            matrix = matrix.to(last.weight.dtype)
            last.weight.copy_(matrix.T @ last.weight)
            last.bias.copy_(last.bias @ matrix)

    @torch.no_grad()
    def _outputs(self, rows: Tensor) -> Tensor:
        return torch.cat([self._network(block) for block in rows.split(_BLOCK)])

    def _coordinates(self, X) -> Tensor:
        array = valid_rows(self, X, fitting=False)
        device = next(self._network.parameters()).device
        return self._outputs(self._units.rows(array, device))


class NeuralSpectralEmbedding(ClassNamePrefixFeaturesOutMixin, TransformerMixin, NeuralEstimator):
    """Laplacian eigenmaps as a network: ``transform`` needs neither the rows nor their graph.

    Args:
        n_components, affinity, n_neighbors, random_state, eigen_tol, verbose: as for
            :class:`nefkern.estimators.SpectralEmbedding`, but affinities are of rows; the random
            state also seeds the network.
        loss: "regression": the network learns the exact eigenvectors of the graph of all rows;
            "neuralef": it maximises the NeuralEF objective on graphs of batches, never seeing all
            rows at once (Deng, Luo, ICCV 2023, eqs 5-7).
        hidden_layer_sizes: of the MLP.
        max_iter: steps of Adam, whose learning rate falls from ``learning_rate_init`` to 0 on a
            cosine.
        batch_size: rows a step.
        learning_rate_init: of the first step.

    Attributes:
        embedding_: ``[N, n_components]``, the network's.
        eigenvalues_: those of the graph ("regression"), or of a sample's restricted to the learnt
            functions ("neuralef"); the constant one included.
        n_iter_: steps taken.
    """

    def __init__(
        self,
        n_components=2,
        *,
        affinity="nearest_neighbors",
        n_neighbors=10,
        loss="regression",
        hidden_layer_sizes=(256, 256),
        max_iter=1000,
        batch_size=512,
        learning_rate_init=1e-3,
        random_state=None,
        eigen_tol="auto",
        verbose=False,
    ):
        self.n_components = n_components
        self.affinity = affinity
        self.n_neighbors = n_neighbors
        self.loss = loss
        self.hidden_layer_sizes = hidden_layer_sizes
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.learning_rate_init = learning_rate_init
        self.random_state = random_state
        self.eigen_tol = eigen_tol
        self.verbose = verbose

    def fit(self, X, y=None):
        """Learn from rows ``[N, C]``; ``y`` is ignored."""
        outputs = self._learn(X, checks.integer("n_components", self.n_components, 1) + 1)
        self.embedding_ = like(None, outputs[:, 1:], self._dtype)
        self._n_features_out = self.n_components
        return self

    def fit_transform(self, X, y=None):
        """``fit(X)`` and the embedding, as a tensor if X is one."""
        self.fit(X)
        return like(X, self.embedding_)

    def transform(self, X):
        """Coordinates of rows ``[n, C]``, ``[n, n_components]``."""
        check_is_fitted(self)
        return like(X, self._coordinates(X)[:, 1:], self._dtype)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


class NeuralSpectralClustering(ClusteringMixin, NeuralEstimator):
    """Spectral clustering as a network: K-means on the outputs of a learnt embedding.

    Args:
        n_clusters, n_components, n_init, assign_labels: as for
            :class:`nefkern.estimators.SpectralClustering`; all others as for
            :class:`NeuralSpectralEmbedding`.

    Attributes:
        labels_: int32 ``[N]``, of the network's outputs.
        eigenvalues_, n_iter_: as for :class:`NeuralSpectralEmbedding`.
    """

    def __init__(
        self,
        n_clusters=8,
        *,
        n_components=None,
        affinity="nearest_neighbors",
        n_neighbors=10,
        loss="regression",
        hidden_layer_sizes=(256, 256),
        max_iter=1000,
        batch_size=512,
        learning_rate_init=1e-3,
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
        self.loss = loss
        self.hidden_layer_sizes = hidden_layer_sizes
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.learning_rate_init = learning_rate_init
        self.random_state = random_state
        self.n_init = n_init
        self.eigen_tol = eigen_tol
        self.assign_labels = assign_labels
        self.verbose = verbose

    def fit(self, X, y=None):
        """Learn from rows ``[N, C]``; ``y`` is ignored."""
        count = self._check_clusters()
        if self.n_components is not None:
            count = checks.integer("n_components", self.n_components, 1)
        self._cluster(self._learn(X, count))
        return self

    def predict(self, X):
        """The cluster of each row ``[n, C]``, int32 ``[n]``."""
        check_is_fitted(self)
        return self._nearest_centres(X, self._coordinates(X))

    def _check_sizes(self, rows: int, count: int, *, neighbours: bool = True) -> None:
        self._check_count(rows)
        super()._check_sizes(rows, count, neighbours=neighbours)


def _orthonormalized(u: Tensor) -> tuple[Tensor, Tensor]:
    """U M with orthonormal columns, and M ``[K, K]``; 0 in directions that U lacks."""
    values, vectors = torch.linalg.eigh(u.double().T @ u.double())
    least = 1e-10 * values.amax().clamp_min(torch.finfo(values.dtype).tiny)
    matrix = vectors * torch.where(values > least, values.clamp_min(least).rsqrt(), 0)
    return (u.double() @ matrix).to(u.dtype), matrix
