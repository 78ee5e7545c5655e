"""Reference of ``normalized_adjacency``: neighbour lists to D^(-1/2) A D^(-1/2) (eqs 2-4)."""

from __future__ import annotations

import torch
from torch import Tensor

from nefkern.reference.csr import (
    compress,
    merge_entries,
    mirrored_places,
    place_of,
    sums_of,
)

_SMALLEST = 2.0**-1074  # of float64's positive numbers


def normalized_adjacency(
    indices: Tensor,
    weights: Tensor | None,
    *,
    num_nodes: int,
    symmetrize: str = "mean",
    clamp_min: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`nefkern.ops.normalized_adjacency`; returns the graph's three tensors.

    Memory is O(N k): edges are sorted, never scattered into an N x N matrix. The normalised matrix
    does not change when all of A is multiplied by a number, so that A + A^T does for its half; and
    float32 weights are computed with in float64, where no sum overflows and no root vanishes.
    """
    rows, columns, edges = _edges(indices, weights, clamp_min)
    rows, columns, edges = merge_entries(rows, columns, edges, num_nodes, "amax")
    both_ways = torch.cat([rows, columns]), torch.cat([columns, rows])
    if symmetrize == "mean":  # (A + A^T) / 2, times 2
        edges = _halved_if_huge(edges)
        rows, columns, a = merge_entries(*both_ways, torch.cat([edges, edges]), num_nodes, "sum")
    else:  # max(A, A^T): the logical or of unweighted lists
        rows, columns, a = merge_entries(*both_ways, torch.cat([edges, edges]), num_nodes, "amax")
    scale = _inverse_root_of_sums(a, rows, num_nodes)
    root = a.sqrt()  # sqrt(a) d^(-1/2) is at most 1, whatever the size of the weights
    values = (root * scale[rows]) * (root * scale[columns])
    dtype = (
        torch.float64 if weights is not None and weights.dtype == torch.float64 else torch.float32
    )
    return compress(rows, num_nodes), columns.to(torch.int32), values.to(dtype)


def _halved_if_huge(edges: Tensor) -> Tensor:
    """``edges`` times a power of two, so that the sum of two does not overflow; none becomes 0."""
    if edges.numel() == 0:
        return edges
    huge = edges.amax() > torch.finfo(edges.dtype).max / 2
    return torch.where(huge, (edges / 2).clamp(min=_SMALLEST), edges)


def _inverse_root_of_sums(a: Tensor, rows: Tensor, num_nodes: int) -> Tensor:
    """d^(-1/2) [N] of the row sums d, which need not be representable: sums of shares of the
    largest entry of a row. Rows without entries have nothing to scale; theirs is infinite."""
    largest = a.new_zeros(num_nodes).scatter_reduce_(0, rows, a, "amax")
    shares = sums_of(a / largest[rows], rows, num_nodes)
    return largest.rsqrt() * shares.rsqrt()


def _edges(indices: Tensor, weights: Tensor | None, clamp_min: float) -> tuple[Tensor, ...]:
    """(row, column, float64 weight) of the listed edges: padding and weight 0 are left out."""
    n, k = indices.shape
    rows = torch.arange(n, device=indices.device).repeat_interleave(k)
    columns = indices.reshape(-1).long()
    if weights is None:
        kept = columns >= 0
        return rows[kept], columns[kept], torch.ones_like(columns[kept], dtype=torch.float64)
    dtype = torch.float64 if weights.dtype == torch.float64 else torch.float32
    clamped = weights.reshape(-1).to(dtype).clamp(min=clamp_min).double()
    kept = (columns >= 0) & ~(clamped <= 0)  # "not <=" rather than ">": a NaN stays visible
    return rows[kept], columns[kept], clamped[kept]


def normalized_adjacency_backward(
    grad: Tensor,
    indices: Tensor,
    weights: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    symmetrize: str,
    clamp_min: float,
) -> Tensor:
    """dL/dweights [N, k] from ``grad`` = dL/dvalues [nnz], the structure held fixed.

    A listed edge e = (i, j) of weight w_e goes into a_ij and a_ji with the share c_e of
    :func:`_shares`. With H the symmetric part of the gradient, s = d^(-1/2) and
    r_i = sum_l kappa_il H_il, differentiating kappa_ij = a_ij s_i s_j gives

        dL/dw_e = c_e (2 H_ij s_i s_j - r_i / d_i - r_j / d_j) .

    All of it is a sum over listed edges, so the memory is O(N k); the stored places may be more
    than A's (those of the pixel graph). By differentiable operations: in ``grad`` and ``weights``.
    """
    n, k = indices.shape
    rows = torch.arange(n, device=indices.device).repeat_interleave(k)
    ends = indices.reshape(-1).long()
    dtype = torch.float64 if weights.dtype == torch.float64 else torch.float32
    given = weights.reshape(-1).to(dtype)
    passed = given >= clamp_min
    clamped = torch.where(passed, given, torch.as_tensor(clamp_min, dtype=dtype)).double()
    kept = (ends >= 0) & (clamped > 0)
    ends, w = torch.where(kept, ends, rows), torch.where(kept, clamped, 0.0)
    # One place more than there are, for edges that are not stored.
    spare = columns.shape[0]
    there = torch.where(kept, place_of(row_offsets, columns, rows, ends), spare)
    mirror = torch.cat([mirrored_places(columns), rows.new_zeros(1)])
    back = torch.where(kept, mirror[there], spare)
    share = _shares(w.detach(), kept, there, back, spare + 1, symmetrize)

    def node_sums(edges: Tensor) -> Tensor:
        return edges.view(n, k).sum(1) + sums_of(edges, ends, n)

    padded = torch.cat([grad.double(), grad.new_zeros(1, dtype=torch.float64)])
    h = (padded[there] + padded[back]) / 2
    degree = node_sums(share * w)
    degree = torch.where(degree > 0, degree, 1.0)
    scale = degree.rsqrt()
    slope = h * scale[rows] * scale[ends]
    pull = node_sums(share * w * slope) / degree
    found = share * (2 * slope - pull[rows] - pull[ends])
    return torch.where(passed & kept, found, 0.0).to(weights.dtype).view(n, k)


def _shares(
    w: Tensor, kept: Tensor, there: Tensor, back: Tensor, places: int, symmetrize: str
) -> Tensor:
    """c_e: what of an edge's weight goes into its place and into the transposed one.

    Of edges that compete for a place, those of the largest weight share it evenly: a list's
    duplicates for half of it (the mean), or both directions for all of it (the union). A self loop
    is its own transposed, and has its place by two halves.
    """
    union = symmetrize == "union"
    largest = w.new_zeros(places).scatter_reduce(0, there, w, "amax")
    if union:
        largest = largest.scatter_reduce(0, back, w, "amax")
    wins = (kept & (w == largest[there])).to(w.dtype)
    winners = sums_of(wins, there, places)
    if union:
        return wins / (winners + sums_of(wins, back, places))[there].clamp_min(1)
    return wins / winners[there].clamp_min(1) / 2


def check_indices(indices: Tensor, num_nodes: int, *, name: str = "indices") -> None:
    """Raise ValueError for an index outside -1 ... num_nodes - 1."""
    if indices.numel():
        low, high = (int(bound) for bound in indices.aminmax())
        if low < -1 or high >= num_nodes:
            raise ValueError(
                f"{name}: expected -1 (padding) to {num_nodes - 1}, got {low} to {high}"
            )
