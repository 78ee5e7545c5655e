"""``sddmm``: scalar products of rows at the places of a graph, the gradient of a graph's values."""

from __future__ import annotations

import torch
from torch import Tensor

from nefkern import backends, reference
from nefkern.ops import registry
from nefkern.ops.csr import CSRGraph, check_dense_operand, check_graph
from nefkern.reference.csr import check_content, raise_invalid_content, transpose
from nefkern.reference.spmm import accumulation_dtype


def sddmm(graph: CSRGraph, x: Tensor, y: Tensor) -> Tensor:
    """x_i · y_j for every stored place (i, j): the sampled dense-dense matrix product.

    The N x N matrix x yᵀ is never held. If L is a function of κy and x its gradient, this is the
    gradient of L in κ's values. Differentiable in ``x`` and ``y``, as often as wanted.

    Args:
        graph: N nodes; its values play no part.
        x, y: [N, K], float32, float64, float16 or bfloat16.

    Returns:
        [nnz], float64 if ``x`` or ``y`` is, else float32 (also for half precision). Exchanging x
        and y gives the same bits for (j, i) as for (i, j).

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    check_graph("graph", graph)
    check_dense_operand("x", x, graph)
    check_dense_operand("y", y, graph)
    if x.shape != y.shape:
        raise ValueError(f"y: expected shape {list(x.shape)} (x's), got {list(y.shape)}")
    return registry.call("sddmm", graph.row_offsets, graph.columns, x, y)


registry.define(
    "sddmm(Tensor row_offsets, Tensor columns, Tensor x, Tensor y) -> Tensor",
    fake=lambda row_offsets, columns, x, y: x.new_empty(
        columns.shape[0], dtype=accumulation_dtype(x, y)
    ),
)


@registry.kernel("sddmm", "reference")
def _reference(row_offsets, columns, x, y):
    check_content(row_offsets, columns)
    return reference.sddmm(row_offsets, columns, x, y)


def _native_accepts(row_offsets, columns, x, y) -> bool:
    return torch.float64 not in (x.dtype, y.dtype)


@registry.kernel("sddmm", "cpu", accepts=_native_accepts)
def _cpu(row_offsets, columns, x, y):
    values, valid = torch.ops.nefkern_native.sddmm(row_offsets, columns, x.float(), y.float())
    if not valid:
        raise_invalid_content()
    return values


@registry.kernel("sddmm", "triton", accepts=_native_accepts)
def _triton(row_offsets, columns, x, y):
    from nefkern.triton.sddmm import sddmm

    return sddmm(row_offsets, columns, x, y)


@registry.kernel("sddmm", "cuda", accepts=_native_accepts)
def _cuda(row_offsets, columns, x, y):
    """By Triton's kernel where it is installed, else by PyTorch: the extension has none of it."""
    found = _reference if backends.why_not("triton") else _triton
    return found(row_offsets, columns, x, y)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor | None):
    """With Γ, the matrix of the gradients at the graph's places: dx = Γ y and dy = Γᵀ x."""
    row_offsets, columns, x, y = ctx.saved_tensors
    dx = dy = None
    if grad is not None and ctx.needs_input_grad[2]:
        dx = registry.call("spmm", row_offsets, columns, grad, y, False).to(x.dtype)
    if grad is not None and ctx.needs_input_grad[3]:
        turned = transpose(row_offsets, columns, grad)
        dy = registry.call("spmm", *turned, x, False).to(y.dtype)
    return None, None, dx, dy


registry.autograd("sddmm", _backward, _setup_context)


def values_gradient(
    row_offsets: Tensor, columns: Tensor, x: Tensor | None, y: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """x_i · y_j in the dtype of a graph's values; None where ``x``, a gradient, is None."""
    if x is None:
        return None
    return registry.call("sddmm", row_offsets, columns, x, y).to(dtype)
