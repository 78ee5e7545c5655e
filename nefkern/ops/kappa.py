"""``kappa``: from the neighbour lists of both graphs straight to the graph kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nefkern import reference
from nefkern.ops import checks, registry
from nefkern.ops.csr import CSRGraph
from nefkern.ops.normalized_adjacency import (
    check_clamp,
    check_lists,
    check_weights,
    fake_graph,
    triton_accepts,
)
from nefkern.reference.normalized_adjacency import check_indices


def kappa(
    indices: Tensor,
    weights: Tensor | None,
    pixel_indices: Tensor,
    *,
    num_nodes: int,
    alpha: float = 0.3,
    clamp_min: float = 0.0,
    check_finite: bool = False,
) -> CSRGraph:
    """kappa = D^(-1/2) A D^(-1/2) + alpha D~^(-1/2) A~ D~^(-1/2) (eq 4) in one pass.

    The same as adding two graphs of :func:`nefkern.ops.normalized_adjacency`, of the feature lists
    with (A + A^T) / 2 and of the pixel lists with the logical or, but without writing either out.

    Differentiable in ``weights`` as that is, with all edges held fixed.

    Args:
        indices: int32 or int64 [N, k], feature neighbours, -1 to N - 1, as ``knn`` writes them.
        weights: floating point [N, k], their similarities, or None for weight 1.
        pixel_indices: int32 or int64 [N, k~], pixel neighbours.
        num_nodes: N.
        alpha: weight of the pixel graph, a finite number (of float32, unless weights are float64).
        clamp_min: lower bound of the weights, at least 0.
        check_finite: raise when a neighbour's weight is NaN or inf.

    Returns:
        A symmetric graph; ``values`` is float64 for float64 weights and float32 otherwise.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or index; (``check_finite``) a weight
            that isn't finite.
    """
    num_nodes, alpha, clamp_min = _checked(
        indices, weights, pixel_indices, num_nodes, alpha, clamp_min
    )
    check_finite = checks.flag("check_finite", check_finite)
    row_offsets, columns, values = registry.call(
        "kappa", indices, weights, pixel_indices, num_nodes, alpha, clamp_min, check_finite
    )
    return CSRGraph(row_offsets, columns, values, num_nodes, True)


def kappa_padded(
    indices: Tensor,
    weights: Tensor | None,
    pixel_indices: Tensor,
    *,
    num_nodes: int,
    alpha: float = 0.3,
    clamp_min: float = 0.0,
) -> CSRGraph:
    """:func:`kappa` with room for the most entries there can be, so that nothing waits for a GPU.

    How many entries kappa has depends on the lists' content: to allocate exactly that much, the
    host must ask the device. Here ``columns`` and ``values`` have 2 N (k + k~) places, two for
    every listed neighbour. ``row_offsets``, and the entries up to ``row_offsets[-1]``, are those of
    :func:`kappa`; what stands behind them means nothing.

    Such a graph is for the GPU kernels of ``spmm``, ``quadratic_form`` and ``neuralef_loss``, which
    read rows by their offsets, so that a step of these can be captured in a CUDA graph. All else
    refuses it (:meth:`CSRGraph.validate`, the CPU's kernels, the reference) or counts places as
    entries (``nnz``, ``to_dense``).

    Not differentiable.

    Args:
        indices, weights, pixel_indices, num_nodes, alpha, clamp_min: as for :func:`kappa`, but an
            index out of range counts as -1 on a GPU.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device.
    """
    num_nodes, alpha, clamp_min = _checked(
        indices, weights, pixel_indices, num_nodes, alpha, clamp_min
    )
    row_offsets, columns, values = registry.call(
        "kappa_padded", indices, weights, pixel_indices, num_nodes, alpha, clamp_min
    )
    return CSRGraph(row_offsets, columns, values, num_nodes, True)


def _checked(
    indices: Tensor,
    weights: Tensor | None,
    pixel_indices: Tensor,
    num_nodes: int,
    alpha: float,
    clamp_min: float,
) -> tuple[int, float, float]:
    """N, alpha and the lower bound; raises TypeError or ValueError where the arguments are not as
    described, but for the lists' content."""
    num_nodes = check_lists(indices, weights, num_nodes)
    check_lists(pixel_indices, None, num_nodes, name="pixel_indices")
    if pixel_indices.device != indices.device:
        raise ValueError(
            f"pixel_indices: expected device {indices.device}, got {pixel_indices.device}"
        )
    dtype = torch.float32 if weights is None else weights.dtype
    return num_nodes, checks.factor("alpha", alpha, dtype), check_clamp(clamp_min)


registry.define(
    "kappa(Tensor indices, Tensor? weights, Tensor pixel_indices, SymInt num_nodes, float alpha, "
    "float clamp_min, bool check_finite) -> (Tensor, Tensor, Tensor)",
    fake=lambda indices, weights, _, num_nodes, *__: fake_graph(indices, weights, num_nodes),
)


def _room(indices: Tensor, pixel_indices: Tensor) -> int:
    return 2 * (indices.numel() + pixel_indices.numel())


registry.define(
    "kappa_padded(Tensor indices, Tensor? weights, Tensor pixel_indices, SymInt num_nodes, "
    "float alpha, float clamp_min) -> (Tensor, Tensor, Tensor)",
    fake=lambda indices, weights, pixel_indices, num_nodes, *_: fake_graph(
        indices, weights, num_nodes, _room(indices, pixel_indices)
    ),
)


@registry.kernel("kappa", "reference")
def _reference(indices, weights, pixel_indices, num_nodes, alpha, clamp_min, check_finite):
    check_weights(indices, weights, clamp_min, check_finite)
    check_indices(indices, num_nodes)
    check_indices(pixel_indices, num_nodes, name="pixel_indices")
    return reference.kappa(
        indices, weights, pixel_indices, num_nodes=num_nodes, alpha=alpha, clamp_min=clamp_min
    )


@registry.kernel("kappa_padded", "reference")
def _padded_reference(indices, weights, pixel_indices, num_nodes, alpha, clamp_min):
    row_offsets, columns, values = _reference(
        indices, weights, pixel_indices, num_nodes, alpha, clamp_min, False
    )
    more = _room(indices, pixel_indices) - len(columns)
    return row_offsets, F.pad(columns, (0, more)), F.pad(values, (0, more))


def _native_accepts(indices, weights, *_) -> bool:
    return weights is None or weights.dtype != torch.float64


@registry.kernel("kappa", "cpu", accepts=_native_accepts)
@registry.kernel("kappa", "cuda", accepts=_native_accepts)
def _native(indices, weights, pixel_indices, num_nodes, alpha, clamp_min, check_finite):
    check_weights(indices, weights, clamp_min, check_finite)
    *graph, valid = torch.ops.nefkern_native.kappa(
        indices,
        None if weights is None else weights.float(),
        pixel_indices.to(indices.dtype),
        alpha,
        clamp_min,
    )
    if not valid:
        check_indices(indices, num_nodes)
        check_indices(pixel_indices, num_nodes, name="pixel_indices")
    return tuple(graph)


@registry.kernel("kappa_padded", "cuda", accepts=_native_accepts)
def _padded_cuda(indices, weights, pixel_indices, num_nodes, alpha, clamp_min):
    check_weights(indices, weights, clamp_min, False)
    weights = None if weights is None else weights.float()
    return torch.ops.nefkern_native.kappa_padded(indices, weights, pixel_indices, alpha, clamp_min)


def _triton_accepts(indices, weights, pixel_indices, *_) -> bool:
    return triton_accepts(indices, weights) and triton_accepts(pixel_indices, None)


@registry.kernel("kappa", "triton", accepts=_triton_accepts)
def _triton(indices, weights, pixel_indices, num_nodes, alpha, clamp_min, check_finite):
    from nefkern.triton.kappa import kappa

    check_weights(indices, weights, clamp_min, check_finite)
    return kappa(indices, weights, pixel_indices, num_nodes, alpha, clamp_min)


@registry.kernel("kappa_padded", "triton", accepts=_triton_accepts)
def _padded_triton(indices, weights, pixel_indices, num_nodes, alpha, clamp_min):
    from nefkern.triton.kappa import kappa

    check_weights(indices, weights, clamp_min, False)
    return kappa(indices, weights, pixel_indices, num_nodes, alpha, clamp_min, padded=True)


def _setup_context(ctx, inputs, output) -> None:
    indices, weights, _, _, _, ctx.clamp_min, _ = inputs
    ctx.save_for_backward(indices, weights, *output[:2])


def _backward(ctx, _offsets, _columns, grad):
    """The pixel graph is a constant beside the feature graph, whose places are among kappa's."""
    if grad is None:
        return (None,) * 7
    found = registry.call(
        "normalized_adjacency_backward", grad, *ctx.saved_tensors, "mean", ctx.clamp_min
    )
    return None, found, None, None, None, None, None


registry.autograd("kappa", _backward, _setup_context)
