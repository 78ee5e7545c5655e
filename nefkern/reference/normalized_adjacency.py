"""Reference of ``normalized_adjacency``: neighbour lists to D^(-1/2) A D^(-1/2) (eqs 2-4)."""

from __future__ import annotations

import torch
from torch import Tensor

from nefkern.reference.csr import compress, merge_entries


def normalized_adjacency(
    indices: Tensor,
    weights: Tensor | None,
    *,
    num_nodes: int,
    symmetrize: str = "mean",
    clamp_min: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`nefkern.ops.normalized_adjacency`; returns the graph's three tensors.

    Memory is O(N k): edges are sorted, never scattered into an N x N matrix.
    """
    rows, columns, edges = _edges(indices, weights, clamp_min)
    rows, columns, edges = merge_entries(rows, columns, edges, num_nodes, "amax")
    both_ways = torch.cat([rows, columns]), torch.cat([columns, rows])
    if symmetrize == "mean":  # (A + A^T) / 2
        halves = torch.cat([edges, edges]) / 2
        rows, columns, a = merge_entries(*both_ways, halves, num_nodes, "sum")
    else:  # max(A, A^T): the logical or of unweighted lists
        rows, columns, a = merge_entries(*both_ways, torch.cat([edges, edges]), num_nodes, "amax")
    row_offsets = compress(rows, num_nodes)
    # Rows without entries have degree 0 and nothing to scale, so no division by zero can occur.
    degree = torch.segment_reduce(a, "sum", offsets=row_offsets) if num_nodes else a
    scale = degree.rsqrt()
    return row_offsets, columns.to(torch.int32), a * (scale[rows] * scale[columns])


def _edges(indices: Tensor, weights: Tensor | None, clamp_min: float) -> tuple[Tensor, ...]:
    """(row, column, weight) of the listed edges: padding and edges of weight 0 are left out."""
    n, k = indices.shape
    rows = torch.arange(n, device=indices.device).repeat_interleave(k)
    columns = indices.reshape(-1).long()
    if weights is None:
        kept = columns >= 0
        return rows[kept], columns[kept], torch.ones_like(columns[kept], dtype=torch.float32)
    dtype = torch.float64 if weights.dtype == torch.float64 else torch.float32
    clamped = weights.reshape(-1).to(dtype).clamp(min=clamp_min)
    kept = (columns >= 0) & ~(clamped <= 0)  # "not <=" rather than ">": a NaN stays visible
    return rows[kept], columns[kept], clamped[kept]
