"""``quadratic_form``: psi^T kappa phi."""

from __future__ import annotations

import torch
from torch import Tensor

from nefkern import reference
from nefkern.ops import registry
from nefkern.ops.csr import CSRGraph, check_content, check_dense_operand, check_graph
from nefkern.ops.spmm import native_accepts, native_spmm, transposed_spmm
from nefkern.reference.spmm import accumulation_dtype


def quadratic_form(psi: Tensor, graph: CSRGraph, phi: Tensor | None = None) -> Tensor:
    """psi^T kappa phi, differentiable once in ``psi`` and ``phi`` (R of eq 6 for phi = psi).

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
    return torch.ops.nefkern.quadratic_form(*graph.tensors(), psi, phi, graph.symmetric)[0]


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
    row_offsets, columns, values, psi, phi, symmetric = inputs
    y = output[1]
    ctx.mark_non_differentiable(y)
    ctx.save_for_backward(row_offsets, columns, values, psi, y)
    ctx.symmetric, ctx.one_operand = symmetric, phi is None
    ctx.phi_dtype = psi.dtype if phi is None else phi.dtype


def _backward(ctx, grad: Tensor, _):
    """d psi = Y G^T and d phi = kappa^T psi G, with Y = kappa phi and G the gradient of R."""
    *graph, psi, y = ctx.saved_tensors
    if ctx.one_operand and ctx.symmetric:  # kappa^T psi is Y itself
        return None, None, None, (y @ (grad + grad.T)).to(psi.dtype), None, None
    needs = ctx.needs_input_grad
    d_psi = d_phi = None
    if needs[3]:
        d_psi = y @ grad.T
    if needs[4] or (ctx.one_operand and needs[3]):
        d_phi = transposed_spmm(*graph, psi.to(y.dtype) @ grad, ctx.symmetric)
    if ctx.one_operand:
        return None, None, None, (d_psi + d_phi).to(psi.dtype), None, None
    return (
        None,
        None,
        None,
        None if d_psi is None else d_psi.to(psi.dtype),
        None if d_phi is None else d_phi.to(ctx.phi_dtype),
        None,
    )


registry.autograd("quadratic_form", _backward, _setup_context)
