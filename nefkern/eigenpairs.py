"""Exact eigenpairs of κ, what neural eigenfunctions stand in for, and how well a span fits them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nefkern.ops import CSRGraph

#: Above this share of all eigenpairs Lanczos iterations cost more than LAPACK on the dense matrix.
_DENSE_SHARE = 0.25


def leading_eigenpairs(graph: CSRGraph, count: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues (by value, not magnitude) and their eigenvectors, exact.

    By ARPACK's implicitly restarted Lanczos iteration in float64, to machine precision; by LAPACK
    where a large part of the spectrum is asked for. Eigenvectors have no sign, and those of equal
    eigenvalues are any basis of their eigenspace: compare spans, or absolute cosines.

    Args:
        graph: κ, symmetric, N nodes, on any device.
        count: m, from 1 to N.
        seed: of the iteration's start vector; the same seed gives the same vectors.

    Returns:
        λ, float64 ``[m]``, descending, and orthonormal V, float64 ``[N, m]``; on the CPU.

    Raises:
        ValueError: a graph not marked symmetric, or m out of range.
    """
    from scipy.linalg import eigh
    from scipy.sparse.linalg import eigsh

    n = graph.num_nodes
    if not graph.symmetric:
        raise ValueError("graph: expected a symmetric one, got symmetric=False")
    if not 1 <= count <= n:
        raise ValueError(f"count: expected 1 to {n}, the graph's nodes, got {count}")
    matrix = graph.to_scipy().astype(np.float64)
    if count > _DENSE_SHARE * n or graph.nnz == 0:
        values, vectors = eigh(matrix.toarray(), subset_by_index=(n - count, n - 1))
    else:
        start = np.random.default_rng(seed).standard_normal(n)
        values, vectors = eigsh(matrix, count, which="LA", v0=start)
    order = np.argsort(-values, kind="stable")
    return torch.from_numpy(values[order]), torch.from_numpy(vectors[:, order])


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
    """
    from scipy.linalg import subspace_angles

    psi = psi.detach().cpu().double()
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
