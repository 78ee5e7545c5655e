"""Reference of ``add``: the weighted sum of two sparse matrices (eq 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from nefkern.reference.csr import compress, merge_entries, place_of, row_of_entry


def add(
    row_offsets_a: Tensor,
    columns_a: Tensor,
    values_a: Tensor,
    row_offsets_b: Tensor,
    columns_b: Tensor,
    values_b: Tensor,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """a + alpha b; see :func:`nefkern.ops.add`."""
    num_nodes = row_offsets_a.shape[0] - 1
    dtype = torch.promote_types(values_a.dtype, values_b.dtype)
    rows, columns, values = merge_entries(
        torch.cat(
            [
                row_of_entry(row_offsets_a, columns_a.shape[0]),
                row_of_entry(row_offsets_b, columns_b.shape[0]),
            ]
        ),
        torch.cat([columns_a, columns_b]).long(),
        torch.cat([values_a.double(), values_b.double() * alpha]),  # a sum is rounded once
        num_nodes,
        "sum",
    )
    return compress(rows, num_nodes), columns.to(torch.int32), values.to(dtype)


def add_backward(
    grad: Tensor, row_offsets: Tensor, columns: Tensor, own_offsets: Tensor, own_columns: Tensor
) -> Tensor:
    """The gradient ``grad`` [nnz] of a sum's values at the places of one of its two matrices."""
    rows = row_of_entry(own_offsets, own_columns.shape[0])
    return grad[place_of(row_offsets, columns, rows, own_columns)]
