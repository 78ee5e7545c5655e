"""Compressed sparse rows, as the Triton kernels read them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_of(row_offsets, row, nnz):
    """A row's first entry, its size, and whether the offsets made sense; never outside 0 to nnz."""
    begin, end = tl.load(row_offsets + row), tl.load(row_offsets + row + 1)
    valid = (begin >= 0) & (begin <= end) & (end <= nnz)
    return begin, tl.where(valid, end - begin, 0).to(tl.int32), valid
