"""Estimates of ``knn``: products of rows rounded to float16, on tensor cores, and their margin.

Scores. Let y_i be the rows that decide: unit rows (cosine) or the features times a power of two
(euclidean). For any vector c, with d_i = y_i - c,

    <y_i, y_j>         = <d_i, d_j> + u_i + u_j,   u_i = <c, y_i> - |c|²/2
    -|y_i - y_j|² / 2  = <d_i, d_j> + u_i + u_j,   u_i = -|d_i|²/2

so one product serves both metrics. c is the mean row: the d_i are short, and so is the error.

Margin. Only p_i, d_i rounded to float16, is multiplied: the entries are below 4 whatever the input,
so its range suffices, and it has three bits more than bfloat16 at the same speed. With u = 2^-24
and the residual r_i = |d_i - p_i|, taken in float64 from what p_i really is, by Cauchy-Schwarz

    |<d_i, d_j> - <p_i, p_j>| = |<d_i - p_i, d_j> + <p_i, d_j - p_j>| <= r_i |d_j| + |p_i| r_j.

Products of two float16 are exact in float32. A tensor core adds T of them and the accumulator
after aligning all to the largest and cutting, which errs by at most T + 2 times 2u of the largest
(Fasi et al. 2021, "Numerical behavior of NVIDIA tensor cores"; T >= 4 since the first generation):
C/T such steps err by at most 3C u |p_i| |p_j|, and 4C + 8 is taken. Rounding the u_i and adding
them errs by 4u (|u_i| + |u_j|). The value that decides is itself computed in float32: with h bound
(:func:`_summing`) within h |y_i| |y_j| for cosine, and, for euclidean, a squared distance within
a relative h. Replacing row j's lengths by their maxima gives the margin m_i for all j.

Selection. Let s be a score that at least k candidates reach. Their values are at least s - m, so
the k-th best is, and whoever is among the k best has a score of at least s - 2m. The relative error
of a squared distance adds 2h (|s| + m).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nefkern.backends import interpreting
from nefkern.triton.configs import autotune
from nefkern.triton.knn_rows import DEPTH, Rows
from nefkern.triton.knn_scores import base_of, put_scores

UNIT = 2.0**-24  # float32's rounding error
PACK = {"BR": 256, "BC": DEPTH} if interpreting() else {"BR": 8, "BC": DEPTH, "num_warps": 4}
SCORE_CONFIGS = [
    triton.Config({"BM": m, "BN": n, "BK": DEPTH}, num_warps=warps, num_stages=3)
    for m, n, warps in ((128, 128, 8), (128, 64, 4), (64, 128, 4))  # 128 x 128 by 4 spills
]


@triton.jit
def pack_kernel(
    rows, scale, centre, present, packed, offsets, lengths, residuals, n, depth,
    EUCLIDEAN: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """p = d rounded to float16, with u, |d| and |d - p|: sums in float64."""
    i = tl.program_id(0) * BR + tl.arange(0, BR)
    at = i.to(tl.int64)[:, None] * depth
    length = tl.zeros([BR], tl.float64)
    residual, along, middle = length, length, length
    for first in range(0, depth, BC):
        c = first + tl.arange(0, BC)
        y = tl.load(rows + at + c[None, :], mask=(i < n)[:, None], other=0.0).to(tl.float64)
        y *= tl.load(scale)
        m = tl.load(centre + c).to(tl.float64)[None, :]
        d = y - m
        p = d.to(tl.float32).to(tl.float16)
        tl.store(packed + at + c[None, :], p, mask=(i < n)[:, None])
        rest = d - p.to(tl.float64)
        length += tl.sum(d * d, 1)
        residual += tl.sum(rest * rest, 1)
        along += tl.sum(m * y, 1)
        middle += tl.sum(m * m + 0 * y, 1)
    u = -0.5 * length if EUCLIDEAN else along - 0.5 * middle
    there = tl.load(present + i, mask=i < n, other=0) != 0
    # A row left out has no score with any other.
    tl.store(offsets + i, tl.where(there, u, float("nan")).to(tl.float32), mask=i < n)
    UP: tl.constexpr = 1 + 1e-6  # covers the rounding of these sums
    tl.store(lengths + i, (tl.sqrt(length) * UP).to(tl.float32), mask=i < n)
    tl.store(residuals + i, (tl.sqrt(residual) * UP).to(tl.float32), mask=i < n)


@triton.jit
def score_kernel(
    packed, offsets, begins, ends, scores, first_row, last_row, n, steps, strips,
    INCLUDE_SELF: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
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
        x, y = packed + row.to(tl.int64) * depth, packed + first.to(tl.int64) * depth
        c = tl.arange(0, BK)
        a = (tl.minimum(i, n - 1) - row)[:, None] * depth + c[None, :]
        b = (tl.minimum(j, n - 1) - first)[None, :] * depth + c[:, None]
        total = tl.zeros([BM, BN], tl.float32)
        for k in range(0, depth, BK):
            total = tl.dot(tl.load(x + k + a), tl.load(y + k + b), total)
        u = tl.load(offsets + i, mask=i < n, other=0.0)
        v = tl.load(offsets + j, mask=j < n, other=0.0)
        total += u[:, None] + v[None, :]
        put_scores(scores, total, first_row, row, first, base, strips, INCLUDE_SELF)


tuned_score = autotune(SCORE_CONFIGS, key=["steps"])(score_kernel)


@dataclass(frozen=True)
class Packed:
    """What the estimates are made of, and how far from the truth they may be."""

    rows: Tensor  # [N, depth] float16: p
    offsets: Tensor  # [N]: u
    margins: Tensor  # [N]: m
    relative: float  # what comes to it in proportion to a score
    lowest: Tensor  # [1]: scores below it are of distances beyond float32, which all tie


def pack(data: Rows, channels: int) -> Packed:
    """The rows rounded, with their margins; ``channels`` is C, without the padding."""
    rows = data.rows
    n, depth = rows.shape
    packed = torch.empty_like(rows, dtype=torch.float16)
    offsets, lengths, residuals = (rows.new_empty(n) for _ in range(3))
    centre = (rows.mean(0, dtype=torch.float64) * data.scale).float()
    pack_kernel[(triton.cdiv(n, PACK["BR"]),)](
        rows, data.scale, centre, data.present, packed, offsets, lengths, residuals, n, depth,
        EUCLIDEAN=data.euclidean, **PACK,
    )  # fmt: skip
    margins = _margins(offsets, lengths, residuals, data.scale, channels, depth, data.euclidean)
    # A few roundings of the bound itself, and the values' relative error.
    relative = 8 * UNIT + (2 * _summing(depth) if data.euclidean else 0)
    edge = data.scale.double() * torch.finfo(torch.float32).max
    lowest = edge.square() * (-0.5 * (1 - 1e-5) if data.euclidean else -math.inf)
    return Packed(packed, offsets, margins, relative, lowest.float())


def _summing(depth: int) -> float:
    """h: relative error of a value of ``depth`` channels, as ``rerank_kernel`` adds them.

    ``depth / DEPTH`` terms one after the other, then DEPTH sums in any order; and, for euclidean,
    differences, squares and the square root (squared again).
    """
    return 1.01 * (depth / DEPTH + DEPTH + 8) * UNIT


def _margins(
    offsets: Tensor, lengths: Tensor, residuals: Tensor, scale: Tensor, channels: int,
    depth: int, euclidean: bool,
) -> Tensor:  # fmt: skip
    """[N]: m, as derived at the top of this module."""
    offset = offsets.nan_to_num(0).abs().double()
    length, residual = lengths.double(), residuals.double()
    packed = length + residual
    rounding = residual * length.amax() + packed * residual.amax()
    gamma = (4 * channels + 8) * UNIT
    gamma = gamma / (1 - gamma) if gamma < 0.5 else 1e30
    summing = gamma * packed * packed.amax() + 4 * UNIT * (offset + offset.amax())
    values = 0 if euclidean else 1.01 * _summing(depth)
    # Numbers below float32's normal range; and distances there, which are rounded without the
    # scale: by 2^-150, which moves the score by that, scaled, times the distance.
    smallest = 2.0**-149 * scale.double() if euclidean else 0
    lost = depth * 2.0**-120 + smallest * (packed + packed.amax() + smallest)
    return ((rounding + summing + values + lost) * (1 + 1e-5)).float()
