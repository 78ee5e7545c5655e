"""``add``: the weighted sum of two graphs."""

from __future__ import annotations

import torch

from nefkern import reference
from nefkern.ops import checks, registry
from nefkern.ops.csr import CSRGraph, check_graph
from nefkern.reference.csr import check_content, raise_invalid_content


def add(graph_a: CSRGraph, graph_b: CSRGraph, alpha: float) -> CSRGraph:
    """graph_a + alpha graph_b (eq 4: kappa = feature graph + alpha pixel graph).

    The result stores every place that either graph stores, also where a sum happens to be 0.
    Differentiable in both graphs' values, as often as wanted.

    Args:
        graph_a, graph_b: graphs of the same number of nodes on the same device.
        alpha: a finite number (of float32, unless a graph is float64).

    Returns:
        A graph, symmetric if both are; ``values`` is float64 if either graph's is.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    check_graph("graph_a", graph_a)
    check_graph("graph_b", graph_b)
    if graph_a.num_nodes != graph_b.num_nodes:
        raise ValueError(
            f"graph_b: expected {graph_a.num_nodes} nodes (graph_a's), got {graph_b.num_nodes}"
        )
    if graph_a.device != graph_b.device:
        raise ValueError(f"graph_b: expected device {graph_a.device}, got {graph_b.device}")
    alpha = checks.factor("alpha", alpha, torch.promote_types(graph_a.dtype, graph_b.dtype))
    row_offsets, columns, values = registry.call(
        "add", *graph_a.tensors(), *graph_b.tensors(), alpha
    )
    symmetric = graph_a.symmetric and graph_b.symmetric
    return CSRGraph(row_offsets, columns, values, graph_a.num_nodes, symmetric)


def _fake(row_offsets_a, columns_a, values_a, row_offsets_b, columns_b, values_b, alpha):
    nnz = registry.new_size()
    dtype = torch.promote_types(values_a.dtype, values_b.dtype)
    return (
        torch.empty_like(row_offsets_a),
        columns_a.new_empty(nnz),
        values_a.new_empty(nnz, dtype=dtype),
    )


registry.define(
    "add(Tensor row_offsets_a, Tensor columns_a, Tensor values_a, Tensor row_offsets_b, "
    "Tensor columns_b, Tensor values_b, float alpha) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
)


@registry.kernel("add", "reference")
def _reference(row_offsets_a, columns_a, values_a, row_offsets_b, columns_b, values_b, alpha):
    check_content(row_offsets_a, columns_a)
    check_content(row_offsets_b, columns_b)
    return reference.add(
        row_offsets_a, columns_a, values_a, row_offsets_b, columns_b, values_b, alpha
    )


def _native_accepts(row_offsets_a, columns_a, values_a, row_offsets_b, columns_b, values_b, _):
    return values_a.dtype == values_b.dtype == torch.float32


@registry.kernel("add", "cpu", accepts=_native_accepts)
@registry.kernel("add", "cuda", accepts=_native_accepts)
def _native(*args):
    *graph, valid = torch.ops.nefkern_native.add(*args)
    if not valid:
        raise_invalid_content()
    return tuple(graph)


@registry.kernel("add", "triton", accepts=_native_accepts)
def _triton(*args):
    from nefkern.triton.add import add

    return add(*args)


registry.define(
    "add_backward(Tensor grad, Tensor row_offsets, Tensor columns, Tensor own_offsets, "
    "Tensor own_columns) -> Tensor",
    fake=lambda grad, _, __, own_offsets, own_columns: grad.new_empty(own_columns.shape),
)


@registry.kernel("add_backward", "cuda")
@registry.kernel("add_backward", "triton")
@registry.kernel("add_backward", "reference")
def _reference_backward(*args):
    """On a GPU as well: neither has a kernel of its own."""
    return reference.add_backward(*args)


@registry.kernel("add_backward", "cpu", accepts=lambda grad, *_: grad.dtype == torch.float32)
def _cpu_backward(*args):
    values, valid = torch.ops.nefkern_native.add_backward(*args)
    if not valid:
        raise_invalid_content()
    return values


def _setup_second(ctx, inputs, output) -> None:
    grad, *structures = inputs
    ctx.save_for_backward(grad, *structures)


def _second(ctx, cotangent):
    """The transposed selection, as the reference's derivative."""
    if cotangent is None:
        return (None,) * 5
    grad, *structures = ctx.saved_tensors
    pull_back = torch.func.vjp(lambda g: reference.add_backward(g, *structures), grad)[1]
    return *pull_back(cotangent), None, None, None, None


registry.autograd("add_backward", _second, _setup_second)


def _setup_context(ctx, inputs, output) -> None:
    *graphs, ctx.alpha = inputs
    ctx.save_for_backward(*graphs, *output[:2])


def _backward(ctx, _offsets, _columns, grad):
    """Every entry takes its place's gradient, those of the second graph alpha times."""
    *graphs, row_offsets, columns = ctx.saved_tensors
    found = [None] * 7
    for first, weight in ((0, 1.0), (3, ctx.alpha)):
        if grad is None or not ctx.needs_input_grad[first + 2]:
            continue
        *own, values = graphs[first : first + 3]
        part = registry.call("add_backward", grad, row_offsets, columns, *own)
        found[first + 2] = (part * weight).to(values.dtype)
    return tuple(found)


registry.autograd("add", _backward, _setup_context)
