"""``quadratic_form``: psi^T kappa phi."""

from __future__ import annotations

import torch
from torch import Tensor

from nefkern import reference
from nefkern.ops import registry
from nefkern.ops.csr import CSRGraph, check_dense_operand, check_graph
from nefkern.ops.sddmm import values_gradient
from nefkern.ops.spmm import native_accepts, native_spmm, transposed_spmm
from nefkern.reference.csr import check_content
from nefkern.reference.spmm import accumulation_dtype


def quadratic_form(psi: Tensor, graph: CSRGraph, phi: Tensor | None = None) -> Tensor:
    """psi^T kappa phi, R of eq 6 for phi = psi; differentiable in both and in the graph's values,
    as often as wanted.

    Args:
        psi: [N, K], float32, float64, float16 or bfloat16: one column a function, one row a node.
        graph: kappa, N nodes.
        phi: [N, J] of the same dtype, or None for ``psi``, which saves a sparse product in the
            backward pass of a symmetric graph.

    Returns:
        [K, J]; float64 if an operand is, else float32 (also for half precision: sums over N terms).

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    check_graph("graph", graph)
    check_dense_operand("psi", psi, graph)
    if phi is not None:
        check_dense_operand("phi", phi, graph)
        if phi.dtype != psi.dtype:
            raise TypeError(f"phi: expected {psi.dtype} (psi's), got {phi.dtype}")
    return registry.call("quadratic_form", *graph.tensors(), psi, phi, graph.symmetric)[0]


def _fake(row_offsets, columns, values, psi, phi, symmetric):
    phi = psi if phi is None else phi
    dtype = accumulation_dtype(values, phi)
    return (
        psi.new_empty((psi.shape[1], phi.shape[1]), dtype=dtype),
        psi.new_empty(phi.shape, dtype=dtype),
    )


registry.define(
    "quadratic_form(Tensor row_offsets, Tensor columns, Tensor values, Tensor psi, Tensor? phi, "
    "bool symmetric) -> (Tensor, Tensor)",
    fake=_fake,
)


@registry.kernel("quadratic_form", "reference")
def _reference(row_offsets, columns, values, psi, phi, symmetric):
    check_content(row_offsets, columns)
    return reference.quadratic_form(row_offsets, columns, values, psi, psi if phi is None else phi)


@registry.kernel("quadratic_form", "cpu", accepts=native_accepts)
@registry.kernel("quadratic_form", "cuda", accepts=native_accepts)
def _native(row_offsets, columns, values, psi, phi, symmetric):
    y = native_spmm(row_offsets, columns, values, psi if phi is None else phi)
    return psi.float().T @ y, y


@registry.kernel("quadratic_form", "triton", accepts=native_accepts)
def _triton(row_offsets, columns, values, psi, phi, symmetric):
    from nefkern.triton.spmm import spmm

    y = spmm(row_offsets, columns, values, psi if phi is None else phi, torch.float32)
    return psi.float().T @ y, y


def _setup_context(ctx, inputs, output) -> None:
    *graph, psi, phi, ctx.symmetric = inputs
    ctx.one_operand, ctx.dtype = phi is None, psi.dtype
    # With one operand and a symmetric graph kappa^T psi is Y, and psi can go.
    short = phi is None and ctx.symmetric and not ctx.needs_input_grad[2]
    kept = (None if short else psi, phi if ctx.needs_input_grad[2] else None, output[1])
    ctx.save_for_backward(*graph, *kept)


def _backward(ctx, grad: Tensor | None, grad_y: Tensor | None):
    """d psi = Y G^T and d phi = kappa^T (psi G + H), with Y = kappa phi, G and H the gradients of R
    and Y.

    kappa itself is seen through Y only: d kappa_ij = (psi G + H)_i · phi_j. The second result Y
    takes part, although no user sees it: a second derivative goes through it.
    """
    *graph, psi, phi, y = ctx.saved_tensors
    needs = ctx.needs_input_grad
    d_values = d_psi = d_phi = of_y = None
    one_product = ctx.one_operand and ctx.symmetric  # kappa^T psi G = Y G
    if needs[2] or needs[4] or (needs[3] and ctx.one_operand and not one_product):
        of_y = total(None if grad is None else psi.to(y.dtype) @ grad, grad_y)
    if needs[2]:
        phi = psi if ctx.one_operand else phi
        d_values = values_gradient(*graph[:2], of_y, phi, graph[2].dtype)
    if one_product:
        if needs[3]:
            d_psi = gradient_through_y(graph, y, None if grad is None else grad + grad.T, grad_y)
        return None, None, d_values, rounded(d_psi, ctx.dtype), None, None
    if needs[3] and grad is not None:
        d_psi = y @ grad.T
    if (needs[4] or (ctx.one_operand and needs[3])) and of_y is not None:
        d_phi = transposed_spmm(*graph, of_y, ctx.symmetric)
    if ctx.one_operand:
        d_psi, d_phi = (total(d_psi, d_phi) if needs[3] else None), None
    return None, None, d_values, rounded(d_psi, ctx.dtype), rounded(d_phi, ctx.dtype), None


def total(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a + b, where None stands for zeros."""
    return b if a is None else a if b is None else a + b


def rounded(grad: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A gradient in its operand's dtype."""
    return None if grad is None else grad.to(dtype)


def gradient_through_y(
    graph: list[Tensor], y: Tensor, factor: Tensor | None, grad_y: Tensor | None
) -> Tensor | None:
    """Y F + kappa H: the gradient of psi, for a symmetric kappa and Y = kappa psi.

    H is the gradient of Y; F [K, K] is what those of R = psi^T Y, and of functions of R, come to.
    """
    through_r = None if factor is None else y @ factor
    through_y = None if grad_y is None else transposed_spmm(*graph, grad_y, True)
    return total(through_r, through_y)


registry.autograd("quadratic_form", _backward, _setup_context)
