"""Nyström extension: eigenvectors of a graph, carried to rows that were not in it.

An eigenvector satisfies λ v_i = Σ_j κ_ij v_j at every row i. Read for a new row, with its edges to
the old ones on the right, that is its value: v_new = κ_new V / λ. Where new rows also have edges
among themselves, α P (the pixel graph of new images, eq 4), these stand on the right too,

    λ v = κ_F V + α P v,        v = (λ − α P)^(-1) κ_F V,

a linear system for every eigenvalue λ > α ‖P‖, well conditioned where λ is well above.

Williams, Seeger, "Using the Nyström method to speed up kernel machines", NIPS 2000; Fowlkes,
Belongie, Chung, Malik, "Spectral grouping using the Nyström method", PAMI 26, 2004; Bengio et al.,
"Learning eigenfunctions links spectral embedding and kernel PCA", Neural Computation 16, 2004.
The solution by sparse products alone: Golub, Varga, "Chebyshev semi-iterative methods", Numer.
Math. 3, 1961.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nefkern.ops import CSRGraph, checks, spmm
from nefkern.ops.csr import check_graph
from nefkern.reference.csr import sums_of

#: Of :func:`extend`, as a share of the term with P.
TOLERANCE = 1e-6

#: λ / α from which a system is solved: closer, thousands of products would be needed.
_LEAST_RATIO = 1.0001


def degrees(
    indices: Tensor, similarities: Tensor, num_nodes: int, *, clamp_min: float = 0.0
) -> Tensor:
    """Row sums of A = (A + Aᵀ)/2, as :func:`nefkern.ops.normalized_adjacency` ("mean") divides by.

    Args:
        indices: ``[N, k]`` int32 or int64, -1 where a row has fewer neighbours; a neighbour twice
            in a list counts twice.
        similarities: ``[N, k]`` floating point.
        num_nodes: N, the rows that indices name.
        clamp_min: smaller similarities count as that.

    Returns:
        ``[N]``, float64.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    safe, weights = _lists(indices, similarities, num_nodes, clamp_min)
    if len(indices) != num_nodes:
        raise ValueError(f"indices: expected {num_nodes} rows, the nodes, got {len(indices)}")
    weights = weights.double()
    incoming = sums_of(weights.flatten(), safe.flatten(), num_nodes)
    return (incoming + weights.sum(1)) / 2


def cross_weights(
    indices: Tensor, similarities: Tensor, degrees: Tensor, *, clamp_min: float = 0.0
) -> Tensor:
    """The new rows of D^(-1/2) A D^(-1/2), from lists of their nearest old rows.

    A new row's list is taken for its row of A; its degree is the sum of that.

    Args:
        indices: ``[n, k]`` int32 or int64, rows of the old set, -1 where there are fewer than k.
        similarities: ``[n, k]`` floating point.
        degrees: ``[N]``, of the old rows: :func:`degrees`.
        clamp_min: smaller similarities count as that.

    Returns:
        ``[n, k]``, float32 (float64 if the similarities are); 0 for missing neighbours and where
        either degree is 0.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    checks.tensor("degrees", degrees)
    checks.shape("degrees", degrees, "N")
    safe, weights = _lists(indices, similarities, len(degrees), clamp_min)
    if not len(degrees):
        return weights
    scale = _inverse_root(weights.sum(1, keepdim=True)) * _inverse_root(degrees)[safe]
    return (weights * scale).to(weights.dtype)


@torch.no_grad()
def extend(
    values: Tensor,
    vectors: Tensor,
    cross: tuple[Tensor, Tensor],
    *,
    pixel: CSRGraph | None = None,
    alpha: float = 0.0,
    tol: float = TOLERANCE,
) -> Tensor:
    """Values of eigenvectors at new rows: (λ − α P)^(-1) κ_F V, column by column.

    Chebyshev's semi-iteration: a number of products with P that λ and α determine beforehand
    (7 for λ = 1.25, α = 0.3), the same for every row. Rows that P doesn't connect therefore don't
    influence each other: images may be extended in any batches. Extra memory is about four times
    the result.

    Args:
        values: λ, ``[m]``, each above α.
        vectors: V, ``[N, m]``, at the N old rows; half precision is read as float32.
        cross: κ_F, the edges of the n new rows to the old ones, as lists: indices ``[n, k]``, int32
            or int64 (-1: none), and weights ``[n, k]``: :func:`cross_weights`.
        pixel: P, a normalised symmetric graph over the new rows: ‖P‖ at most 1. None: no such term.
        alpha: its weight, at least 0.
        tol: the error in v, as a share of what the term with P adds to κ_F V / λ.

    Returns:
        ``[n, m]`` in the dtype of V (float32 if that is half), on its device.

    Raises:
        TypeError, ValueError: an argument is not as described; an eigenvalue at or below α.
    """
    indices, weights = cross
    checks.tensor("vectors", vectors)
    checks.shape("vectors", vectors, "N", "m")
    checks.dtype("vectors", vectors, checks.FLOATING)
    checks.tensor("values", values)
    checks.shape("values", values, vectors.shape[1])
    dtype = torch.float64 if vectors.dtype == torch.float64 else torch.float32
    alpha = 0.0 if pixel is None else alpha
    _check_pixel(pixel, alpha, len(indices), tol)
    _check_values(values, alpha)
    safe, weights = _lists(indices, weights, len(vectors), -math.inf)
    lam = values.to(vectors.device, dtype)
    start = _gathered(safe, weights.to(dtype), vectors.to(dtype)).div_(lam)
    if alpha == 0 or not start.numel():
        return start
    return _semi_iteration(start, pixel, alpha / lam, steps(alpha / lam.min().item(), tol))


def _semi_iteration(start: Tensor, pixel: CSRGraph, ratio: Tensor, steps: int) -> Tensor:
    """x = start + ratio P x, the fixed point, by Chebyshev's acceleration; ratio by column."""
    before, x = start, spmm(pixel, start).mul_(ratio).add_(start)
    omega = 2 / (2 - ratio.square())
    for _ in range(steps - 1):
        following = spmm(pixel, x).mul_(ratio).add_(start).sub_(before).mul_(omega).add_(before)
        before, x = x, following
        omega = 1 / (1 - ratio.square() * omega / 4)
    return x


def steps(ratio: float, tol: float = TOLERANCE) -> int:
    """Products with P: the degree at which Chebyshev's polynomial at 1/ratio exceeds 1/tol, for the
    largest ``ratio`` α / λ."""
    return max(1, math.ceil(math.acosh(1 / tol) / math.acosh(1 / ratio)))


def _gathered(indices: Tensor, weights: Tensor, vectors: Tensor) -> Tensor:
    """Σ_j weights_ij vectors[indices_ij], ``[n, m]``, without the ``[n, k, m]`` in between."""
    if not (indices.numel() and vectors.numel()):
        return vectors.new_zeros(len(indices), vectors.shape[1])
    return F.embedding_bag(indices, vectors, per_sample_weights=weights, mode="sum")


def _lists(
    indices: Tensor, weights: Tensor, num_nodes: int, clamp_min: float
) -> tuple[Tensor, Tensor]:
    """Indices as int64 with 0 for missing ones, and weights, clamped, with 0 there."""
    checks.tensor("indices", indices)
    checks.shape("indices", indices, "n", "k")
    checks.dtype("indices", indices, checks.INTEGER)
    checks.tensor("weights", weights)
    checks.shape("weights", weights, *indices.shape)
    checks.dtype("weights", weights, checks.FLOATING)
    checks.device("weights", weights, indices, "indices")
    if indices.numel() and not (indices.min() >= -1 and indices.max() < num_nodes):
        raise ValueError(
            f"indices: expected -1 to {num_nodes - 1}, the old rows, "
            f"got {int(indices.min())} to {int(indices.max())}"
        )
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32)).clamp_min(clamp_min)
    weights = weights.masked_fill(indices < 0, 0)
    checks.finite("weights", weights)
    return indices.long().clamp_min(0), weights


def _inverse_root(degree: Tensor) -> Tensor:
    return torch.where(degree > 0, degree.clamp_min(torch.finfo(degree.dtype).tiny).rsqrt(), 0)


def _check_pixel(pixel: CSRGraph | None, alpha: float, rows: int, tol: float) -> None:
    if not 0 < tol < 1:
        raise ValueError(f"tol: expected a number between 0 and 1, got {tol}")
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha: expected a finite weight of at least 0, got {alpha}")
    if pixel is None:
        return
    check_graph("pixel", pixel)
    if pixel.num_nodes != rows:
        raise ValueError(f"pixel: expected {rows} nodes, the new rows, got {pixel.num_nodes}")
    if not pixel.symmetric:
        raise ValueError("pixel: expected a symmetric graph, got symmetric=False")


def _check_values(values: Tensor, alpha: float) -> None:
    least = alpha * _LEAST_RATIO
    late = (~(values > least)).nonzero().flatten()
    if len(late):
        first = int(late[0])
        raise ValueError(
            f"values: expected eigenvalues above alpha = {alpha:g}, got {values[first].item():g} "
            f"at position {first}; extend the first {first} only"
        )
