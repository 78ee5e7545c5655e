"""A method put to work: fitted on training images, then cluster logits for any image's maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nefkern.baselines.kmeans import KMeans
from nefkern.baselines.methods import Method


class Clusterer:
    """One method's path from maps to cluster logits.

    Methods with K-means see the training images' maps once, through :meth:`observe`: the first
    ``sample_rows`` patches become the sample that K-means is fitted on, all others its online pass.

    Args:
        method: which.
        num_clusters: K.
        seed: of K-means.
        sample_rows: patches in the sample.
    """

    def __init__(
        self, method: Method, num_clusters: int, *, seed: int = 0, sample_rows: int = 1 << 16
    ) -> None:
        self.method, self.num_clusters = method, num_clusters
        self.kmeans = KMeans(num_clusters, seed) if method.kmeans else None
        self._sample_rows = max(sample_rows, num_clusters)
        self._sample: list[Tensor] = []
        self._mean = self._std = None

    def observe(self, maps: dict[str, Tensor]) -> None:
        """Take the next training images' maps, ``[B, C, h, w]`` each, into account."""
        if self.kmeans is None:
            return
        rows = maps[self.method.map_name].movedim(1, -1).flatten(0, 2).float()
        if self.method.per_segment:
            rows = rows.unique(dim=0)
        if self.kmeans.centers is not None:
            self.kmeans.partial_fit(self._prepared(rows))
            return
        self._sample.append(rows.cpu())
        if sum(map(len, self._sample)) >= self._sample_rows:
            self._fit(rows.device)

    def finish(self, device: torch.device | str) -> Clusterer:
        """End the training pass; K-means moves to ``device``.

        Raises:
            ValueError: fewer training patches than clusters.
        """
        if self.kmeans is not None and self.kmeans.centers is None:
            self._fit(device)
        return self

    def to(self, device: torch.device | str) -> Clusterer:
        """Move what was fitted to a device, in place."""
        if self.kmeans is not None:
            self.kmeans.to(device)
        if self._mean is not None:
            self._std, self._mean = self._std.to(device), self._mean.to(device)
        return self

    def logits(self, maps: dict[str, Tensor]) -> Tensor:
        """Cluster logits ``[B, K, h, w]`` of a batch's maps; their argmax is the cluster.

        Segments have their cluster as a whole: 1 for it and 0 for the others. Their scores would
        lie about the pixels between two segments: on the way from one feature to another far away,
        up-sampling passes by centres of neither.
        """
        features = maps[self.method.map_name]
        if self.kmeans is None:
            return features
        rows = self._prepared(features.movedim(1, -1))
        if self.method.per_segment:
            found = F.one_hot(self.kmeans.predict(rows), self.num_clusters).float()
        else:
            found = self.kmeans.logits(rows)
        return found.movedim(-1, 1)

    def probabilities(self, logits: Tensor, dim: int = 0) -> Tensor:
        """Cluster logits as probabilities, as the CRF needs them.

        K-means becomes the mixture of equal spherical Gaussians that it is the limit of, with the
        variance of the clusters (:attr:`KMeans.variance`). What up-sampling leaves of segments are
        shares already.
        """
        if self.method.per_segment:
            shares = logits.clamp(min=0)  # a class without a cluster has −inf
            return shares / shares.sum(dim, keepdim=True).clamp(min=1e-12)
        if self.kmeans is not None:
            logits = logits / max(self.kmeans.variance, 1e-12)
        return logits.softmax(dim)

    def _fit(self, device: torch.device | str) -> None:
        sample = torch.cat(self._sample) if self._sample else torch.empty(0, 1)
        self._sample.clear()
        if self.method.normalize:
            self._std, self._mean = torch.std_mean(sample, dim=0)
        self.kmeans.fit(self._prepared(sample))
        self.to(device)

    def _prepared(self, rows: Tensor) -> Tensor:
        if not self.method.normalize:
            return rows
        # A constant channel says nothing, and would divide by zero.
        standardised = (rows - self._mean) / self._std.clamp(min=1e-6)
        return F.layer_norm(standardised, standardised.shape[-1:])
