"""Reference of ``sddmm``: scalar products of rows at the places of a sparse matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from nefkern.reference.csr import row_of_entry
from nefkern.reference.spmm import accumulation_dtype

# Numbers of gathered rows held at a time, so that the memory stays O(nnz): what a processor's cache
# holds, and what keeps a GPU busy.
_BLOCK = {"cpu": 2**20}
_GPU_BLOCK = 2**25


def sddmm(row_offsets: Tensor, columns: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """x_i · y_j [nnz] of every stored place (i, j); see :func:`nefkern.ops.sddmm`."""
    dtype = accumulation_dtype(x, y)
    x, y, columns = x.to(dtype), y.to(dtype), columns.long()
    rows = row_of_entry(row_offsets, columns.shape[0])
    values = x.new_empty(columns.shape[0])
    step = max(1, _BLOCK.get(x.device.type, _GPU_BLOCK) // max(1, x.shape[1]))
    for begin in range(0, columns.shape[0], step):
        part = slice(begin, begin + step)
        torch.sum(x[rows[part]] * y[columns[part]], 1, out=values[part])
    return values
