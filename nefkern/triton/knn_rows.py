"""The rows that decide about ``knn``'s neighbours, in the layouts that its kernels read."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from nefkern.reference.knn import unit_rows

DEPTH = 64  # rows are padded to a multiple of this many channels


@dataclass(frozen=True)
class Rows:
    """The rows, their segments, and how to undo their scale."""

    rows: Tensor  # [N, depth], padded with zeros
    planes: Tensor  # [C, N]
    features: Tensor  # [N, C]: as they came
    present: Tensor  # [N] bool: finite
    unscale: Tensor  # [1]: a euclidean value is this times the rows' distance
    begins: Tensor  # [N] int32: every row's segment
    ends: Tensor
    longest: int  # of the segments
    euclidean: bool


def rows_of(x: Tensor, euclidean: bool, segments: Tensor | None, bounds: Sequence[int]) -> Rows:
    """Of features [N, C] float32: unit rows (cosine), or the features times a power of two."""
    n, channels = x.shape
    scale = _power_of_two(x) if euclidean else x.new_ones(1)
    y = x * scale if euclidean else unit_rows(x)
    present = y.isfinite().all(1)
    y = y.masked_fill(~present[:, None], 0)
    rows = x.new_zeros((n, max(1, triton.cdiv(channels, DEPTH)) * DEPTH))
    rows[:, :channels] = y
    if segments is None:
        begins, ends = x.new_zeros(n, dtype=torch.int32), x.new_full((n,), n, dtype=torch.int32)
    else:
        offsets = segments.to(x.device, torch.int32)
        which = torch.bucketize(torch.arange(n, device=x.device), offsets[1:], right=True)
        begins, ends = offsets[which], offsets[which + 1]
    longest = max(b - a for a, b in itertools.pairwise(bounds))
    planes = y.T.contiguous()
    features = x.contiguous()
    return Rows(rows, planes, features, present, 1 / scale, begins, ends, longest, euclidean)


def _power_of_two(x: Tensor) -> Tensor:
    """[1]: what brings the largest finite entry into [1, 2); no square overflows or vanishes."""
    if x.numel() == 0:
        return x.new_ones(1)
    largest = x.abs().masked_fill(~x.isfinite(), 0).amax().view(1)
    exponent = largest.frexp().exponent - 1
    return torch.ldexp(torch.ones_like(largest), (-exponent).clamp(-126, 126))
