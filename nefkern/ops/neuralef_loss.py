"""``neuralef_loss``: the NeuralEF objective with its closed-form gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from nefkern import reference
from nefkern.ops import checks, registry
from nefkern.ops.csr import CSRGraph, check_dense_operand, check_graph
from nefkern.ops.quadratic_form import gradient_through_y, rounded, total
from nefkern.ops.sddmm import values_gradient
from nefkern.ops.spmm import native_accepts, native_spmm
from nefkern.reference.csr import check_content
from nefkern.reference.neuralef_loss import gradient_factor, gradient_of_r, loss_of_r
from nefkern.reference.spmm import accumulation_dtype


def neuralef_loss(
    psi: Tensor, graph: CSRGraph, beta: float, t: float = 0.01
) -> tuple[Tensor, Tensor]:
    """The objective of neural eigenfunctions (eqs 5-7), whose minimisers order the eigenvectors.

    With U = psi, R = U^T kappa U and R^ = stop_gradient(U)^T kappa U,

        L = -(t/K) sum_j R_jj + (beta t^2/K) sum_{i<j} R^_ij^2 .

    kappa is symmetric, so with Y = kappa U kept from the forward pass the gradient is one dense
    product, dL/dU = g(U) = -(2t/K) Y + (2 beta t^2/K) Y triu(R, 1). L is differentiable in ``psi``,
    and in the graph's values, where stop_gradient means nothing: dL/dkappa = U (dL/dR) U^T.

    Higher derivatives, of a gradient penalty for instance, are those of g as a function of U, Y and
    R included: what finite differences of the gradient converge to. (Autograd on the first formula,
    with ``detach`` for stop_gradient, would hold one factor of R^ constant there too, and give
    the derivative of no function.)

    Args:
        psi: U [N, K], columns already of unit L2 norm over the batch (the L2 batch norm); float32,
            float64, float16 or bfloat16. K at least 1.
        graph: kappa, N nodes, symmetric.
        beta: the penalty's weight, already scaled for K (0.08 * 256 / K in the paper).
        t: the trace's weight (0.01 in the authors' implementation).

    Returns:
        loss: a scalar, and R [K, K], which carries no gradient; both float64 if an operand is, else
        float32, also for half precision.

    Raises:
        TypeError, ValueError: an argument is not as described; the graph is not marked symmetric.
    """
    check_graph("graph", graph)
    check_dense_operand("psi", psi, graph)
    if psi.shape[1] == 0:
        raise ValueError("psi: expected at least one column, got [N, 0]")
    if not graph.symmetric:
        raise ValueError("graph: expected a symmetric graph (symmetric=True), got symmetric=False")
    beta, t = checks.finite_number("beta", beta), checks.finite_number("t", t)
    loss, r, _ = registry.call("neuralef_loss", *graph.tensors(), psi, beta, t)
    return loss, r.detach()


def _fake(row_offsets, columns, values, psi, beta, t):
    dtype = accumulation_dtype(values, psi)
    k = psi.shape[1]
    return (
        psi.new_empty((), dtype=dtype),
        psi.new_empty((k, k), dtype=dtype),
        psi.new_empty(psi.shape, dtype=dtype),
    )


registry.define(
    "neuralef_loss(Tensor row_offsets, Tensor columns, Tensor values, Tensor psi, float beta, "
    "float t) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
)


@registry.kernel("neuralef_loss", "reference")
def _reference(row_offsets, columns, values, psi, beta, t):
    check_content(row_offsets, columns)
    return reference.neuralef_loss(row_offsets, columns, values, psi, beta, t)


@registry.kernel("neuralef_loss", "cpu", accepts=native_accepts)
@registry.kernel("neuralef_loss", "cuda", accepts=native_accepts)
def _native(row_offsets, columns, values, psi, beta, t):
    y = native_spmm(row_offsets, columns, values, psi)
    r = psi.float().T @ y
    return loss_of_r(r, beta, t), r, y


@registry.kernel("neuralef_loss", "triton", accepts=native_accepts)
def _triton(row_offsets, columns, values, psi, beta, t):
    from nefkern.triton.spmm import spmm

    y = spmm(row_offsets, columns, values, psi, torch.float32)
    r = psi.float().T @ y
    return loss_of_r(r, beta, t), r, y


def _setup_context(ctx, inputs, output) -> None:
    *graph, psi, ctx.beta, ctx.t = inputs
    _, r, y = output
    ctx.save_for_backward(*graph, psi if ctx.needs_input_grad[2] else None, r, y)
    ctx.dtype = psi.dtype


def _backward(ctx, grad: Tensor | None, grad_r: Tensor | None, grad_y: Tensor | None):
    """The closed form g; in a second derivative also the gradients of its factors R and Y."""
    *graph, psi, r, y = ctx.saved_tensors
    d_values = d_psi = None
    if ctx.needs_input_grad[2]:
        of_r = None if grad is None else gradient_of_r(grad, r, ctx.beta, ctx.t)
        of_r = total(of_r, grad_r)
        of_y = total(None if of_r is None else psi.to(y.dtype) @ of_r, grad_y)
        d_values = values_gradient(*graph[:2], of_y, psi, graph[2].dtype)
    if ctx.needs_input_grad[3]:
        factor = None if grad is None else gradient_factor(grad, r, ctx.beta, ctx.t)
        if grad_r is not None:
            factor = total(factor, grad_r + grad_r.T)
        d_psi = gradient_through_y(graph, y, factor, grad_y)
    return None, None, d_values, rounded(d_psi, ctx.dtype), None, None


registry.autograd("neuralef_loss", _backward, _setup_context)
