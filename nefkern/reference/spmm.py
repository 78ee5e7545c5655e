"""Reference of ``spmm``: a sparse matrix times a dense one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulation_dtype(*operands: Tensor) -> torch.dtype:
    """float64 if any operand is, float32 otherwise: half precision is never summed in half."""
    wide = any(operand.dtype == torch.float64 for operand in operands)
    return torch.float64 if wide else torch.float32


def spmm_accumulated(row_offsets: Tensor, columns: Tensor, values: Tensor, x: Tensor) -> Tensor:
    """kappa x before it is rounded to the dtype of ``x``.

    Row i is the sum of x's rows ``columns[i]``, weighted by ``values[i]``: a bag of embeddings.
    """
    dtype = accumulation_dtype(values, x)
    if x.numel() == 0:
        return x.new_empty(x.shape, dtype=dtype)
    return F.embedding_bag(
        columns.long(),
        x.to(dtype).contiguous(),
        row_offsets,
        mode="sum",
        per_sample_weights=values.to(dtype),
        include_last_offset=True,
    )


def spmm(row_offsets: Tensor, columns: Tensor, values: Tensor, x: Tensor) -> Tensor:
    """kappa x [N, K] in the dtype of ``x``; see :func:`nefkern.ops.spmm`."""
    return spmm_accumulated(row_offsets, columns, values, x).to(x.dtype)
