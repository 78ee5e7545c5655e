"""``normalized_adjacency``: from neighbour lists to D^(-1/2) A D^(-1/2)."""

from __future__ import annotations

import torch
from torch import Tensor

from nefkern import reference
from nefkern.ops import checks, registry
from nefkern.ops.csr import _MAX_NODES, CSRGraph
from nefkern.reference.csr import raise_invalid_content
from nefkern.reference.normalized_adjacency import check_indices

_SYMMETRIZE = ("mean", "union")


def normalized_adjacency(
    indices: Tensor,
    weights: Tensor | None = None,
    *,
    num_nodes: int,
    symmetrize: str = "mean",
    clamp_min: float = 0.0,
    check_finite: bool = False,
) -> CSRGraph:
    """The symmetrically normalised adjacency D^(-1/2) A D^(-1/2) of neighbour lists (eqs 2-4).

    Row i of ``indices`` lists the neighbours of node i, in any order. Index -1 is padding (as
    :func:`nefkern.ops.knn` writes it) and is ignored; a node that lists itself gets a self loop; a
    neighbour listed twice in a row counts once, with its largest weight. Weights are clamped from
    below, then edges of weight 0 are dropped: they are not stored as zeros. D is the diagonal
    matrix of A's row sums; a row of degree 0 is empty, so nothing is ever divided by zero. The
    result equals its transpose bit for bit and does not depend on the number of threads.

    Weights may be of any size, from the smallest positive number of their dtype to the largest, and
    of very different sizes side by side: the result is right to rounding, as if A and D were
    computed in exact arithmetic, and multiplying all weights by a number does not change it.

    The graph's values carry the gradient of ``weights``, as often as wanted, with the edges held
    fixed: in closed form, by float64 sums and O(N k) memory. Where weights compete (duplicates, the
    two directions of a union), it goes to the largest, evenly among equals. Weights that were
    clamped and edges that were dropped have gradient 0.

    Args:
        indices: int32 or int64 [N, k]; values -1 to N - 1.
        weights: floating point [N, k], or None for weight 1. Differentiable, see above.
        num_nodes: N.
        symmetrize: "mean" for (A + A^T) / 2, "union" for max(A, A^T), which is the logical or of
            lists without weights.
        clamp_min: lower bound of the weights, at least 0: negative similarities become 0.
        check_finite: raise when a neighbour's weight is NaN or inf (those of padding don't count).
            Without it such a weight makes its own entry NaN, and spreads NaN or 0 to the other
            entries of both its nodes.

    Returns:
        A symmetric graph; ``values`` is float64 for float64 weights and float32 otherwise.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, option or index; (``check_finite``) a
            weight that isn't finite.
    """
    num_nodes = check_lists(indices, weights, num_nodes)
    clamp_min = check_clamp(clamp_min)
    check_finite = checks.flag("check_finite", check_finite)
    if symmetrize not in _SYMMETRIZE:
        raise ValueError(f"symmetrize: expected {' or '.join(_SYMMETRIZE)}, got {symmetrize!r}")
    row_offsets, columns, values = registry.call(
        "normalized_adjacency", indices, weights, num_nodes, symmetrize, clamp_min, check_finite
    )
    return CSRGraph(row_offsets, columns, values, num_nodes, True)


def check_lists(
    indices: Tensor,
    weights: Tensor | None,
    num_nodes: int,
    *,
    name: str = "indices",
) -> int:
    """``num_nodes`` as an int; raises TypeError or ValueError unless these are neighbour lists, but
    for their content."""
    checks.tensor(name, indices)
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected int32 or int64, got {indices.dtype}")
    num_nodes = checks.integer("num_nodes", num_nodes, 0)
    if num_nodes > _MAX_NODES:
        raise ValueError(f"num_nodes: expected at most 2^31 - 1, got {num_nodes}")
    if indices.ndim != 2 or indices.shape[0] != num_nodes:
        raise ValueError(
            f"{name}: expected shape [{num_nodes}, k] (num_nodes), got {list(indices.shape)}"
        )
    if weights is None:
        return num_nodes
    if not checks.tensor("weights", weights).is_floating_point():
        raise TypeError(f"weights: expected floating point, got {weights.dtype}")
    if weights.shape != indices.shape:
        raise ValueError(
            f"weights: expected the shape of indices {list(indices.shape)}, "
            f"got {list(weights.shape)}"
        )
    if weights.device != indices.device:
        raise ValueError(f"weights: expected device {indices.device}, got {weights.device}")
    return num_nodes


def check_clamp(clamp_min: float) -> float:
    """``clamp_min`` as a float; a negative weight could make a degree negative."""
    return checks.finite_number("clamp_min", clamp_min, 0)


def check_weights(
    indices: Tensor, weights: Tensor | None, clamp_min: float, check_finite: bool
) -> None:
    """Raise ValueError where a weight is not finite: the lower bound in the weights' precision, or,
    if ``check_finite``, that of a neighbour."""
    if weights is None:
        return
    if weights.dtype != torch.float64 and clamp_min > torch.finfo(torch.float32).max:
        raise ValueError(f"clamp_min: expected a number that float32 can hold, got {clamp_min}")
    if check_finite:
        checks.finite("weights", weights.masked_fill(indices < 0, 0))


def fake_graph(
    indices: Tensor, weights: Tensor | None, num_nodes: int, room: int | None = None
) -> tuple[Tensor, ...]:
    """For fake kernels: a graph from lists of such dtypes, with ``room`` for entries, or of an
    unknown number of them."""
    nnz = registry.new_size() if room is None else room
    wide = weights is not None and weights.dtype == torch.float64
    return (
        indices.new_empty(num_nodes + 1, dtype=torch.int64),
        indices.new_empty(nnz, dtype=torch.int32),
        indices.new_empty(nnz, dtype=torch.float64 if wide else torch.float32),
    )


registry.define(
    "normalized_adjacency(Tensor indices, Tensor? weights, SymInt num_nodes, str symmetrize, "
    "float clamp_min, bool check_finite) -> (Tensor, Tensor, Tensor)",
    fake=lambda indices, weights, num_nodes, *_: fake_graph(indices, weights, num_nodes),
)


@registry.kernel("normalized_adjacency", "reference")
def _reference(indices, weights, num_nodes, symmetrize, clamp_min, check_finite):
    check_weights(indices, weights, clamp_min, check_finite)
    check_indices(indices, num_nodes)
    return reference.normalized_adjacency(
        indices, weights, num_nodes=num_nodes, symmetrize=symmetrize, clamp_min=clamp_min
    )


def _native_accepts(indices, weights, *_) -> bool:
    return weights is None or weights.dtype != torch.float64


@registry.kernel("normalized_adjacency", "cpu", accepts=_native_accepts)
@registry.kernel("normalized_adjacency", "cuda", accepts=_native_accepts)
def _native(indices, weights, num_nodes, symmetrize, clamp_min, check_finite):
    check_weights(indices, weights, clamp_min, check_finite)
    *graph, valid = torch.ops.nefkern_native.normalized_adjacency(
        indices, None if weights is None else weights.float(), symmetrize == "union", clamp_min
    )
    if not valid:
        check_indices(indices, num_nodes)
    return tuple(graph)


def triton_accepts(indices, weights, *_) -> bool:
    """Whether Triton's kernels take these lists: those that the CPU kernel does, up to a size."""
    from nefkern.triton.normalized_adjacency import MAX_EDGES

    return _native_accepts(indices, weights) and indices.numel() <= MAX_EDGES


@registry.kernel("normalized_adjacency", "triton", accepts=triton_accepts)
def _triton(indices, weights, num_nodes, symmetrize, clamp_min, check_finite):
    from nefkern.triton.normalized_adjacency import normalized_adjacency

    check_weights(indices, weights, clamp_min, check_finite)
    return normalized_adjacency(indices, weights, num_nodes, symmetrize, clamp_min)


registry.define(
    "normalized_adjacency_backward(Tensor grad, Tensor indices, Tensor weights, "
    "Tensor row_offsets, Tensor columns, str symmetrize, float clamp_min) -> Tensor",
    fake=lambda grad, indices, weights, *_: torch.empty_like(
        weights, memory_format=torch.contiguous_format
    ),
)


@registry.kernel("normalized_adjacency_backward", "triton")
@registry.kernel("normalized_adjacency_backward", "reference")
def _reference_backward(*args):
    """Triton has no kernel of its own."""
    return reference.normalized_adjacency_backward(*args)


def _native_backward_accepts(grad, indices, weights, *_) -> bool:
    return torch.float64 not in (grad.dtype, weights.dtype)


@registry.kernel("normalized_adjacency_backward", "cpu", accepts=_native_backward_accepts)
@registry.kernel("normalized_adjacency_backward", "cuda", accepts=_native_backward_accepts)
def _native_backward(grad, indices, weights, row_offsets, columns, symmetrize, clamp_min):
    found, valid = torch.ops.nefkern_native.normalized_adjacency_backward(
        grad.float(), indices, weights.float(), row_offsets, columns, symmetrize == "union",
        clamp_min,
    )  # fmt: skip
    if not valid:
        check_indices(indices, indices.shape[0])
        raise_invalid_content()
    return found.to(weights.dtype)


def _setup_second(ctx, inputs, output) -> None:
    *tensors, ctx.symmetrize, ctx.clamp_min = inputs
    ctx.save_for_backward(*tensors)


def _second(ctx, cotangent):
    """Second derivatives, by differentiating the reference's formula for the first."""
    if cotangent is None:
        return (None,) * 7
    grad, indices, weights, *graph = ctx.saved_tensors

    def first(grad, weights):
        return reference.normalized_adjacency_backward(
            grad, indices, weights, *graph, ctx.symmetrize, ctx.clamp_min
        )

    of_grad, of_weights = torch.func.vjp(first, grad, weights)[1](cotangent)
    return of_grad, None, of_weights, None, None, None, None


registry.autograd("normalized_adjacency_backward", _second, _setup_second)


def _setup_context(ctx, inputs, output) -> None:
    indices, weights, _, ctx.symmetrize, ctx.clamp_min, _ = inputs
    ctx.save_for_backward(indices, weights, *output[:2])


def _backward(ctx, _offsets, _columns, grad):
    if grad is None:
        return (None,) * 6
    found = registry.call(
        "normalized_adjacency_backward", grad, *ctx.saved_tensors, ctx.symmetrize, ctx.clamp_min
    )
    return None, found, None, None, None, None


registry.autograd("normalized_adjacency", _backward, _setup_context)
