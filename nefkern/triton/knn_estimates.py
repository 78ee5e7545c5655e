"""Estimates of ``knn``: products of rows rounded to float16, on tensor cores, and their margin.

Scores. Let y_i be the rows that decide: unit rows (cosine) or the features times a power of two
(euclidean). For any vector c, with d_i = y_i - c,

    <y_i, y_j>         = <d_i, d_j> + u_i + u_j,   u_i = <c, y_i> - |c|²/2
    -|y_i - y_j|² / 2  = <d_i, d_j> + u_i + u_j,   u_i = -|d_i|²/2

so one product serves both metrics. c is the mean row: the d_i are short, and so is the error.

Inner products of short rows beside long ones need more: a power of two of each query's own changes
no order of its candidates, and keeps a short query's digits. Let x_i be the queries so scaled, and
y_j the candidates times one power of two for all. Only the candidates are centred, d_j = y_j - c,

    <x_i, y_j>         = <x_i, d_j> + u_i,         u_i = <x_i, c>

and what follows holds with x_i for d_i and 0 for u_j.

Margin. Only p_i, d_i rounded to float16, is multiplied: the entries are below 8 whatever the input,
so its range suffices, and it has three bits more than bfloat16 at the same speed. With u = 2^-24
and the residual r_i = |d_i - p_i|, taken in float64 from what p_i really is, by Cauchy-Schwarz

    |<d_i, d_j> - <p_i, p_j>| = |<d_i - p_i, d_j> + <p_i, d_j - p_j>| <= r_i |d_j| + |p_i| r_j.

Products of two float16 are exact in float32. A tensor core adds T of them and the accumulator
after aligning all to the largest and cutting, which errs by at most T + 2 times 2u of the largest
(Fasi et al. 2021, "Numerical behavior of NVIDIA tensor cores"; T >= 4 since the first generation):
C/T such steps err by at most 3C u |p_i| |p_j|, and 4C + 8 is taken. Rounding the u_i and adding
them errs by 4u (|u_i| + |u_j|). The value that decides is itself computed in float32: with h bound
(:func:`_summing`) within h |y_i| |y_j| for cosine and inner products (there |y_j| <= |d_j| + |c|),
and, for euclidean, a squared distance within a relative h. Replacing row j's lengths by their
maxima gives the margin m_i for all j.

Selection. Let s be a score that at least k candidates reach. Their values are at least s - m, so
the k-th best is, and whoever is among the k best has a score of at least s - 2m. The relative error
of a squared distance adds 2h (|s| + m). Values beyond float32 are infinite and tie, so that the
index decides: with e their edge in a score's unit, whoever may be +inf (a score from e - m on) is
kept, and, where the k-th may be -inf (s - 2m <= -e), everybody.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nefkern.backends import interpreting
from nefkern.triton.configs import Tuned, launch
from nefkern.triton.knn_rows import DEPTH, Rows, power
from nefkern.triton.knn_scores import base_of, put_scores

UNIT = 2.0**-24  # float32's rounding error
PACK = {"BR": 256, "BC": DEPTH} if interpreting() else {"BR": 4, "BC": DEPTH, "num_warps": 4}
SCORE_CONFIGS = [
    triton.Config({"BM": m, "BN": n, "BK": DEPTH}, num_warps=warps, num_stages=3)
    for m, n, warps in ((128, 128, 8), (128, 64, 4), (64, 128, 4))  # 128 x 128 by 4 spills
]


#: What rows are packed for: both factors of a product, or one of an inner product's two.
SIDES = ("cosine", "euclidean", "query", "candidate")


@triton.jit
def pack_kernel(
    rows, scale, centre, present, packed, offsets, lengths, residuals, n, depth,
    SIDE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """p = d rounded to float16, with u, |d| and |d - p|: sums in float64."""
    i = tl.program_id(0) * BR + tl.arange(0, BR)
    at = i.to(tl.int64)[:, None] * depth
    length = tl.zeros([BR], tl.float64)
    residual, along, middle = length, length, length
    unit = tl.load(scale + i, mask=i < n, other=0.0) if SIDE == "candidate" else tl.load(scale)
    for first in range(0, depth, BC):
        c = first + tl.arange(0, BC)
        y = tl.load(rows + at + c[None, :], mask=(i < n)[:, None], other=0.0).to(tl.float64)
        y *= unit[:, None] if SIDE == "candidate" else unit
        m = tl.load(centre + c).to(tl.float64)[None, :]
        d = y if SIDE == "query" else y - m
        p = d.to(tl.float32).to(tl.float16)
        tl.store(packed + at + c[None, :], p, mask=(i < n)[:, None])
        rest = d - p.to(tl.float64)
        length += tl.sum(d * d, 1)
        residual += tl.sum(rest * rest, 1)
        along += tl.sum(m * y, 1)
        middle += tl.sum(m * m + 0 * y, 1)
    if SIDE == "query":
        u = along
    elif SIDE == "candidate":
        u = tl.zeros([BR], tl.float64)
    elif SIDE == "euclidean":
        u = -0.5 * length
    else:
        u = along - 0.5 * middle
    there = tl.load(present + i, mask=i < n, other=0) != 0
    # A row left out has no score with any other.
    tl.store(offsets + i, tl.where(there, u, float("nan")).to(tl.float32), mask=i < n)
    UP: tl.constexpr = 1 + 1e-6  # covers the rounding of these sums
    tl.store(lengths + i, (tl.sqrt(length) * UP).to(tl.float32), mask=i < n)
    tl.store(residuals + i, (tl.sqrt(residual) * UP).to(tl.float32), mask=i < n)


@triton.jit
def score_kernel(
    packed, others, offsets, other_offsets, begins, ends, scores, first_row, last_row, n, steps,
    strips, INCLUDE_SELF: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile of a block's estimates: rows ``program_id(1)``, columns ``program_id(0)``."""
    row = tl.program_id(1) * BM
    base = base_of(begins, first_row, row)
    row += first_row
    first = base + tl.program_id(0) * BN
    i, j = row + tl.arange(0, BM), first + tl.arange(0, BN)
    if first < tl.max(tl.load(ends + i, mask=i < last_row, other=0), 0):
        depth = steps * BK  # so the compiler knows that rows are aligned
        # 64 bits for where a tile begins, 32 inside it. Rows past the end are read at the last one.
        x, y = packed + row.to(tl.int64) * depth, others + first.to(tl.int64) * depth
        c = tl.arange(0, BK)
        a = (tl.minimum(i, n - 1) - row)[:, None] * depth + c[None, :]
        b = (tl.minimum(j, n - 1) - first)[None, :] * depth + c[:, None]
        total = tl.zeros([BM, BN], tl.float32)
        for k in range(0, depth, BK):
            total = tl.dot(tl.load(x + k + a), tl.load(y + k + b), total)
        u = tl.load(offsets + i, mask=i < n, other=0.0)
        v = tl.load(other_offsets + j, mask=j < n, other=0.0)
        total += u[:, None] + v[None, :]
        put_scores(scores, total, first_row, row, first, base, strips, INCLUDE_SELF)


tuned_score = Tuned(score_kernel, SCORE_CONFIGS, key=["steps"])


@dataclass(frozen=True)
class Side:
    """Rows as one factor of the products."""

    rows: Tensor  # [N, depth] float16: p
    numbers: Tensor  # [3, N]: u, |d|, |d - p|

    @property
    def offsets(self) -> Tensor:
        return self.numbers[0]


@dataclass(frozen=True)
class Packed:
    """What the estimates are made of, and how far from the truth they may be."""

    rows: Tensor  # [N, depth] float16: p of the queries
    others: Tensor  # and of the candidates
    offsets: Tensor  # [N]: u
    other_offsets: Tensor
    margins: Tensor  # [N]: m
    relative: float  # what comes to it in proportion to a score
    edges: Tensor  # [N]: scores beyond it, or below its negative, are of values that all tie


def pack(data: Rows, channels: int) -> Packed:
    """The rows rounded, with their margins; ``channels`` is C, without the padding."""
    if data.metric == "inner_product":
        return _pack_products(data, channels)
    side, n = _side_like(data.rows), len(data.rows)
    centre = (data.rows.mean(0, dtype=torch.float64) * data.scale).float()
    depth, scale = data.rows.shape[1], data.scale.double()
    _fill(side, data, slice(0, n), data.metric, scale, centre)
    if data.euclidean:
        # Distances below float32's normal range are rounded without the scale: by 2^-150, which
        # moves the score by that, scaled, times the distance.
        smallest, packed = 2.0**-149 * scale, side.numbers[1:].sum(0, dtype=torch.float64)
        extra = smallest * (packed + packed.amax() + smallest)
        edge = (scale * torch.finfo(torch.float32).max).square() * (0.5 * (1 - 1e-5))
    else:
        extra, edge = 1.01 * _summing(depth), scale * math.inf
    margins = _margins(side, side, data.first_candidate, channels, depth, extra)
    # A few roundings of the bound itself, and the values' relative error.
    relative = 8 * UNIT + (2 * _summing(depth) if data.euclidean else 0)
    edges = edge.float().expand(n).contiguous()
    return Packed(side.rows, side.rows, side.offsets, side.offsets, margins, relative, edges)


def _pack_products(data: Rows, channels: int) -> Packed:
    """Of inner products: rows that are query and candidate are packed twice."""
    n, depth = data.rows.shape
    first = data.first_candidate
    own, candidates = first == 0, slice(first, n)
    largest = data.exponents[candidates].amax()
    units = power(data.exponents[candidates] - largest, torch.float64)
    centre = units.float() @ data.rows[candidates] / (n - first)
    queries = _side_like(data.rows)
    others = _side_like(data.rows) if own else queries
    one = units.new_ones(1)
    _fill(queries, data, slice(0, data.queries), "query", one, centre)
    _fill(others, data, candidates, "candidate", units, centre)
    unit = power(-data.exponents - largest, torch.float64)  # of a value, in scores
    farthest = others.numbers[1, candidates].double().amax() + centre.double().norm()
    extra = 1.01 * _summing(depth) * farthest * queries.numbers[1] + 2.0**-148 * unit
    margins = _margins(queries, others, first, channels, depth, extra)
    edges = (unit * (torch.finfo(torch.float32).max * (1 - 1e-5))).float()
    return Packed(
        queries.rows, others.rows, queries.offsets, others.offsets, margins, 8 * UNIT, edges
    )


def _side_like(rows: Tensor) -> Side:
    return Side(torch.empty_like(rows, dtype=torch.float16), rows.new_empty((3, len(rows))))


def _fill(side: Side, data: Rows, span: slice, kind: str, scale: Tensor, centre: Tensor) -> None:
    """Packs the rows of a span: what they are for is one of SIDES."""
    n, depth = data.rows[span].shape
    launch(pack_kernel, (triton.cdiv(n, PACK["BR"]),))(
        data.rows[span], scale, centre, data.present[span], side.rows[span],
        *side.numbers[:, span], n, depth, SIDE=kind, **PACK,
    )  # fmt: skip


def _summing(depth: int) -> float:
    """h: relative error of a value of ``depth`` channels, as ``rerank_kernel`` adds them.

    ``depth / DEPTH`` terms one after the other, then DEPTH sums in any order; and, for euclidean,
    differences, squares and the square root (squared again).
    """
    return 1.01 * (depth / DEPTH + DEPTH + 8) * UNIT


def _margins(
    side: Side, others: Side, first: int, channels: int, depth: int, extra: Tensor | float
) -> Tensor:
    """[N]: m, as derived at the top of this module, with candidates from row ``first`` on.

    ``extra``: what the values err by, and what the metric adds.
    """
    offset, length, residual = side.numbers.double().nan_to_num(0).abs()
    farthest, longest, largest = (
        others.numbers[:, first:].nan_to_num(0).abs().amax(1).double().unbind()
    )
    gamma = (4 * channels + 8) * UNIT
    gamma = gamma / (1 - gamma) if gamma < 0.5 else 1e30
    packed = length + residual
    rounding = residual * longest + packed * largest
    summing = packed * (gamma * (longest + largest)) + 4 * UNIT * (offset + farthest)
    lost = depth * 2.0**-120  # numbers below float32's normal range
    return ((rounding + summing + (extra + lost)) * (1 + 1e-5)).float()
