"""Triton kernels of ``add``: two sorted rows are merged by looking up each entry in the other row.

Entry i of row a comes behind i entries of a and those of b that are smaller, less what both have:
binary searches and prefix sums give every place, so that nothing is sorted, and rows of any length
are taken in tiles.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nefkern.reference.csr import check_content, raise_invalid_content
from nefkern.triton.configs import Shipped, device_of, launch
from nefkern.triton.csr import row_of

BLOCK = 256  # entries of a row that a program takes at a time


@triton.jit
def _search(columns, size, wanted, there):
    """The first place whose column isn't below ``wanted``, and whether it is that column."""
    low = tl.zeros_like(wanted)
    left = size  # the place is low to low + left, in all lanes
    while left > 0:
        step = (left + 1) // 2
        below = tl.load(columns + low + step - 1, mask=there, other=0) < wanted
        low += tl.where(there & below, step, 0)
        left -= step
    there = there & (low < size)
    return low, there & (tl.load(columns + low, mask=there, other=-1) == wanted)


@triton.jit
def _count_entries(
    row_offsets_a, columns_a, row_offsets_b, columns_b, counts, invalid, num_nodes, nnz_a, nnz_b,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The size of row ``program_id(0)`` of the union."""
    row = tl.program_id(0).to(tl.int64)
    begin_a, size_a, valid_a = row_of(row_offsets_a, row, nnz_a)
    begin_b, size_b, valid_b = row_of(row_offsets_b, row, nnz_b)
    starts = (row > 0) | ((begin_a == 0) & (begin_b == 0))
    ends = (begin_a + size_a == nnz_a) & (begin_b + size_b == nnz_b)
    valid = valid_a & valid_b & starts & (ends | (row + 1 < num_nodes))
    tl.store(invalid, 1, mask=~valid)
    shared = tl.zeros([BLOCK], tl.int32)
    for first in range(0, size_b, BLOCK):
        j = first + tl.arange(0, BLOCK)
        there = j < size_b
        column = tl.load(columns_b + begin_b + j, mask=there, other=0)
        shared += _search(columns_a + begin_a, size_a, column, there)[1].to(tl.int32)
    tl.store(counts + row + 1, size_a + size_b - tl.sum(shared))


@triton.jit
def _merge_rows(
    row_offsets_a, columns_a, values_a, row_offsets_b, columns_b, values_b, alpha,
    row_offsets, columns, values, nnz_a, nnz_b, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row ``program_id(0)`` of the sum: first a's entries, then those that only b has."""
    row = tl.program_id(0).to(tl.int64)
    begin_a, size_a, _ = row_of(row_offsets_a, row, nnz_a)
    begin_b, size_b, _ = row_of(row_offsets_b, row, nnz_b)
    begin = tl.load(row_offsets + row)
    # A graph whose columns don't ascend, as promised, must not be a reason to write elsewhere.
    size = (tl.load(row_offsets + row + 1) - begin).to(tl.int32)
    columns_a, values_a = columns_a + begin_a, values_a + begin_a
    columns_b, values_b = columns_b + begin_b, values_b + begin_b
    columns, values = columns + begin, values + begin

    shared = tl.zeros([], tl.int32)  # by the entries before this tile
    for first in range(0, size_a, BLOCK):
        i = first + tl.arange(0, BLOCK)
        there = i < size_a
        column = tl.load(columns_a + i, mask=there, other=0)
        j, both = _search(columns_b, size_b, column, there)
        value = tl.load(values_a + i, mask=there, other=0.0)
        value = tl.where(both, value + alpha * tl.load(values_b + j, mask=both, other=0.0), value)
        found = both.to(tl.int32)
        place = i + j - shared - tl.cumsum(found) + found
        written = there & (place < size)
        tl.store(columns + place, column, mask=written)
        tl.store(values + place, value, mask=written)
        shared += tl.sum(found)

    shared = tl.zeros([], tl.int32)
    for first in range(0, size_b, BLOCK):
        j = first + tl.arange(0, BLOCK)
        there = j < size_b
        column = tl.load(columns_b + j, mask=there, other=0)
        i, both = _search(columns_a, size_a, column, there)
        value = alpha * tl.load(values_b + j, mask=there, other=0.0)
        found = both.to(tl.int32)
        place = i + j - shared - tl.cumsum(found)
        written = there & ~both & (place < size)
        tl.store(columns + place, column, mask=written)
        tl.store(values + place, value, mask=written)
        shared += tl.sum(found)


def add(
    row_offsets_a: Tensor,
    columns_a: Tensor,
    values_a: Tensor,
    row_offsets_b: Tensor,
    columns_b: Tensor,
    values_b: Tensor,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """a + alpha b, of float32 values; the three tensors of the sum.

    The host waits once, for the number of entries and whether both graphs' offsets made sense.

    Raises:
        ValueError: they did not.
    """
    graph_a = [x.contiguous() for x in (row_offsets_a, columns_a, values_a)]
    graph_b = [x.contiguous() for x in (row_offsets_b, columns_b, values_b)]
    if columns_a.shape != values_a.shape or columns_b.shape != values_b.shape:
        raise_invalid_content()
    if len(row_offsets_a) == 1:
        check_content(row_offsets_a, columns_a)
        check_content(row_offsets_b, columns_b)
        return row_offsets_a.clone(), columns_a.clone(), values_a.clone()
    row_offsets, invalid = counted(graph_a, graph_b)
    nnz, outside = torch.cat([row_offsets[-1:], invalid]).tolist()
    if outside:
        raise_invalid_content()
    return merged(graph_a, graph_b, alpha, row_offsets, nnz)


def counted(graph_a: Sequence[Tensor], graph_b: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The sum's row offsets, and 1 in a tensor [1] if a graph's don't go from 0 to its size."""
    counts = torch.zeros_like(graph_a[0])
    invalid = counts.new_zeros(1)
    n, sizes = len(counts) - 1, (len(graph_a[1]), len(graph_b[1]))
    with device_of(counts):
        launch(_count_entries, (n,))(
            *graph_a[:2], *graph_b[:2], counts, invalid, n, *sizes, BLOCK=BLOCK
        )
    return counts.cumsum(0), invalid


def merged(
    graph_a: Sequence[Tensor],
    graph_b: Sequence[Tensor],
    alpha: float,
    row_offsets: Tensor,
    nnz: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum's tensors, of ``nnz`` entries."""
    columns, values = graph_a[1].new_empty(nnz), graph_a[2].new_empty(nnz)
    n, sizes = len(row_offsets) - 1, (len(graph_a[1]), len(graph_b[1]))
    with device_of(columns):
        launch(_merge_rows, (n,))(
            *graph_a, *graph_b, alpha, row_offsets, columns, values, *sizes, BLOCK=BLOCK
        )
    return row_offsets, columns, values


def shipped() -> list[Shipped]:
    return [_ship(_count_entries), _ship(_merge_rows)]


def _ship(kernel) -> Shipped:
    kinds = dict.fromkeys(("columns", "columns_a", "columns_b"), "*i32")
    kinds |= dict.fromkeys(("values", "values_a", "values_b"), "*fp32")
    kinds |= {"alpha": "fp32", "num_nodes": "i32", "nnz_a": "i64", "nnz_b": "i64"}
    return Shipped(
        f"add {kernel.__name__[1:]}",
        kernel,
        {name: kinds.get(name, "*i64") for name in kernel.arg_names if not name.isupper()},
        {"BLOCK": BLOCK},
    )
