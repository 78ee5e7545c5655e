"""The NeuralEF objective on κ and what to watch beside it (section 3.4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nefkern.ops import CSRGraph, neuralef_loss

#: β of the paper at K = 256; it scales with 256 / K (section 4.1).
BETA_AT_256 = 0.08


def scaled_beta(num_eigenfunctions: int, beta: float = BETA_AT_256) -> float:
    """β for K eigenfunctions: 0.08 · 256 / K in the paper, which gives 0.04 at K = 512."""
    return beta * 256 / num_eigenfunctions


def l2_batch_norm(psi: Tensor, minimum: float = 1.0) -> tuple[Tensor, Tensor]:
    """Scale every column to unit L2 norm over the whole batch.

    Args:
        psi: ``[N, K]``.
        minimum: the norm is clamped from below, so that a dead column can't blow up. The authors'
            implementation clamps at 1.

    Returns:
        U, ``[N, K]`` float32 (float64 for float64), and the norms before the clamp, ``[K]``.
    """
    psi = psi if psi.dtype == torch.float64 else psi.float()
    norms = torch.linalg.vector_norm(psi, dim=0)
    return psi / norms.clamp_min(minimum), norms.detach()


@dataclass
class Objective:
    """The loss of one step and its parts.

    Attributes:
        loss: −(t/K) Σ R_jj + (β t²/K) Σ_{i<j} R̂_ij², a scalar to back-propagate.
        trace: Σ R_jj / K: the mean Rayleigh quotient, what the loss raises.
        penalty: (β t²/K) Σ_{i<j} R_ij², what keeps the eigenfunctions apart.
        off_diagonal: mean |R_ij| for i ≠ j.
        dead: number of columns whose norm lay under the clamp.
    """

    loss: Tensor
    trace: float
    penalty: float
    off_diagonal: float
    dead: int


def objective(
    psi: Tensor, graph: CSRGraph, *, beta: float, t: float = 0.01, minimum: float = 1.0
) -> Objective:
    """The L2 batch norm followed by the NeuralEF loss (eqs 5-7).

    Args:
        psi: ψ's outputs, ``[N, K]``.
        graph: κ over the same N rows.
        beta: β, already scaled for K (:func:`scaled_beta`).
        t: the paper's scale; the authors' implementation has 0.01.
        minimum: see :func:`l2_batch_norm`.
    """
    normalized, norms = l2_batch_norm(psi, minimum)
    loss, r = neuralef_loss(normalized, graph, beta, t)
    count = len(r)
    diagonal = r.diagonal()
    off_diagonal = (r.abs().sum() - diagonal.abs().sum()) / max(count * (count - 1), 1)
    # Eigenvalues of κ reach 1 + α, so a constant direction is not dead: norms tell, not the trace.
    return Objective(
        loss=loss,
        trace=diagonal.mean().item(),
        penalty=(beta * t**2 / count * r.triu(1).square().sum()).item(),
        off_diagonal=off_diagonal.item(),
        dead=int((norms < minimum).sum()),
    )
