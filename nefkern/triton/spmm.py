"""Triton kernel of ``spmm``: gathered rows of x, weighted and summed in float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nefkern.backends import interpreting
from nefkern.reference.csr import check_content, raise_invalid_content
from nefkern.triton.configs import Shipped, Tuned, device_of
from nefkern.triton.csr import row_of

# Entries of a row taken at a time, and columns of x: as many bytes in flight as hide the latency of
# rows that come from the L2 cache.
CONFIGS = [
    triton.Config({"BLOCK_E": e, "BLOCK_K": k}, num_warps=warps)
    for e, k, warps in ((16, 256, 4), (32, 128, 4), (16, 128, 4), (32, 64, 2), (8, 256, 4))
]


@triton.jit
def _spmm_kernel(
    row_offsets, columns, values, x, y, num_nodes, nnz, width, x_stride, y_stride,
    BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Row ``program_id(0)`` of y, one tile of its columns.

    A node out of range counts as absent, a row whose offsets make no sense as empty.
    """
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    begin, size, _ = row_of(row_offsets, row, nnz)
    end = begin + size
    total = tl.zeros([BLOCK_K], tl.float32)
    for first in range(begin, end, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        node = tl.load(columns + e, mask=e < end, other=-1).to(tl.int64)
        there = (node >= 0) & (node < num_nodes)
        weight = tl.load(values + e, mask=there, other=0.0)
        rows = tl.load(
            x + node[:, None] * x_stride + k[None, :],
            mask=there[:, None] & (k < width)[None, :],
            other=0.0,
        )
        total += tl.sum(weight[:, None] * rows.to(tl.float32), 0)
    tl.store(y + row * y_stride + k, total.to(y.dtype.element_ty), mask=k < width)


_tuned = Tuned(_spmm_kernel, CONFIGS, key=["width"])


def spmm(
    row_offsets: Tensor, columns: Tensor, values: Tensor, x: Tensor, dtype: torch.dtype
) -> Tensor:
    """kappa x as ``dtype``; float32 values, x float32, float16 or bfloat16.

    On a GPU nothing waits for the host, so that a graph's content is not checked there
    (:meth:`CSRGraph.validate` does): a node out of range counts as absent, a row whose offsets make
    no sense as empty.

    Raises:
        ValueError: the graph's tensors contradict each other.
    """
    if columns.shape != values.shape:
        raise_invalid_content()
    if x.device.type == "cpu":
        check_content(row_offsets, columns)
    row_offsets, columns, values = (y.contiguous() for y in (row_offsets, columns, values))
    n, width = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    # The interpreter would cut, not round, to bfloat16.
    y = torch.empty(n, width, dtype=torch.float32 if interpreting() else dtype, device=x.device)
    if y.numel():
        with device_of(x):
            _tuned[lambda meta: (n, triton.cdiv(width, meta["BLOCK_K"]))](
                row_offsets, columns, values, x, y, n, len(columns), width, x.stride(0), y.stride(0)
            )
    return y.to(dtype)


def shipped() -> list[Shipped]:
    """Sums in float32, and in x's own dtype where that is another."""
    kinds = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}
    pairs = [(name, "float32") for name in kinds] + [(name, name) for name in kinds]
    graph = {"row_offsets": "*i64", "columns": "*i32", "values": "*fp32"}
    sizes = {"num_nodes": "i32", "nnz": "i64"}
    kernels = [
        Shipped(
            f"spmm {of}, {config.kwargs['BLOCK_E']} x {config.kwargs['BLOCK_K']}"
            + (f", as {to}" if to != of else ""),
            _spmm_kernel,
            {
                **graph, "x": kinds[of], "y": kinds[to], **sizes, "width": "i32", "x_stride": "i64",
                "y_stride": "i64",
            },
            config.kwargs,
            config.num_warps,
            config.num_stages,
        )
        for of, to in dict.fromkeys(pairs)
        for config in CONFIGS
    ]  # fmt: skip
    return kernels + [one.for_multiples("width", "x_stride", "y_stride") for one in kernels]
