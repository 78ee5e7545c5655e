"""Objectives whose minimisers are leading eigenvectors of κ, under one name (section 3.4 and on).

All look at the N × K outputs ψ through two K × K matrices, M = ψᵀκψ and S = ψᵀψ. κ is symmetric, so
the gradient of any function of M is one dense product with Y = κψ, which the forward pass has
(:func:`nefkern.ops.quadratic_form`): no objective here needs a second sparse product.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from nefkern.ops import CSRGraph, neuralef_loss, quadratic_form, spmm
from nefkern.ops.csr import check_dense_operand, check_graph
from nefkern.reference.spmm import accumulation_dtype
from nefkern.spectral.objective import l2_batch_norm

Kind = Literal["neuralef", "nestedlora", "nestedlora-sequential", "spectralnet", "ncut"]
KINDS: tuple[str, ...] = get_args(Kind)


def spectral_loss(
    psi: Tensor, graph: CSRGraph, kind: Kind = "neuralef", *, beta: float = 10.0, t: float = 1.0
) -> Tensor:
    """One of the objectives of spectral learning, on a sparse graph.

    =========================  ======================================================  =============
    kind                       minimises                                               leaves ψ as
    =========================  ======================================================  =============
    ``neuralef``               −(t/K) Σ_j R_jj + (βt²/K) Σ_{i<j} R̂_ij², R = UᵀκU       ordered v
    ``nestedlora``             Σ_l ‖κ − ψ_{1:l} ψ_{1:l}ᵀ/N‖² / K over the prefixes 1:l  √(λN) v
    ``nestedlora-sequential``  the same, column l fitted to what those before it leave  √(λN) v
    ``spectralnet``            K − tr(S⁻¹M): the trace of I − κ over the span of ψ      a span
    ``ncut``                   K − Σ_j M_jj / (dᵀψ)_j: the expected normalised cut      memberships
    =========================  ======================================================  =============

    λ and v are κ's leading eigenpairs. NestedLoRA has vectors of positive λ only: a column beyond
    them ends at zero. NeuralEF, whose R̂ holds the first factor constant, has them if
    βt > (λ_i − λ_j)/λ_i² for all i < j ≤ K, for which βt > 1/λ_K is enough.

    Sources: NeuralEF, Deng et al. 2022 and eqs 5-7 of the paper; NestedLoRA, Ryu et al. 2024
    (arXiv 2402.03655), joint nesting with the weights 1/K, and sequential nesting; SpectralNet,
    Shaham et al. 2018, with S⁻¹ for its QR step; the normalised cut of Shi and Malik 2000, expected
    under soft memberships (Nazi et al. 2019), whose relaxation has the leading eigenvectors of
    D^(-1/2) W D^(-1/2) for D^(1/2)ψ, with W the graph given and d its row sums.

    Args:
        psi: ``[N, K]``, float32, float64 or half precision, K at least 1. For ``neuralef`` scaled
            here to unit columns; for ``ncut`` memberships, as a softmax of each row gives them.
        graph: κ, N nodes, symmetric; for ``ncut`` any adjacency of weights of at least 0.
        kind: which.
        beta, t: of ``neuralef``: the penalty's and the trace's weights.

    Returns:
        A scalar, float64 if an operand is, else float32; differentiable in ``psi`` and in the
        graph's values. ``nestedlora`` leaves out ‖κ‖² (over K, its sequential form), so that it
        ends at −Σ_l (K + 1 − l) λ_l² / K, and the sequential one at −Σ_l λ_l² / K.

    Raises:
        ValueError: an unknown kind, no column, a graph that is not symmetric.
        TypeError, ValueError: what the operators refuse.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    check_graph("graph", graph)
    check_dense_operand("psi", psi, graph)
    if psi.shape[1] == 0:
        raise ValueError("psi: expected at least one column, got [N, 0]")
    if not graph.symmetric:
        raise ValueError("graph: expected a symmetric graph (symmetric=True), got symmetric=False")
    if kind == "neuralef":
        columns = l2_batch_norm(_accumulated(psi, graph), minimum=1e-12)[0]
        return neuralef_loss(columns, graph, beta, t)[0]
    m, psi = quadratic_form(psi, graph), _accumulated(psi, graph)
    if kind == "ncut":
        return _normalized_cut(m, psi, graph)
    if kind == "spectralnet":
        return _span_trace(m, psi)
    # Means over the rows are the scalar products of functions: outputs of order 1 stay so.
    rows = max(1, graph.num_nodes)
    m, psi = m / rows, psi / rows**0.5
    return _sequential_low_rank(m, psi) if kind.endswith("sequential") else _joint_low_rank(m, psi)


def _accumulated(psi: Tensor, graph: CSRGraph) -> Tensor:
    """ψ in the dtype that sums over N rows are made in."""
    return psi.to(accumulation_dtype(psi, graph.values))


def _joint_low_rank(m: Tensor, psi: Tensor) -> Tensor:
    """Σ_l w_l (‖S_{1:l}‖² − 2 tr M_{1:l}) with w_l = 1/K.

    A pair (i, j) is in every prefix from max(i, j) on, so that the sum over l is a mask on S².
    """
    count = m.shape[0]
    from_here = torch.arange(count, 0, -1, device=m.device, dtype=m.dtype) / count  # Σ_{l ≥ i} w_l
    mask = torch.minimum(from_here[:, None], from_here)
    return (mask * (psi.T @ psi).square()).sum() - 2 * (from_here * m.diagonal()).sum()


def _sequential_low_rank(m: Tensor, psi: Tensor) -> Tensor:
    """(‖S‖² − 2 tr M) / K, of which column l moves only its own prefix's part.

    That is Σ_l ‖ψ_l‖⁴ + 2 Σ_{i<l} (ψ_iᵀψ_l)² with the earlier column, ψ_i, held fixed.
    """
    own = psi.square().sum(0).square().sum()
    with_earlier = (psi.detach().T @ psi).triu(1).square().sum()
    return (own + 2 * with_earlier - 2 * m.trace()) / m.shape[0]


def _span_trace(m: Tensor, psi: Tensor) -> Tensor:
    """K − tr(S⁻¹M), indifferent to the basis of the span, in float64: K × K numbers.

    A ridge as large as the rounding of S keeps dependent columns from dividing by zero.
    """
    s, count = (psi.T @ psi).double(), m.shape[0]
    ridge = 8 * torch.finfo(psi.dtype).eps * s.detach().trace()
    identity = torch.eye(count, dtype=s.dtype, device=s.device)
    factor = torch.linalg.cholesky(s + (ridge + torch.finfo(psi.dtype).tiny) * identity)
    return (count - torch.cholesky_solve(m.double(), factor).trace()).to(m.dtype)


def _normalized_cut(m: Tensor, psi: Tensor, graph: CSRGraph) -> Tensor:
    degrees = spmm(graph, psi.new_ones(graph.num_nodes, 1))
    volumes = (degrees.T @ psi)[0]
    # An empty cluster cuts nothing off and holds nothing: its ratio is 0, not 0/0.
    held = volumes > 0
    return len(m) - (torch.where(held, m.diagonal(), 0.0) / torch.where(held, volumes, 1.0)).sum()
