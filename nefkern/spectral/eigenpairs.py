"""Leading eigenpairs of κ, which neural eigenfunctions stand in for, and how a span fits them."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nefkern.ops import CSRGraph, checks
from nefkern.ops.csr import check_graph
from nefkern.spectral.chebyshev import leading_by_filter

#: Above this share of all eigenpairs iterations cost more than LAPACK on the dense matrix.
_DENSE_SHARE = 0.25
#: Up to so many nodes LAPACK takes a fraction of a second.
_DENSE_NODES = 512
#: Residuals below this share of the norm are out of float32's reach.
_FLOAT32_TOL = 1e-5


class EigenPairs(NamedTuple):
    """Eigenpairs (θ, u) and how far they are from being exact.

    Attributes:
        values: θ, float64 ``[m]``, descending.
        vectors: U, ``[N, m]``, orthonormal columns.
        residuals: float64 ``[m]``, |κu − θu|. Some eigenvalue of κ is no farther from θ than
            that (κ is symmetric); the angle to an eigenspace has a sine of at most the residual
            over the distance from θ to the rest of the spectrum (Davis-Kahan).
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor


def leading_eigenpairs(
    graph: CSRGraph,
    count: int,
    *,
    tol: float = 1e-3,
    seed: int = 0,
    max_rounds: int = 100,
    on_round: Callable[[float], object] = lambda residual: None,
) -> EigenPairs:
    """The largest eigenvalues (by value, not magnitude) and their eigenvectors.

    By Chebyshev-filtered subspace iteration on :func:`nefkern.ops.spmm`
    (:mod:`nefkern.spectral.chebyshev`), on the graph's device, in float32; in float64 where the
    graph's values are, or where ``tol`` is below 1e-5. Extra memory is about five blocks of
    ``[N, 4m/3]``. By LAPACK on the processor, in float64 and exact, for graphs of up to 512 nodes
    or where more than a quarter of the spectrum is asked for.

    Where the graph's values require a gradient, the pairs are constants all the same: U's Rayleigh
    quotients, ``quadratic_form(U, graph).diagonal()``, are the eigenvalues with their gradient,
    since dλ = uᵀ dκ u for a simple one.

    Eigenvectors of (nearly) equal eigenvalues are any basis of their eigenspace: compare spans.
    Their signs make the entry of largest magnitude positive.

    The seed decides to the bit on one machine with one number of threads. Sparse products don't
    depend on the threads, but the sums of dense ones do, so that other numbers of threads, devices
    and versions agree to the tolerance only.

    Args:
        graph: κ, symmetric, N nodes, on any device.
        count: m, from 1 to N.
        tol: every residual |κu − θu| is brought to ``tol`` · ‖κ‖, the norm as a few Lanczos steps
            find it (not overestimated; at most 1 + α for κ of eq 4). Every θ is then that close to
            an eigenvalue, and most are far closer: the error falls with the residual's square.
            ``0``: float64's precision, by ARPACK's Lanczos iteration on the processor, for graphs
            of some thousand nodes.
        seed: of the random start.
        max_rounds: filters at most. Where they don't suffice, what was reached is returned with
            its residuals, and a RuntimeWarning says so.
        on_round: called after every filter with the largest residual as a share of ‖κ‖. What it
            raises ends the iteration.

    Returns:
        Values and residuals in float64 on the CPU; vectors on the graph's device, float64 if the
        graph's values are or ``tol`` is below 1e-5, else float32.

    Raises:
        TypeError: ``graph`` is no CSRGraph, or another argument no number of its kind.
        ValueError: a graph not marked symmetric or with values that are not finite; m or another
            argument out of range.
    """
    count, max_rounds = _checked(graph, count, tol, max_rounds)
    n = graph.num_nodes
    wide = graph.dtype == torch.float64 or tol < _FLOAT32_TOL
    dtype = torch.float64 if wide else torch.float32
    largest = graph.values.abs().max().item() if graph.nnz else 0.0
    if largest == 0:
        pairs = EigenPairs(
            torch.zeros(count).double(),
            torch.eye(n, count, dtype=dtype, device=graph.device),
            torch.zeros(count).double(),
        )
    elif count > _DENSE_SHARE * n or tol == 0 or n <= _DENSE_NODES:
        pairs = _exact(graph, count, dense=count > _DENSE_SHARE * n or tol > 0, seed=seed)
    else:
        pairs = _filtered(graph, count, tol, dtype, seed, max_rounds, largest, on_round)
    return pairs._replace(vectors=_signed(pairs.vectors).to(graph.device, dtype))


def _checked(graph: CSRGraph, count: int, tol: float, max_rounds: int) -> tuple[int, int]:
    check_graph("graph", graph)
    if not graph.symmetric:
        raise ValueError("graph: expected a symmetric one, got symmetric=False")
    count = checks.integer("count", count, 1)
    if count > graph.num_nodes:
        raise ValueError(f"count: expected 1 to {graph.num_nodes}, the graph's nodes, got {count}")
    if not 0 <= tol < 1:
        raise ValueError(f"tol: expected a number from 0 to below 1, got {tol}")
    max_rounds = checks.integer("max_rounds", max_rounds, 1)
    if not bool(graph.values.isfinite().all()):
        raise ValueError("graph: expected finite values, got NaN or inf")
    return count, max_rounds


def _exact(graph: CSRGraph, count: int, *, dense: bool, seed: int) -> EigenPairs:
    """To machine precision, on the CPU: by LAPACK on the dense matrix, or ARPACK."""
    from scipy.linalg import eigh
    from scipy.sparse.linalg import eigsh

    n = graph.num_nodes
    matrix = graph.to_scipy().astype(np.float64)
    if dense:
        values, vectors = eigh(matrix.toarray(), subset_by_index=(n - count, n - 1))
    else:
        start = np.random.default_rng(seed).standard_normal(n)
        values, vectors = eigsh(matrix, count, which="LA", v0=start)
    order = np.argsort(-values, kind="stable")
    values, vectors = values[order], vectors[:, order]
    residuals = np.linalg.norm(matrix @ vectors - vectors * values, axis=0)
    return EigenPairs(*(torch.from_numpy(array) for array in (values, vectors, residuals)))


def _filtered(
    graph: CSRGraph,
    count: int,
    tol: float,
    dtype: torch.dtype,
    seed: int,
    max_rounds: int,
    largest: float,
    on_round: Callable[[float], object],
) -> EigenPairs:
    unit = 1.0 if 1e-6 < largest < 1e6 else largest  # squares neither vanish nor overflow
    if unit != 1:
        graph = dataclasses.replace(graph, values=graph.values / unit)
    values, vectors, residuals, norm = leading_by_filter(
        graph, count, tol=tol, dtype=dtype, seed=seed, max_rounds=max_rounds, on_round=on_round
    )
    late = int((residuals > tol * norm).sum())
    if late:
        warnings.warn(
            f"{late} of {count} eigenpairs have residuals above {tol * norm * unit:.1e} after "
            f"{max_rounds} rounds, up to {residuals.max() * unit:.1e}; raise tol or max_rounds",
            RuntimeWarning,
            stacklevel=3,
        )
    return EigenPairs(values * unit, vectors, residuals * unit)


def _signed(vectors: Tensor) -> Tensor:
    """With the entry of largest magnitude positive, the first of several."""
    largest = vectors.abs().argmax(0, keepdim=True)
    return vectors * torch.where(vectors.gather(0, largest) < 0, -1, 1)


@dataclass(frozen=True)
class SpanFit:
    """How well the span of K functions fits the m leading eigenvectors of κ.

    Attributes:
        rank: r, the dimension of the span; dead and duplicate columns add nothing to it.
        rayleigh: uᵀκu of the columns, each scaled to unit norm, descending; those of norm 0 left
            out.
        ritz: ``[r]``, eigenvalues of κ restricted to the span, descending. By Cauchy's
            interlacing the j-th is at most λ_j, with equality for all j only if the span is
            the leading eigenspace.
        angles: ``[min(r, m)]``, principal angles between the span and the eigenvectors' in
            degrees, ascending; 0 is a direction both share, 90 one that the span lacks entirely.
        inside: ``[m]``, |Qᵀv_j|², the part of each eigenvector that lies in the span.
    """

    rank: int
    rayleigh: Tensor
    ritz: Tensor
    angles: Tensor
    inside: Tensor


def span_fit(psi: Tensor, graph: CSRGraph, vectors: Tensor) -> SpanFit:
    """Compare the span of ψ's outputs with eigenvectors of κ (Rayleigh-Ritz).

    Args:
        psi: ``[N, K]``, any scale.
        graph: κ over the same N rows.
        vectors: V, orthonormal ``[N, m]``, see :func:`leading_eigenpairs`.

    Raises:
        ValueError: other shapes, or a value of ``psi`` that isn't finite.
    """
    from scipy.linalg import subspace_angles

    checks.shape("psi", psi, graph.num_nodes, "K")
    checks.shape("vectors", vectors, graph.num_nodes, "m")
    checks.finite("psi", psi)  # a column of NaN would count as a dead one
    psi, vectors = (matrix.detach().cpu().double() for matrix in (psi, vectors))
    norms = psi.norm(dim=0)
    u = psi[:, norms > 0] / norms[norms > 0]
    kappa = graph.to_scipy().astype(np.float64)
    rayleigh = (u * torch.from_numpy(kappa @ u.numpy())).sum(0)
    q = _orthonormal_basis(u)
    ritz = torch.linalg.eigvalsh(q.T @ torch.from_numpy(kappa @ q.numpy()))
    angles = np.sort(np.degrees(subspace_angles(q.numpy(), vectors.numpy())))
    return SpanFit(
        rank=q.shape[1],
        rayleigh=rayleigh.sort(descending=True).values,
        ritz=ritz.flip(0),
        angles=torch.from_numpy(angles),
        inside=(q.T @ vectors).square().sum(0),
    )


def _orthonormal_basis(u: Tensor) -> Tensor:
    """Q ``[N, r]`` of the span of unit columns, directions lost in float32's rounding left out."""
    left, singular, _ = torch.linalg.svd(u, full_matrices=False)
    return left[:, singular > 1e-6 * singular.amax()] if singular.numel() else left
