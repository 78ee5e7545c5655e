"""K-means, the paper's baseline, and the clustering step of Ours* (section 4)."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 16384  # rows whose similarities to all centres are held at once


def plus_plus(rows: Tensor, num_clusters: int, seed: int = 0) -> Tensor:
    """Greedy k-means++ seeding (Arthur and Vassilvitskii, SODA 2007; the greedy form is theirs).

    Each new centre is the best of 2 + log K rows drawn with probability proportional to the squared
    distance to the centres so far. scikit-learn's does the same, in double precision and several
    times slower.

    Args:
        rows: float32 ``[n, C]`` on the CPU, n ≥ K.

    Returns:
        int64 ``[K]``, indices of different rows, unless fewer than K differ.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = rows - rows.mean(0)  # small norms, little cancellation
    norms = rows.square().sum(1)
    chosen = [int(torch.randint(len(rows), (1,), generator=generator))]
    nearest = _squared_distances(rows, norms, chosen)[:, 0]
    trials = 2 + int(math.log(num_clusters))
    for _ in range(num_clusters - 1):
        cumulated = nearest.double().cumsum(0)
        drawn = torch.rand(trials, generator=generator, dtype=torch.float64) * cumulated[-1]
        candidates = torch.searchsorted(cumulated, drawn, right=True).clamp(max=len(rows) - 1)
        after = _squared_distances(rows, norms, candidates).minimum(nearest[:, None])
        best = int(after.sum(0, dtype=torch.float64).argmin())
        chosen.append(int(candidates[best]))
        nearest = after[:, best].contiguous()
    return torch.tensor(chosen)


def _residual_variance(residuals: np.ndarray) -> float:
    """tr Σ² / tr Σ of residuals ``[n, C]``: their variance along the direction they usually take.

    Channels of features are correlated; their mean variance, tr Σ / C, would count the same
    evidence several times and make a mixture of Gaussians far too sure.
    """
    covariance = residuals.T @ residuals / len(residuals)
    trace = float(np.trace(covariance, dtype=np.float64))
    return float(np.square(covariance, dtype=np.float64).sum()) / trace if trace > 0 else 0.0


def _squared_distances(rows: Tensor, norms: Tensor, chosen: Tensor | list[int]) -> Tensor:
    """``[n, len(chosen)]``, exactly 0 from a chosen row to itself, so that none is drawn twice."""
    distances = norms[:, None] + norms[chosen] - 2 * (rows @ rows[chosen].T)
    distances.clamp_(min=0)[chosen, torch.arange(len(chosen))] = 0
    return distances


class KMeans:
    """K-means for more rows than memory holds: :meth:`fit` on a sample, then one pass of
    :meth:`partial_fit` over the rest, as the authors' implementation does.

    The sample is seeded by :func:`plus_plus` and clustered by scikit-learn (Lloyd). The pass moves
    each centre to the running mean of the rows it has won so far, the sample's included (Sculley,
    *Web-scale k-means clustering*, WWW 2010), so every row counts once and equally.

    The same seed and thread count give the same centres.

    Args:
        num_clusters: K.
        seed: of the k-means++ seeding.
        max_iter: bound on Lloyd's iterations.
    """

    def __init__(self, num_clusters: int, seed: int = 0, *, max_iter: int = 100) -> None:
        if num_clusters < 1:
            raise ValueError(f"num_clusters must be at least 1, got {num_clusters}")
        self.num_clusters, self.seed, self.max_iter = num_clusters, seed, max_iter
        self.centers: Tensor | None = None  # float32 [K, C]
        self.counts: Tensor | None = None  # int64 [K], rows seen
        self.variance = 0.0  # of the sample's rows about their centres, see _residual_variance
        self._origin: Tensor | None = None  # float32 [C], sample mean

    def fit(self, sample: Tensor) -> KMeans:
        """Cluster a sample, float ``[n, C]``, n ≥ K; centres end up on its device.

        Raises:
            ValueError: not a matrix, fewer rows than clusters, or a value that isn't finite.
        """
        from sklearn.cluster import KMeans as SampleKMeans

        self._check(sample, least=self.num_clusters)
        rows = sample.detach().float().cpu().numpy()
        lloyd = SampleKMeans(
            self.num_clusters,
            init=rows[plus_plus(torch.from_numpy(rows), self.num_clusters, self.seed).numpy()],
            n_init=1,
            max_iter=self.max_iter,
        ).fit(rows)
        device = sample.device
        self.centers = torch.from_numpy(lloyd.cluster_centers_).to(device)
        labels = torch.from_numpy(lloyd.labels_).to(device).long()
        self.counts = torch.bincount(labels, minlength=self.num_clusters)
        self.variance = _residual_variance(rows - lloyd.cluster_centers_[lloyd.labels_])
        self._origin = torch.from_numpy(rows.mean(0)).to(device)
        return self

    def partial_fit(self, rows: Tensor) -> KMeans:
        """Move the centres by rows not seen before, float ``[n, C]`` (any n, in blocks)."""
        self._check(rows, least=0)
        for block in rows.to(self.centers).split(_BLOCK):
            # One-hot rows make the sums a matrix product: deterministic, unlike atomic adds.
            won = F.one_hot(self._nearest(block), self.num_clusters).to(block)
            new = won.sum(0)
            self.counts += new.long()
            pull = won.T @ block - new[:, None] * self.centers
            self.centers += pull / self.counts.clamp(min=1)[:, None]
        return self

    def logits(self, rows: Tensor) -> Tensor:
        """Scores whose argmax is the nearest centre: x·c − ‖c‖²/2, float32 ``[..., K]``.

        They are linear in x (the term −‖x‖²/2, the same for every cluster, is left out). Bilinear
        up-sampling of these scores therefore assigns every pixel to the centre nearest to its
        up-sampled *feature*.
        """
        flat = rows.to(self.centers).flatten(0, -2)
        blocks = [self._scores(block) for block in flat.split(_BLOCK)]
        return torch.cat(blocks).unflatten(0, rows.shape[:-1])

    def predict(self, rows: Tensor) -> Tensor:
        """The nearest centre of every row ``[..., C]``, int64 ``[...]``; ties to the lower."""
        flat = rows.to(self.centers).flatten(0, -2)
        return torch.cat([self._nearest(b) for b in flat.split(_BLOCK)]).view(rows.shape[:-1])

    def to(self, device: torch.device | str) -> KMeans:
        """Move to a device, in place."""
        self.centers, self.counts = self.centers.to(device), self.counts.to(device)
        self._origin = self._origin.to(device)
        return self

    def _scores(self, block: Tensor) -> Tensor:
        # Seen from the sample's mean the norms are small, and so is float32 cancellation.
        centers = self.centers - self._origin
        return torch.addmm(-0.5 * centers.square().sum(1), block - self._origin, centers.T)

    def _nearest(self, block: Tensor) -> Tensor:
        return self._scores(block).argmax(1)

    def _check(self, rows: Tensor, least: int) -> None:
        if rows.ndim != 2 or rows.shape[0] < least:
            raise ValueError(
                f"expected rows [n, C] with n >= {least} (one a cluster), got {tuple(rows.shape)}"
            )
        if not rows.isfinite().all():
            raise ValueError("rows hold values that are not finite")
