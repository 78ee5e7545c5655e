"""``feature_kappa``: from features straight to the graph kernel, differentiable in them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nefkern.ops import checks, registry
from nefkern.ops.csr import CSRGraph
from nefkern.ops.kappa import kappa
from nefkern.ops.knn import knn
from nefkern.ops.normalized_adjacency import normalized_adjacency
from nefkern.reference.normalized_adjacency import check_indices


def feature_kappa(
    features: Tensor,
    k: int,
    *,
    pixel_indices: Tensor | None = None,
    alpha: float = 0.3,
    segments: Tensor | None = None,
    symmetrize: str = "mean",
    clamp_min: float = 0.0,
) -> CSRGraph:
    """The graph kernel κ of features in one call: neighbours, similarities, both graphs (eqs 2-4).

    The k nearest rows of every row by cosine similarity, itself excluded, weighted by the
    similarity and normalised; with ``pixel_indices`` α times the normalised pixel graph is added.

    Differentiable in ``features``, as often as wanted, with the neighbours held fixed (a similarity
    moves continuously, the set of neighbours jumps): then the graph's values carry the gradient,
    and the similarities are computed by :func:`neighbour_similarities` in place of ``knn``; so they
    are within ``torch.func``'s transforms. Memory is O(N (k + C)) in every direction.

    Args:
        features: F [N, C], float16, bfloat16, float32 or float64.
        k: neighbours a row, at least 1; it may exceed the number of candidates.
        pixel_indices: int32 or int64 [N, k~], pixel neighbours; None: the feature graph alone.
        alpha: weight of the pixel graph, a finite number.
        segments: offsets of rows that are neighbours only among themselves, as for ``knn``.
        symmetrize: "mean" or "union", of the feature graph alone; with a pixel graph "mean".
        clamp_min: lower bound of the similarities, at least 0.

    Returns:
        A symmetric graph; ``values`` is float64 for float64 features and float32 otherwise.

    Raises:
        TypeError, ValueError: what ``knn``, ``kappa`` and ``normalized_adjacency`` refuse;
            "union" beside a pixel graph.
    """
    if pixel_indices is not None and symmetrize != "mean":
        raise ValueError(f"symmetrize: expected 'mean' with pixel_indices, got {symmetrize!r}")
    checks.tensor("features", features)
    weights, indices = knn(features.detach(), k, segments=segments)
    # Within torch.vmap a tensor does not tell whether something outside asks for its gradient, and
    # a tangent that was dropped here would be missed by nobody.
    if registry.transformed() or (features.requires_grad and torch.is_grad_enabled()):
        weights = _similarities(features, indices)
    options: dict[str, Any] = {"num_nodes": features.shape[0], "clamp_min": clamp_min}
    if pixel_indices is None:
        return normalized_adjacency(indices, weights, symmetrize=symmetrize, **options)
    return kappa(indices, weights, pixel_indices, alpha=alpha, **options)


def neighbour_similarities(features: Tensor, indices: Tensor) -> Tensor:
    """The cosine similarity of every row with the rows it lists, differentiable in ``features``.

    <x_i, x_j> / (|x_i| |x_j|), 0 where x_i or x_j is zero (and its gradient too), NaN where one is
    not finite. Entries may be of any size. The rows' neighbours are never gathered into an
    [N, k, C] tensor, forward or backward.

    Args:
        features: [N, C], float16, bfloat16, float32 or float64.
        indices: int32 or int64 [N, k], -1 (padding) to N - 1, as ``knn`` writes them.

    Returns:
        [N, k], float64 for float64 features, else float32; 0 at padding.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    checks.tensor("features", features)
    checks.shape("features", features, "N", "C")
    checks.dtype("features", features, checks.FLOATING)
    checks.tensor("indices", indices)
    checks.dtype("indices", indices, checks.INTEGER)
    n = features.shape[0]
    checks.shape("indices", indices, n, "k")
    checks.device("indices", indices, features, "features")
    # It reads the content, which tracing and torch.vmap do not let it; sddmm refuses it too.
    if not (torch.compiler.is_compiling() or registry.transformed()):
        check_indices(indices, n)
    return _similarities(features, indices)


def _similarities(features: Tensor, indices: Tensor) -> Tensor:
    """The lists are a matrix of k entries a row; padding points at the row itself."""
    (n, k), units, listed = indices.shape, unit_rows(features), indices >= 0
    rows = torch.arange(n + 1, device=indices.device)
    columns = torch.where(listed, indices, rows[:n, None]).to(torch.int32).reshape(-1)
    found = registry.call("sddmm", rows * k, columns, units, units).view(n, k)
    return torch.where(listed, found, 0.0)


def unit_rows(x: Tensor) -> Tensor:
    """[N, C]: rows of length 1 in float32 or float64, rows of zeros left as they are, and NaN in
    the place of rows that are not finite.

    Divided by their largest entry first, so that no square overflows or vanishes."""
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if x.shape[1] == 0:
        return x
    largest = x.detach().abs().amax(1, keepdim=True)
    nonzero = largest != 0
    x = torch.where(nonzero, x / torch.where(nonzero, largest, 1.0), 0.0)
    length = torch.where(nonzero, x.square().sum(1, keepdim=True), 1.0).sqrt()
    return x / length
