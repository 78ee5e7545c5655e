"""Reference of ``neuralef_loss``: the NeuralEF objective (eqs 5-7) and its closed-form gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from nefkern.reference.quadratic_form import quadratic_form


def loss_of_r(r: Tensor, beta: float, t: float) -> Tensor:
    """-(t/K) sum_j R_jj + (beta t^2/K) sum_{i<j} R_ij^2 of R [K, K]."""
    k = r.shape[0]
    return -(t / k) * r.trace() + (beta * t * t / k) * r.triu(1).square().sum()


def neuralef_loss(
    row_offsets: Tensor, columns: Tensor, values: Tensor, psi: Tensor, beta: float, t: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, R [K, K], Y = kappa psi [N, K]); see :func:`nefkern.ops.neuralef_loss`."""
    r, y = quadratic_form(row_offsets, columns, values, psi, psi)
    return loss_of_r(r, beta, t), r, y


def gradient_factor(grad: Tensor, r: Tensor, beta: float, t: float) -> Tensor:
    """F [K, K] of grad * dL/dpsi = Y F = grad * (-(2t/K) Y + (2 beta t^2/K) Y triu(R, 1)).

    kappa is symmetric, so kappa U = Y gives both terms and no second sparse product is needed; the
    scalars are folded into the K x K factor, so one dense product does all.
    """
    k = r.shape[0]
    factor = (2 * beta * t * t / k) * r.triu(1) - (2 * t / k) * torch.eye(
        k, dtype=r.dtype, device=r.device
    )
    return grad * factor


def gradient_of_r(grad: Tensor, r: Tensor, beta: float, t: float) -> Tensor:
    """grad * dL/dR [K, K] = grad * (-(t/K) I + (2 beta t^2/K) triu(R, 1)), both of R's factors
    free: what reaches kappa, to which stop_gradient means nothing."""
    k = r.shape[0]
    identity = torch.eye(k, dtype=r.dtype, device=r.device)
    return grad * ((2 * beta * t * t / k) * r.triu(1) - (t / k) * identity)


def neuralef_loss_backward(grad: Tensor, y: Tensor, r: Tensor, beta: float, t: float) -> Tensor:
    """grad * dL/dpsi [N, K] = Y F; differentiable, but Y and R are constants to it."""
    return y @ gradient_factor(grad, r, beta, t).to(y.dtype)
