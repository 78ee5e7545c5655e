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
    database: Tensor | None = None,
    database_segments: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The k best rows for every row, best first; see :func:`nefkern.ops.knn` for the contract.

    Args:
        features: [N, C], float16, bfloat16, float32 or float64.
        segments: S + 1 offsets; row i's candidates are the rows of its own segment.
        database: [M, C], the candidates; None: ``features`` themselves.
        database_segments: S + 1 offsets; segment s of ``features`` has the candidates of segment s.

    Returns:
        values [N, k] in float32 (float64 for float64 features) and indices [N, k] int32.
    """
    own = database is None
    points, finite = _points(features, metric)
    others, there = (points, finite) if own else _points(database, metric)
    n, drop = len(points), own and not include_self
    values = points.new_full((n, k), -math.inf)
    indices = points.new_full((n, k), -1, dtype=torch.int32)
    bounds = [0, n] if segments is None else list(segments)
    other_bounds = [0, len(others)] if database_segments is None else list(database_segments)
    ranges = itertools.pairwise(bounds), itertools.pairwise(bounds if own else other_bounds)
    for (begin, end), (first, last) in zip(*ranges, strict=True):
        rows = finite[begin:end].nonzero()[:, 0] + begin
        columns = there[first:last].nonzero()[:, 0] + first  # the candidates of all of them
        count = len(columns) - drop
        if count <= 0:
            continue
        candidates = others[columns]
        step = max(1, _BLOCK // len(columns))
        for at in range(0, len(rows), step):
            block = rows[at : at + step]
            scores = _scores(points[block], candidates, metric)
            which = torch.arange(count, device=rows.device).expand(len(scores), -1)
            if drop:  # from the row itself on, column c stands for candidate c + 1
                which = which + (
                    which >= torch.arange(at, at + len(block), device=rows.device)[:, None]
                )
                scores = scores.gather(1, which)
            best, where = _best(scores, min(k, count))
            values[block, : best.shape[1]] = best
            indices[block, : best.shape[1]] = columns[which.gather(1, where)].int()
    return values.neg_() if metric == "euclidean" else values, indices


def _points(x: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """The rows as they are compared, and which of them are finite."""
    points = x if x.dtype == torch.float64 else x.float()
    finite = points.isfinite().all(dim=1)
    return (unit_rows(points) if metric == "cosine" else points), finite


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
    """[n, C] against [m, C]: [n, m] scores, greater is better."""
    if metric == "cosine":
        return rows @ candidates.T
    if metric == "inner_product":
        return _products(rows, candidates)
    return _distances(rows, candidates).neg_()


def _products(x: Tensor, y: Tensor) -> Tensor:
    """<x_i, y_j>, [n, C] against [m, C]: inf beyond the largest float, NaN never.

    In float64, where no product of two float32 overflows or vanishes. Those of float64 may; so each
    row's largest entry is first brought to about 1, and the product to its size at the end.
    """
    if x.numel() == 0 or y.numel() == 0 or x.dtype != torch.float64:
        return (x.double() @ y.double().T).to(x.dtype)
    (x, p), (y, q) = _mantissas(x), _mantissas(y)
    return _times_power(x @ y.T, p + q.T)


def _times_power(x: Tensor, exponent: Tensor) -> Tensor:
    """x 2^exponent, in two steps: 2^2046 is no float, though what it makes of x may be."""
    half = exponent // 2
    for step in (half, exponent - half):
        x = x * torch.ldexp(torch.ones_like(step, dtype=x.dtype), step)
    return x


def _mantissas(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows with their largest entry in [1/2, 1), and the exponents [n, 1] that were taken out."""
    exponent = x.abs().amax(dim=1, keepdim=True).frexp().exponent
    return _times_power(x, -exponent), exponent


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j|, [n, C] against [m, C]: right from the smallest float to the largest.

    Of differences, not as |x|² + |y|² - 2xy, which cancels for near rows; and in float64, where no
    square of a float32 overflows or vanishes. Those of float64 may. So the largest entry is first
    brought to about 1, and where a distance is then so small that squares may have vanished, it is
    computed again with its largest difference divided out.
    """
    wide_x, wide_y = x.double(), y.double()
    if x.numel() == 0 or x.dtype != torch.float64:
        return _cdist(wide_x, wide_y).to(x.dtype)
    largest = torch.maximum(x.abs().amax(), y.abs().amax())
    exponent = largest.frexp().exponent.clamp(-1000, 1000)
    one = torch.ones_like(largest)
    distance = _cdist(x * torch.ldexp(one, -exponent), y * torch.ldexp(one, -exponent))
    small = distance < 2.0**-400
    distance = distance * torch.ldexp(one, exponent)
    for pairs in small.nonzero().split(max(1, _BLOCK // x.shape[1])):
        i, j = pairs.T
        difference = x[i] - y[j]
        top = difference.abs().amax(dim=1, keepdim=True)
        norm = (difference / top.where(top > 0, 1)).norm(dim=1, keepdim=True)
        distance[i, j] = (top * norm)[:, 0]
    return distance


def _cdist(x: Tensor, y: Tensor) -> Tensor:
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


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
