"""K-means, the paper's baseline, and the clustering step of Ours* (section 4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nefkern.ops import checks
from nefkern.runtime.states import FLOATS, NUMBERS, check_state

#: Of :meth:`KMeans.state`.
_STATE = {
    "centers": (FLOATS, "K C"),
    "counts": (NUMBERS, "K"),
    "origin": (FLOATS, "C"),
    "variance": (FLOATS, ""),
}

#: Rows that one thread works on at once: their similarities to the centres stay in its cache. On
#: a GPU as many as keep it busy.
_BLOCK, _GPU_BLOCK = 2048, 1 << 17
_MINIBATCH = 16384  # rows of a step of the online pass, and of prediction
_SEEDED_ON, _SEEDED_LEAST = 256, 4096  # rows a cluster, and in all, that the seeding looks at
_TOLERANCE = 1e-4  # scikit-learn's, of the centres' movement over the variance of a channel
_VARIANCE_ROWS = 1 << 15  # rows whose residuals are looked at


class Blocks:
    """A context in which functions of rows are computed block by block, in several threads.

    Each block is one thread's work, by operations that use no further threads. So what comes of it
    does not depend on the number of threads; and none waits for others at the end of each
    operation, spinning, as OpenMP's do: beside another busy process that made a step ten times
    slower. PyTorch's setting of threads is this process's, and is 1 within the context.

    Args:
        device: where the rows are; on a GPU the calling thread does it all.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cpu = device.type == "cpu"

    def __enter__(self) -> Blocks:
        if self._on_cpu:
            self._threads = torch.get_num_threads()
            torch.set_num_threads(1)  # threads that begin now take it over
            self._pool = ThreadPoolExecutor(self._threads)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        if self._on_cpu:
            self._pool.shutdown(cancel_futures=True)
            torch.set_num_threads(self._threads)

    def map(self, function: Callable, *columns: Tensor) -> Iterator:
        """``function`` of every block of the columns ``[n, ...]``, in the rows' order."""
        size = _BLOCK if self._on_cpu else _GPU_BLOCK
        blocks = [column.split(size) for column in columns]
        return (self._pool.map if self._on_cpu else map)(torch.no_grad()(function), *blocks)


def plus_plus(rows: Tensor, num_clusters: int, seed: int = 0) -> Tensor:
    """Greedy k-means++ seeding (Arthur and Vassilvitskii, SODA 2007; the greedy form is theirs).

    Each new centre is the best of 2 + log K rows drawn with probability proportional to the squared
    distance to the centres so far. scikit-learn's does the same, in double precision and several
    times slower.

    Args:
        rows: float32 ``[n, C]``, n ≥ K.

    Returns:
        int64 ``[K]`` on the CPU, indices of different rows, unless fewer than K differ. The same
        for any number of threads.
    """
    with Blocks(rows.device) as blocks:
        return _plus_plus(rows, num_clusters, seed, blocks)


def _plus_plus(rows: Tensor, num_clusters: int, seed: int, blocks: Blocks) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = rows - _mean(rows, blocks)  # small norms, little cancellation
    norms = torch.cat(list(blocks.map(lambda block: block.square().sum(1), rows)))
    chosen = [int(torch.randint(len(rows), (1,), generator=generator))]
    nearest = norms.new_full((len(rows),), torch.inf)
    nearest = _distances_with(rows, norms, nearest, chosen, blocks)[:, 0]
    trials = 2 + int(math.log(num_clusters))
    for _ in range(num_clusters - 1):
        cumulated = nearest.double().cumsum(0)
        drawn = torch.rand(trials, generator=generator, dtype=torch.float64).to(rows.device)
        places = torch.searchsorted(cumulated, drawn * cumulated[-1], right=True)
        candidates = places.clamp(max=len(rows) - 1).tolist()
        after = _distances_with(rows, norms, nearest, candidates, blocks)
        best = int(after.sum(0, dtype=torch.float64).argmin())
        chosen.append(candidates[best])
        nearest = after[:, best].contiguous()
    return torch.tensor(chosen)


def _distances_with(
    rows: Tensor, norms: Tensor, nearest: Tensor, chosen: list[int], blocks: Blocks
) -> Tensor:
    """Squared distances to the nearest centre ``[n, len(chosen)]``, were each one a centre too."""
    centers, halves = rows[chosen].T, norms[chosen]

    def after(block: Tensor, norm: Tensor, near: Tensor) -> Tensor:
        squared = torch.addmm(norm[:, None] + halves, block, centers, alpha=-2)
        return squared.clamp_(min=0).minimum(near[:, None])

    found = torch.cat(list(blocks.map(after, rows, norms, nearest)))
    # Exactly 0 from a chosen row to itself, so that none is drawn twice.
    found[chosen, range(len(chosen))] = 0
    return found


class Assignment(NamedTuple):
    """Rows and their nearest centres.

    Attributes:
        labels: int64 ``[n]``; ties to the lower centre.
        scores: float32 ``[n]``: x·c − ‖c‖²/2 of the nearest centre.
        sums: float64 ``[K, C]``, of each centre's rows.
        counts: int64 ``[K]``, of each centre's rows.
    """

    labels: Tensor
    scores: Tensor
    sums: Tensor
    counts: Tensor


def _assign(rows: Tensor, origin: Tensor, centers: Tensor, blocks: Blocks) -> Assignment:
    """Find the nearest centre of every row; rows, but not centres, still have to lose ``origin``.

    Sums are in float32 within a block, and of the blocks, in their order, in float64.
    """
    count, bias = len(centers), -0.5 * centers.square().sum(1)

    def assigned(block: Tensor) -> tuple[Tensor, ...]:
        block = block.float() - origin
        score, label = torch.addmm(bias, block, centers.T).max(1)
        won = torch.bincount(label, minlength=count)
        order, first = label.argsort(stable=True), won.cumsum(0) - won
        # A sum over runs of rows of one label: no product, and no atomic additions on a GPU.
        return label, score, F.embedding_bag(order, block, first, mode="sum"), won

    labels, scores = [], []
    sums, counts = centers.double() * 0, torch.zeros_like(bias, dtype=torch.int64)
    for label, score, total, won in blocks.map(assigned, rows):
        labels.append(label)
        scores.append(score)
        sums += total
        counts += won
    return Assignment(torch.cat(labels), torch.cat(scores), sums, counts)


def _fill_empty(found: Assignment, rows: Tensor, origin: Tensor, blocks: Blocks) -> None:
    """Give centres without rows the rows that are farthest from theirs, in place."""
    empty = (found.counts == 0).nonzero().flatten().tolist()
    if not empty:
        return
    norms = torch.cat(list(blocks.map(lambda b: (b.float() - origin).square().sum(1), rows)))
    distances = norms - 2 * found.scores
    farthest = distances.topk(min(len(empty), len(rows)))
    for cluster, row, distance in zip(empty, farthest.indices, farthest.values, strict=False):
        if distance <= 1e-6 * norms[row]:
            return  # fewer different rows than centres
        old, moved = found.labels[row].clone(), (rows[row].float() - origin).double()
        found.sums[old] -= moved
        found.counts[old] -= 1
        found.sums[cluster], found.counts[cluster], found.labels[row] = moved, 1, cluster


def _mean(rows: Tensor, blocks: Blocks) -> Tensor:
    total = sum(blocks.map(lambda block: block.sum(0, dtype=torch.float64), rows))
    return (total / len(rows)).float()


class KMeans:
    """K-means for more rows than memory holds: :meth:`fit` on a sample, then one pass of
    :meth:`partial_fit` over the rest, as the authors' implementation does.

    The sample is seeded by :func:`plus_plus`, on 256 K of its rows drawn by the seed (more make no
    difference), and clustered by Lloyd's algorithm, until no row changes its cluster or the centres
    move less than scikit-learn's tolerance (their squared movement below 1e-4 of a channel's
    variance). A centre that loses all rows takes the row that is farthest from its own. The online
    pass moves each centre to the running mean of the rows it has won so far, the sample's included
    (Sculley, *Web-scale k-means clustering*, WWW 2010), so every row counts once and equally.

    On the CPU the same seed gives the same centres, to the bit, whatever the number of threads.

    Args:
        num_clusters: K.
        seed: of the k-means++ seeding.
        max_iter: bound on Lloyd's iterations.

    Attributes:
        centers: float32 ``[K, C]``, None before :meth:`fit`.
        counts: int64 ``[K]``, rows seen.
        inertia: of the sample: the sum of squared distances to the nearest centres.
        iterations: that Lloyd's algorithm took.
        variance: of the sample's rows about their centres along the direction that they usually
            take, tr Σ² / tr Σ.
    """

    def __init__(self, num_clusters: int, seed: int = 0, *, max_iter: int = 100) -> None:
        self.num_clusters = checks.integer("num_clusters", num_clusters, 1)
        self.seed, self.max_iter = seed, max_iter
        self.centers: Tensor | None = None
        self.counts: Tensor | None = None
        self.inertia, self.iterations, self.variance = 0.0, 0, 0.0
        self._origin: Tensor | None = None  # float32 [C], sample mean

    def fit(self, sample: Tensor, *, on_iteration: Callable[[], object] = lambda: None) -> KMeans:
        """Cluster a sample, float ``[n, C]``, n ≥ K, on its device.

        Half precision saves memory: all is computed in float32, and no copy is made. After each of
        Lloyd's iterations ``on_iteration`` is called; what it raises ends the fit.

        Raises:
            ValueError: not a matrix, fewer rows than clusters, or a value that isn't finite.
        """
        rows = sample.detach()
        if not rows.is_floating_point():
            rows = rows.float()
        with Blocks(rows.device) as blocks:
            self._check(rows, self.num_clusters, blocks)
            self._origin = _mean(rows, blocks)
            centers, found = self._lloyd(rows, self._seeds(rows, blocks), blocks, on_iteration)
            self.variance = self._residual_variance(rows, found.labels, centers)
            squares = (_squares(b.float() - self._origin) for b in rows.split(_MINIBATCH))
            self.inertia = max(0.0, sum(squares) - 2 * float(found.scores.double().sum()))
        self.centers, self.counts = centers + self._origin, found.counts
        return self

    def _seeds(self, rows: Tensor, blocks: Blocks) -> Tensor:
        """The first centres, seen from the origin."""
        most = max(_SEEDED_LEAST, _SEEDED_ON * self.num_clusters)
        if len(rows) > most:
            generator = torch.Generator().manual_seed(self.seed)
            drawn = torch.randperm(len(rows), generator=generator)[:most].sort().values
            rows = rows[drawn.to(rows.device)]
        rows = rows.float()
        return rows[_plus_plus(rows, self.num_clusters, self.seed, blocks)] - self._origin

    def _lloyd(
        self,
        rows: Tensor,
        centers: Tensor,
        blocks: Blocks,
        on_iteration: Callable[[], object],
    ) -> tuple[Tensor, Assignment]:
        """Final centres, seen from the origin, and the rows' assignment to them."""
        squares = sum(blocks.map(lambda block: _squares(block.float() - self._origin), rows))
        tolerance = _TOLERANCE * squares / rows.numel()
        labels = None
        for iteration in range(1, self.max_iter + 1):
            self.iterations = iteration
            on_iteration()
            found = _assign(rows, self._origin, centers, blocks)
            if labels is not None and torch.equal(labels, found.labels):
                return centers, found
            _fill_empty(found, rows, self._origin, blocks)
            means = (found.sums / found.counts.clamp(min=1)[:, None]).float()
            moved = torch.where(found.counts[:, None] > 0, means, centers)
            shift, centers, labels = _squares(moved - centers), moved, found.labels
            if shift <= tolerance:
                break
        return centers, _assign(rows, self._origin, centers, blocks)

    def _residual_variance(self, rows: Tensor, labels: Tensor, centers: Tensor) -> float:
        """tr Σ² / tr Σ of what is left of rows without their centres.

        Channels of features are correlated; their mean variance, tr Σ / C, would count the same
        evidence several times and make a mixture of Gaussians far too sure.
        """
        some = slice(None, None, -(-len(rows) // _VARIANCE_ROWS))
        residuals = rows[some].float() - self._origin - centers[labels[some]]
        covariance = residuals.T @ residuals / len(residuals)
        trace = float(covariance.diagonal().double().sum())
        return _squares(covariance) / trace if trace > 0 else 0.0

    def partial_fit(self, rows: Tensor) -> KMeans:
        """Move the centres by rows not seen before, float ``[n, C]`` (any n, in mini-batches).

        Raises:
            RuntimeError: before :meth:`fit`.
            ValueError: not a matrix of C columns, or a value that isn't finite.
        """
        rows = self._beside_centers(rows.detach())
        with Blocks(rows.device) as blocks:
            self._check(rows, 0, blocks)
            for batch in rows.split(_MINIBATCH):
                centers = self.centers - self._origin
                found = _assign(batch, self._origin, centers, blocks)
                self.counts += found.counts
                pull = found.sums - found.counts[:, None] * centers
                self.centers += (pull / self.counts.clamp(min=1)[:, None]).float()
        return self

    def logits(self, rows: Tensor) -> Tensor:
        """Scores whose argmax is the nearest centre: x·c − ‖c‖²/2, float32 ``[..., K]``.

        They are linear in x (the term −‖x‖²/2, the same for every cluster, is left out). Bilinear
        up-sampling of these scores therefore assigns every pixel to the centre nearest to its
        up-sampled *feature*.
        """
        blocks = [self.scores(block) for block in self._in_batches(rows)]
        return torch.cat(blocks).view(*rows.shape[:-1], len(self.centers))

    def predict(self, rows: Tensor) -> Tensor:
        """The nearest centre of every row ``[..., C]``, int64 ``[...]``; ties to the lower."""
        found = [self.scores(batch).argmax(1) for batch in self._in_batches(rows)]
        return torch.cat(found).view(rows.shape[:-1])

    def _in_batches(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Rows ``[..., C]`` as float32 ``[·, C]`` beside the centres."""
        rows = self._beside_centers(rows)
        return rows.reshape(rows.shape[:-1].numel(), rows.shape[-1]).split(_MINIBATCH)

    def _beside_centers(self, rows: Tensor) -> Tensor:
        self._check_fitted()
        channels = self.centers.shape[1]
        if rows.ndim == 0 or rows.shape[-1] != channels:
            raise ValueError(f"rows: expected shape [..., {channels}], got {list(rows.shape)}")
        return rows.to(self.centers)

    def _check_fitted(self) -> None:
        if self.centers is None:
            raise RuntimeError("KMeans: has no centres yet; expected fit() or load() before this")

    def to(self, device: torch.device | str) -> KMeans:
        """Move to a device, in place."""
        self._check_fitted()
        self.centers, self.counts = self.centers.to(device), self.counts.to(device)
        self._origin = self._origin.to(device)
        return self

    def state(self) -> dict[str, Tensor]:
        """What prediction needs, as tensors that :meth:`load` takes back."""
        self._check_fitted()
        variance = torch.tensor(self.variance, dtype=torch.float64)
        return {
            "centers": self.centers,
            "counts": self.counts,
            "origin": self._origin,
            "variance": variance,
        }

    def load(self, state: dict[str, Tensor]) -> KMeans:
        """Take over the :meth:`state` of a fitted K-means.

        Raises:
            ValueError: not such a state.
        """
        check_state(state, _STATE)
        self.centers, self.counts = state["centers"], state["counts"]
        self._origin, self.variance = state["origin"], float(state["variance"])
        self.num_clusters = len(self.centers)
        return self

    def scores(self, block: Tensor) -> Tensor:
        """:meth:`logits` of float32 rows ``[n, C]``, all at once."""
        # Seen from the sample's mean the norms are small, and so is float32 cancellation.
        centers = self.centers - self._origin
        return torch.addmm(-0.5 * centers.square().sum(1), block - self._origin, centers.T)

    def _check(self, rows: Tensor, least: int, blocks: Blocks) -> None:
        if rows.ndim != 2 or rows.shape[0] < least:
            raise ValueError(
                f"expected rows [n, C] with n >= {least} (one a cluster), got {tuple(rows.shape)}"
            )
        if not all(blocks.map(lambda block: bool(block.isfinite().all()), rows)):
            raise ValueError("rows hold values that are not finite")


def _squares(values: Tensor) -> float:
    """The sum of squares; of few enough values that float32 products do not overflow."""
    return float(values.square().sum(dtype=torch.float64))
