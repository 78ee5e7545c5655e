"""The NeuralEF objective on κ and what to watch beside it (section 3.4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nefkern.ops import CSRGraph, neuralef_loss, spmm
from nefkern.reference.neuralef_loss import loss_of_r, neuralef_loss_backward
from nefkern.runtime import distributed

#: β of the paper at K = 256; it scales with 256 / K (section 4.1).
BETA_AT_256 = 0.08


def scaled_beta(num_eigenfunctions: int, beta: float = BETA_AT_256) -> float:
    """β for K eigenfunctions: 0.08 · 256 / K in the paper, which gives 0.04 at K = 512."""
    return beta * 256 / num_eigenfunctions


def l2_batch_norm(
    psi: Tensor, minimum: float = 1.0, *, shared: bool = False
) -> tuple[Tensor, Tensor]:
    """Scale every column to unit L2 norm over the whole batch.

    Args:
        psi: ``[N, K]``.
        minimum: the norm is clamped from below, so that a dead column can't blow up. The authors'
            implementation clamps at 1.
        shared: the batch is that of all processes, and ``psi`` this one's rows of it.

    Returns:
        U, ``[N, K]`` float32 (float64 for float64), and the norms before the clamp, ``[K]``.
    """
    psi = psi if psi.dtype == torch.float64 else psi.float()
    if shared:
        squares = distributed.differentiable_total(psi.square().sum(0))
        # Clamped before the root, whose slope at 0 is infinite.
        return psi / squares.clamp_min(minimum**2).sqrt(), squares.detach().sqrt()
    norms = column_norms(psi)
    return psi / norms.clamp_min(minimum), norms.detach()


def column_norms(psi: Tensor) -> Tensor:
    """L2 norms of ``psi``'s columns, ``[K]``; of a column of zeros 0, as a constant, since a norm's
    second derivative there is infinite."""
    zero = ~psi.detach().any(0)
    norms = torch.linalg.vector_norm(torch.where(zero, 1.0, psi), dim=0)
    return torch.where(zero, 0.0, norms)


def _rows_of(graph: CSRGraph, rows: slice) -> CSRGraph:
    """The graph with all other rows empty: a product with it costs no more than ``rows``."""
    first, last = graph.row_offsets[[rows.start, rows.stop]].tolist()
    offsets = graph.row_offsets.clamp(first, last) - first
    return CSRGraph(
        offsets, graph.columns[first:last], graph.values[first:last], graph.num_nodes, False
    )


class _SharedLoss(torch.autograd.Function):
    """:func:`nefkern.ops.neuralef_loss` of a batch whose rows lie in several processes.

    With U_r and Y_r = (κU)_r the rows of process r, R = Σ_r U_rᵀ Y_r, and the gradient with respect
    to U_r is Y_r times a K × K matrix made of R. So U is gathered once and R summed once; nothing
    travels in the backward pass.
    """

    @staticmethod
    def forward(ctx, u: Tensor, graph: CSRGraph, beta: float, t: float) -> tuple[Tensor, Tensor]:
        rows = distributed.own_rows(graph.num_nodes)
        y = spmm(_rows_of(graph, rows), distributed.gather_rows(u))[rows]
        r = distributed.total(u.T @ y)
        ctx.save_for_backward(r, y)
        ctx.beta, ctx.t = beta, t
        ctx.mark_non_differentiable(r)
        return loss_of_r(r, beta, t), r

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        if torch.is_grad_enabled():  # create_graph=True: Y and R would count as constants
            raise NotImplementedError(
                "objective: no second derivatives of a loss that processes share (shared=True)"
            )
        r, y = ctx.saved_tensors
        return neuralef_loss_backward(grad, y, r, ctx.beta, ctx.t), None, None, None


@dataclass
class Objective:
    """The loss of one step and its parts.

    Attributes:
        loss: −(t/K) Σ R_jj + (β t²/K) Σ_{i<j} R̂_ij², a scalar to back-propagate.
        figures: ``[4]``, the properties below in their order, on the loss's device and in its
            dtype: reading one waits for the device, so a loop should read all at once.
    """

    loss: Tensor
    figures: Tensor

    @property
    def trace(self) -> float:
        """Σ R_jj / K: the mean Rayleigh quotient, what the loss raises."""
        return self.figures[0].item()

    @property
    def penalty(self) -> float:
        """(β t²/K) Σ_{i<j} R_ij², what keeps the eigenfunctions apart."""
        return self.figures[1].item()

    @property
    def off_diagonal(self) -> float:
        """Mean |R_ij| for i ≠ j."""
        return self.figures[2].item()

    @property
    def dead(self) -> int:
        """The number of columns whose norm lay under the clamp."""
        return int(self.figures[3])


def objective(
    psi: Tensor,
    graph: CSRGraph,
    *,
    beta: float,
    t: float = 0.01,
    minimum: float = 1.0,
    shared: bool = False,
) -> Objective:
    """The L2 batch norm followed by the NeuralEF loss (eqs 5-7).

    Args:
        psi: ψ's outputs, ``[N, K]``.
        graph: κ over the same N rows.
        beta: β, already scaled for K (:func:`scaled_beta`).
        t: the paper's scale; the authors' implementation has 0.01.
        minimum: see :func:`l2_batch_norm`.
        shared: κ is that of the rows of all processes, the same in each, and ``psi`` this one's
            rows. The loss is the same in all; a gradient with respect to parameters is the sum of
            what :meth:`Tensor.backward` leaves in each.

    Raises:
        NotImplementedError: in ``backward(create_graph=True)`` of a shared loss; a shared κ whose
            values require a gradient.
    """
    if shared and graph.values.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(
            "objective: no gradient reaches the values of a graph that processes share "
            "(shared=True); expected values.detach()"
        )
    normalized, norms = l2_batch_norm(psi, minimum, shared=shared)
    if shared:
        loss, r = _SharedLoss.apply(normalized, graph, beta, t)
    else:
        loss, r = neuralef_loss(normalized, graph, beta, t)
    count = len(r)
    diagonal = r.diagonal()
    off_diagonal = (r.abs().sum() - diagonal.abs().sum()) / max(count * (count - 1), 1)
    # Eigenvalues of κ reach 1 + α, so a constant direction is not dead: norms tell, not the trace.
    dead = (norms < minimum).sum().to(r.dtype)
    penalty = beta * t**2 / count * r.triu(1).square().sum()
    return Objective(loss, torch.stack([diagonal.mean(), penalty, off_diagonal, dead]))
