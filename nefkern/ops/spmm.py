"""``spmm``: a graph times a dense matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from nefkern import reference
from nefkern.ops import registry
from nefkern.ops.csr import CSRGraph, check_dense_operand, check_graph
from nefkern.ops.sddmm import values_gradient
from nefkern.reference.csr import check_content, raise_invalid_content, transpose


def spmm(graph: CSRGraph, x: Tensor) -> Tensor:
    """kappa x, differentiable in ``x`` and the graph's values, as often as wanted.

    Args:
        graph: N nodes.
        x: [N, K], float32, float64, float16 or bfloat16, any strides.

    Returns:
        [N, K] in the dtype of ``x``. Sums run in float32 (float64 if ``x`` or the graph is) and in
        a fixed order: the result does not depend on the number of threads. (On "triton" in that of
        the tile that autotuning found fastest; under ``torch.use_deterministic_algorithms``, of
        always the same one.) An entry of ``x`` that is not finite reaches its neighbours' rows.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    check_graph("graph", graph)
    check_dense_operand("x", x, graph)
    return registry.call("spmm", *graph.tensors(), x, graph.symmetric)


registry.define(
    "spmm(Tensor row_offsets, Tensor columns, Tensor values, Tensor x, bool symmetric) -> Tensor",
    fake=lambda row_offsets, columns, values, x, symmetric: x.new_empty(x.shape),
)


@registry.kernel("spmm", "reference")
def _reference(row_offsets, columns, values, x, symmetric):
    check_content(row_offsets, columns)
    return reference.spmm(row_offsets, columns, values, x)


def native_accepts(row_offsets, columns, values, x, *_) -> bool:
    """Whether the compiled kernel takes these dtypes; float64 is the reference's."""
    return values.dtype == torch.float32 and x.dtype != torch.float64


def native_spmm(
    row_offsets: Tensor, columns: Tensor, values: Tensor, x: Tensor, *, accumulated: bool = True
) -> Tensor:
    """kappa x by the compiled kernel, in float32 if ``accumulated``, else in the dtype of ``x``;
    half-precision ``x`` is read as it is, except float16 on the CPU, which becomes float32.

    On a GPU nothing waits for the host, so that a graph's content is not checked there
    (:meth:`CSRGraph.validate` does): a node out of range counts as absent.
    """
    x = x.float() if x.dtype == torch.float16 and x.device.type == "cpu" else x
    y, valid = torch.ops.nefkern_native.spmm(row_offsets, columns, values, x, accumulated)
    if not valid:
        raise_invalid_content()
    return y


@registry.kernel("spmm", "cpu", accepts=native_accepts)
def _cpu(row_offsets, columns, values, x, symmetric):
    return native_spmm(row_offsets, columns, values, x, accumulated=False).to(x.dtype)


@registry.kernel("spmm", "cuda", accepts=native_accepts)
def _cuda(row_offsets, columns, values, x, symmetric):
    return native_spmm(row_offsets, columns, values, x, accumulated=False)


@registry.kernel("spmm", "triton", accepts=native_accepts)
def _triton(row_offsets, columns, values, x, symmetric):
    from nefkern.triton.spmm import spmm

    return spmm(row_offsets, columns, values, x, x.dtype)


def _setup_context(ctx, inputs, output) -> None:
    *graph, x, ctx.symmetric = inputs
    ctx.save_for_backward(*graph, x if ctx.needs_input_grad[2] else None)


def _backward(ctx, grad: Tensor | None):
    """With G the gradient of y = kappa x: dx = kappa^T G, and d kappa_ij = G_i · x_j."""
    row_offsets, columns, values, x = ctx.saved_tensors
    d_values = d_x = None
    if grad is not None and ctx.needs_input_grad[2]:
        d_values = values_gradient(row_offsets, columns, grad, x, values.dtype)
    if grad is not None and ctx.needs_input_grad[3]:
        d_x = transposed_spmm(row_offsets, columns, values, grad, ctx.symmetric)
    return None, None, d_values, d_x, None


def transposed_spmm(
    row_offsets: Tensor, columns: Tensor, values: Tensor, x: Tensor, symmetric: bool
) -> Tensor:
    """kappa^T x: the same product for a symmetric graph, else one with the transposed graph."""
    graph = (row_offsets, columns, values)
    if not symmetric:
        graph = transpose(*graph)
    return registry.call("spmm", *graph, x, symmetric)


registry.autograd("spmm", _backward, _setup_context)
