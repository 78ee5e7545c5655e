"""Compressed sparse rows in plain tensors: the steps that the graph operators share.

A matrix of ``num_nodes`` rows is the triple ``row_offsets`` (int64 [num_nodes + 1]), ``columns``
(int32 [nnz], ascending inside a row) and ``values`` ([nnz]).
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor


def row_of_entry(row_offsets: Tensor, nnz: int) -> Tensor:
    """The row (int64 [nnz]) that each stored entry belongs to."""
    rows = torch.arange(row_offsets.shape[0] - 1, device=row_offsets.device)
    return torch.repeat_interleave(rows, row_offsets.diff(), output_size=nnz)


def merge_entries(
    rows: Tensor, columns: Tensor, values: Tensor, num_nodes: int, reduce: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Sort entries by row, then column, and ``reduce`` ("sum" or "amax") those of one place."""
    place, which = torch.unique(rows * max(num_nodes, 1) + columns, return_inverse=True)
    merged = values.new_zeros(place.shape).scatter_reduce_(
        0, which, values, reduce, include_self=False
    )
    return place // max(num_nodes, 1), place % max(num_nodes, 1), merged


def sums_of(values: Tensor, index: Tensor, size: int) -> Tensor:
    """[``size``]: the sums of the values that each index names; the same bits every time.

    On a GPU too, where ``index_add`` adds in an order that chance decides and ``index_put`` sorts
    first. Differentiable as often as wanted."""
    zeros = values.new_zeros(size)
    if values.device.type == "cuda":
        return zeros.index_put((index,), values, accumulate=True)
    return zeros.index_add(0, index, values)


def compress(rows: Tensor, num_nodes: int) -> Tensor:
    """Row offsets (int64 [num_nodes + 1]) of entries whose ``rows`` ascend."""
    return torch.searchsorted(rows, torch.arange(num_nodes + 1, device=rows.device))


def place_of(row_offsets: Tensor, columns: Tensor, rows: Tensor, wanted: Tensor) -> Tensor:
    """Where the entries (``rows``, ``wanted``) are stored, int64; of those that are not, any."""
    num_nodes = row_offsets.shape[0] - 1
    stored = row_of_entry(row_offsets, columns.shape[0]) * num_nodes + columns
    return torch.searchsorted(stored, rows * num_nodes + wanted)


def mirrored_places(columns: Tensor) -> Tensor:
    """For each stored entry (i, j) of a matrix of symmetric structure, where (j, i) is stored.

    Sorted by column, the entries stand in the order of the transposed matrix, which is the same."""
    return torch.sort(columns, stable=True).indices


def transpose(
    row_offsets: Tensor, columns: Tensor, values: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The transposed square matrix; a stable sort by column keeps its columns ascending."""
    rows = row_of_entry(row_offsets, columns.shape[0])
    by_column, order = torch.sort(columns, stable=True)
    nodes = torch.arange(row_offsets.shape[0], device=columns.device, dtype=columns.dtype)
    return torch.searchsorted(by_column, nodes), rows[order].to(torch.int32), values[order]


def check_content(row_offsets: Tensor, columns: Tensor) -> None:
    """Raise ValueError for offsets or columns that would be read out of bounds."""
    n, nnz = row_offsets.shape[0] - 1, columns.shape[0]
    ends = row_offsets[0] == 0 and row_offsets[-1] == nnz
    if not ends or bool((row_offsets.diff() < 0).any()):
        raise_invalid_content()
    if nnz and not (columns.min() >= 0 and columns.max() < n):
        raise_invalid_content()


def raise_invalid_content() -> NoReturn:
    """The error of a graph whose tensors contradict each other."""
    raise ValueError(
        "graph: expected row_offsets that never fall, from 0 to nnz, and columns from 0 to "
        "num_nodes - 1, got others; CSRGraph.validate() says which"
    )
