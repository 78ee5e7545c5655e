"""Triton kernel of ``sddmm``: scalar products of a row of x with the rows of y that it meets."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nefkern.reference.csr import check_content
from nefkern.triton.configs import Shipped, device_of, launch
from nefkern.triton.csr import row_of

# Entries of a row taken at a time, and columns: the tile of y that is in flight.
TILE = {"BLOCK_E": 16, "BLOCK_K": 128}


@triton.jit
def _sddmm_kernel(
    row_offsets, columns, x, y, values, num_nodes, nnz, width, x_stride, y_stride,
    BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The values of row ``program_id(0)``; a node out of range counts as a row of zeros."""
    row = tl.program_id(0).to(tl.int64)
    begin, size, _ = row_of(row_offsets, row, nnz)
    end = begin + size
    for first in range(begin, end, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        node = tl.load(columns + e, mask=e < end, other=-1).to(tl.int64)
        there = (node >= 0) & (node < num_nodes)
        total = tl.zeros([BLOCK_E], tl.float32)
        for column in range(0, width, BLOCK_K):
            k = column + tl.arange(0, BLOCK_K)
            mine = tl.load(x + row * x_stride + k, mask=k < width, other=0.0).to(tl.float32)
            theirs = tl.load(
                y + node[:, None] * y_stride + k[None, :],
                mask=there[:, None] & (k < width)[None, :],
                other=0.0,
            )
            total += tl.sum(mine[None, :] * theirs.to(tl.float32), 1)
        tl.store(values + e, total, mask=e < end)


def sddmm(row_offsets: Tensor, columns: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """x_i · y_j [nnz] in float32, of x and y in float32, float16 or bfloat16.

    On a GPU nothing waits for the host, so that a graph's content is not checked there: a node out
    of range counts as a row of zeros, and a row whose offsets make no sense as empty.

    Raises:
        ValueError: the graph's tensors contradict each other.
    """
    if x.device.type == "cpu":
        check_content(row_offsets, columns)
    row_offsets, columns = row_offsets.contiguous(), columns.contiguous()
    x, y = (z if z.stride(-1) == 1 else z.contiguous() for z in (x, y))
    n, width = x.shape
    values = torch.zeros(columns.shape[0], dtype=torch.float32, device=x.device)
    if n and len(columns):
        with device_of(x):
            launch(_sddmm_kernel, (n,))(
                row_offsets, columns, x, y, values, n, len(columns), width, x.stride(0),
                y.stride(0), **TILE,
            )  # fmt: skip
    return values


def shipped() -> list[Shipped]:
    """Operands of one dtype, or a gradient in float32 beside one in half precision."""
    kinds = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}
    pairs = [(name, name) for name in kinds] + [("float32", name) for name in kinds]
    plain = [
        Shipped(
            f"sddmm {of}" if of == to else f"sddmm {of}, {to}",
            _sddmm_kernel,
            {
                "row_offsets": "*i64", "columns": "*i32", "x": kinds[of], "y": kinds[to],
                "values": "*fp32", "num_nodes": "i32", "nnz": "i64", "width": "i32",
                "x_stride": "i64", "y_stride": "i64",
            },
            TILE,
        )
        for of, to in dict.fromkeys(pairs)
    ]  # fmt: skip
    return [*plain, *(kernel.for_multiples("width", "x_stride", "y_stride") for kernel in plain)]
