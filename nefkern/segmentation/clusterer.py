"""A method put to work: fitted on training images, then cluster logits for any image's maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nefkern.runtime.states import FLOATS, check_state
from nefkern.segmentation.methods import Method
from nefkern.segmentation.rows import RowStore, mean_and_std, root_mean_square
from nefkern.spectral.kmeans import KMeans
from nefkern.spectral.merging import cut, ward

#: Patches that K-means is fitted on before its online pass: the authors' "about five million".
SAMPLE_ROWS = 5_000_000


class Clusterer:
    """One method's path from maps to cluster logits.

    Methods with K-means see the training images' maps once, through :meth:`observe`: the first
    ``sample_rows`` patches (fewer where they would take more than 4 GiB in half precision) become
    the sample that K-means is fitted on, all others its online pass.

    Args:
        method: which.
        num_clusters: K.
        seed: of K-means.
        sample_rows: patches in the sample.

    Attributes:
        temperature: of K-means' scores, where one was fitted; None: the variance of its clusters.
    """

    def __init__(
        self, method: Method, num_clusters: int, *, seed: int = 0, sample_rows: int = SAMPLE_ROWS
    ) -> None:
        self.method, self.num_clusters = method, num_clusters
        self.kmeans = KMeans(num_clusters, seed) if method.kmeans else None
        self._sample = RowStore(max(sample_rows, num_clusters))
        self.temperature: float | None = None
        self._mean: Tensor | None = None  # of every channel, as far as the method looks at it
        self._scale: Tensor | None = None

    @property
    def channels(self) -> int:
        """Channels of the logits: K."""
        return self.num_clusters

    @property
    def fitted(self) -> bool:
        """Whether :meth:`logits` can be asked for."""
        return self.kmeans is None or self.kmeans.centers is not None

    def observe(self, maps: dict[str, Tensor]) -> None:
        """Take the next training images' maps, ``[B, C, h, w]`` each, into account."""
        if self.kmeans is None:
            return
        rows = maps[self.method.map_name].movedim(1, -1).flatten(1, 2).float()  # [B, n, C]
        if self.method.per_segment:
            rows = torch.cat([image.unique(dim=0) for image in rows])
        else:
            rows = rows.flatten(0, 1)
        if self.fitted:
            self.kmeans.partial_fit(self.prepared(rows))
            return
        self._sample.add(rows)
        if self._sample.full:
            self._fit(rows.device)

    def finish(self, device: torch.device | str) -> Clusterer:
        """End the training pass; K-means moves to ``device``.

        Raises:
            ValueError: fewer training patches than clusters.
        """
        if not self.fitted:
            self._fit(device)
        return self

    def to(self, device: torch.device | str) -> Clusterer:
        """Move what was fitted to a device, in place."""
        if self.kmeans is not None:
            self.kmeans.to(device)
        if self._scale is not None:
            self._mean, self._scale = self._mean.to(device), self._scale.to(device)
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
        rows = self.prepared(features.movedim(1, -1))
        if self.method.per_segment:
            found = F.one_hot(self.kmeans.predict(rows), self.num_clusters).float()
        else:
            found = self.kmeans.logits(rows)
        return found.movedim(-1, 1)

    def probabilities(self, logits: Tensor, dim: int = 0) -> Tensor:
        """Cluster logits as probabilities, as whatever draws edges needs them.

        A spectral run's have a temperature that was fitted
        (:meth:`nefkern.training.spectral_model.SpectralModel.calibrated`). Any other K-means is
        taken for the mixture of equal spherical Gaussians that it is the limit of, with the
        variance of the clusters (:attr:`KMeans.variance`), and is surer than it is right. What
        up-sampling leaves of segments are shares already.
        """
        if self.method.per_segment:
            shares = logits.clamp(min=0)  # a class without a cluster has −inf
            return shares / shares.sum(dim, keepdim=True).clamp(min=1e-12)
        if self.kmeans is not None:
            logits = logits / (self.temperature or max(self.kmeans.variance, 1e-12))
        return logits.softmax(dim)

    def merged(self, count: int) -> Tensor:
        """Which of ``count`` groups each cluster is merged to, int64 ``[K]``: Ward's tree of
        K-means' clusters (:func:`nefkern.spectral.merging.ward`), cut.

        Raises:
            ValueError: no K-means made the clusters; ``count`` out of range.
        """
        if self.kmeans is None:
            raise ValueError("only the clusters of K-means can be merged")
        return cut(ward(self.kmeans.centers, self.kmeans.counts), count)

    def state(self) -> dict[str, Tensor]:
        """What was fitted, as tensors that :meth:`load` takes back."""
        scale = {} if self._scale is None else {"mean": self._mean, "scale": self._scale}
        return {**self.kmeans.state(), **scale}

    def load(self, state: dict[str, Tensor]) -> Clusterer:
        """Take over the :meth:`state` of a fitted clusterer of the same method.

        Raises:
            ValueError: not such a state.
        """
        names = {"centers": (FLOATS, "K C"), "[mean]": (FLOATS, "C"), "[scale]": (FLOATS, "C")}
        check_state(state, names)
        self.kmeans.load(state)
        self._mean, self._scale = state.get("mean"), state.get("scale")
        return self

    def _fit(self, device: torch.device | str) -> None:
        sample = self._sample.take().to(device)
        if self.method.normalize and len(sample):
            # A constant channel says nothing, and would divide by zero.
            self._mean, std = mean_and_std(sample)
            self._scale = 1 / std.clamp(min=1e-6)
        elif self.method.spectral and len(sample):
            # As in training, where norms are clamped, a dead function is not blown up.
            norms = root_mean_square(sample)
            self._scale = 1 / norms.clamp(min=max(1e-2 * float(norms.max()), 1e-12))
            self._mean = torch.zeros_like(self._scale)
        if self._scale is not None:
            for part in sample.split(1 << 16):
                part.copy_(self.prepared(part.float()))
        self.kmeans.fit(sample)
        self.to(device)

    def prepared(self, rows: Tensor) -> Tensor:
        """Rows ``[..., C]`` of a map as K-means sees them."""
        if self._scale is None:
            return rows
        scaled = (rows - self._mean) * self._scale
        if self.method.spectral:
            return F.normalize(scaled, dim=-1)
        return F.layer_norm(scaled, scaled.shape[-1:])
