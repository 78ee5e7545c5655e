"""``kappa`` in Triton: both graphs and their sum, with one message to the host."""

from __future__ import annotations

import torch
from torch import Tensor

from nefkern.reference.normalized_adjacency import check_indices
from nefkern.triton import add
from nefkern.triton.normalized_adjacency import empty_graph, merged, sorted_edges


def kappa(
    indices: Tensor,
    weights: Tensor | None,
    pixel_indices: Tensor,
    num_nodes: int,
    alpha: float,
    clamp_min: float,
    padded: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum's three tensors; see :func:`nefkern.ops.kappa`.

    The host waits once, for the number of entries and whether an index was out of range. What it
    does not know by then is the size of either graph: they get room for two entries an edge.

    Args:
        padded: give the sum such room too, and wait for nothing; an index out of range counts as
            -1 then.

    Raises:
        ValueError: an index was out of range.
    """
    if num_nodes == 0:
        return empty_graph(0, indices.device)
    features, bad = _unread(indices, weights, num_nodes, "mean", clamp_min)
    pixels, bad_pixels = _unread(pixel_indices, None, num_nodes, "union", 0.0)
    row_offsets, _ = add.counted(features, pixels)  # their sizes are not the graphs': no check
    if padded:
        return add.merged(features, pixels, alpha, row_offsets, len(features[1]) + len(pixels[1]))
    nnz, *outside = torch.cat([row_offsets[-1:], bad, bad_pixels]).tolist()
    if any(outside):
        check_indices(indices, num_nodes)
        check_indices(pixel_indices, num_nodes, name="pixel_indices")
    return add.merged(features, pixels, alpha, row_offsets, nnz)


def _unread(
    indices: Tensor, weights: Tensor | None, num_nodes: int, symmetrize: str, clamp_min: float
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """A graph with more room than entries, and 1 in a tensor [1] where an index is out of range."""
    if indices.numel() == 0:
        graph = empty_graph(num_nodes, indices.device)
        return graph, graph[0].new_zeros(1)
    edges = sorted_edges(indices, weights, num_nodes, clamp_min)
    return merged(edges, 2 * edges.listed, symmetrize, clamp_min), edges.invalid
