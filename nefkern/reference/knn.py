"""k nearest neighbours, row block by row block: the twin that every kernel is compared with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

_BLOCK = 1 << 22  # scores held at a time, at most (unless one row alone has more)


def knn(
    features: Tensor,
    k: int,
    metric: str = "cosine",
    segments: Sequence[int] | None = None,
    include_self: bool = False,
) -> tuple[Tensor, Tensor]:
    """The k best rows for every row, best first; see :func:`nefkern.ops.knn` for the contract.

    Args:
        features: [N, C], float16, bfloat16, float32 or float64.
        segments: S + 1 offsets; row i's candidates are the rows of its own segment.

    Returns:
        values [N, k] in float32 (float64 for float64 features) and indices [N, k] int32.
    """
    points = features if features.dtype == torch.float64 else features.float()
    if metric == "cosine":
        points = unit_rows(points)
    n = len(points)
    values = points.new_full((n, k), -math.inf)
    indices = points.new_full((n, k), -1, dtype=torch.int32)
    bounds = [0, n] if segments is None else list(segments)
    for begin, end in itertools.pairwise(bounds):
        candidates = points[begin:end]
        step = max(1, _BLOCK // max(1, end - begin))
        for first in range(begin, end, step):
            last = min(first + step, end)
            scores = _scores(points[first:last], candidates, metric)
            if not include_self:
                scores.diagonal(first - begin).fill_(-math.inf)
            best, where = _best(scores, min(k, end - begin))
            where = (where + begin).masked_fill(best == -math.inf, -1)
            values[first:last, : best.shape[1]] = best
            indices[first:last, : best.shape[1]] = where
    return values if metric == "cosine" else values.neg_(), indices


def unit_rows(x: Tensor) -> Tensor:
    """Rows [N, C] scaled to unit length; zero rows stay zero, non-finite rows become NaN.

    The largest entry is divided out first: no square overflows or vanishes.
    """
    if x.numel() == 0:
        return x
    largest = x.abs().amax(dim=1, keepdim=True)
    scaled = x / largest.where(largest > 0, 1)
    return scaled / scaled.norm(dim=1, keepdim=True).where(largest > 0, 1)


def _scores(rows: Tensor, candidates: Tensor, metric: str) -> Tensor:
    """[n, C] against [m, C]: [n, m] scores, greater is better, -inf where not finite."""
    if metric == "cosine":
        scores = rows @ candidates.T
    else:  # differences, not |x|² + |y|² - 2xy, which cancels for near rows
        scores = torch.cdist(rows, candidates, compute_mode="donot_use_mm_for_euclid_dist").neg_()
    return scores.nan_to_num_(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)


def _best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k greatest scores of each row [n, m], best first, ties to the lower column: [n, k] twice.

    ``topk`` leaves the order of ties open, so it only finds the k-th score; the columns are then
    taken in ascending order, and a stable sort keeps that order among equals.
    """
    threshold = scores.topk(k, dim=1).values[:, -1:]
    chosen = scores >= threshold
    surplus = chosen.sum(dim=1, keepdim=True) - k
    crowded = surplus[:, 0].nonzero()[:, 0]  # rows with more ties at the threshold than places
    tied = scores[crowded] == threshold[crowded]
    places = tied.sum(dim=1, keepdim=True) - surplus[crowded]
    chosen[crowded] &= ~tied | (tied.cumsum(dim=1) <= places)
    columns = chosen.nonzero()[:, 1].view(len(scores), k)
    best, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return best, columns.gather(1, order)
