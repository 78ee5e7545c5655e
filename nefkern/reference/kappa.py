"""Reference of ``kappa``: both graphs from their lists, then their weighted sum (eq 4)."""

from __future__ import annotations

from torch import Tensor

from nefkern.reference.add import add
from nefkern.reference.normalized_adjacency import normalized_adjacency


def kappa(
    indices: Tensor,
    weights: Tensor | None,
    pixel_indices: Tensor,
    *,
    num_nodes: int,
    alpha: float = 0.3,
    clamp_min: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`nefkern.ops.kappa`; returns the graph's three tensors."""
    features = normalized_adjacency(indices, weights, num_nodes=num_nodes, clamp_min=clamp_min)
    ones = None if weights is None else weights.new_ones(()).expand(pixel_indices.shape)  # dtype
    pixels = normalized_adjacency(pixel_indices, ones, num_nodes=num_nodes, symmetrize="union")
    return add(*features, *pixels, alpha)
