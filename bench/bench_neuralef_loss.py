"""The objective, forward and backward, against dense autograd and the reference."""

from __future__ import annotations

import torch

from bench.graph_inputs import DENSE_ROWS, SIZES, kappa, lists, psi_of, sizes_of
from bench.harness import Work, on_reference
from nefkern.ops import neuralef_loss

T = 0.01


def dense_objective(u, matrix, beta):
    """Eqs 5-7 as one writes them down, with detach for the stopped gradient."""
    k = u.shape[1]
    y = matrix @ u
    r_hat = u.detach().T @ y
    trace = (u * y).sum()
    return -(T / k) * trace + (beta * T**2 / k) * r_hat.triu(1).square().sum()


def step(objective, psi, *arguments):
    """Loss and gradient."""
    loss = objective(psi, *arguments)
    loss = loss[0] if isinstance(loss, tuple) else loss
    return loss.detach(), *torch.autograd.grad(loss, psi)


def test_neuralef_loss(race, size):
    graph = kappa(*lists(size))
    beta = 0.08 * 256 / SIZES[size][-1]
    psi = psi_of(size, graph).requires_grad_()
    half = psi.detach().bfloat16().requires_grad_()
    sparse = graph.to_torch()
    loss, gradient = step(neuralef_loss, psi, graph, beta)
    # torch's own sparse product under autograd, in float32
    exact, exact_gradient = step(dense_objective, psi, sparse, beta)
    torch.testing.assert_close(loss, exact, rtol=1e-5, atol=1e-8)
    scale = exact_gradient.abs().max()
    assert (gradient - exact_gradient).abs().max() <= 1e-5 * scale

    contestants = {
        "nefkern": lambda: step(neuralef_loss, psi, graph, beta),
        "nefkern bfloat16": lambda: step(neuralef_loss, half, graph, beta),
        "torch.sparse autograd": lambda: step(dense_objective, psi, sparse, beta),
        "reference": on_reference(lambda: step(neuralef_loss, psi, graph, beta)),
    }
    if graph.num_nodes <= DENSE_ROWS:
        dense = graph.to_dense()
        contestants["dense autograd"] = lambda: step(dense_objective, psi, dense, beta)
    sizes = sizes_of(size, graph)
    n, count = psi.shape
    work = Work(  # kappa U, U^T Y and Y M; U, Y and the gradient
        8.0 * graph.nnz + 12.0 * psi.numel(),
        {"float32": 2.0 * graph.nnz * count + 4.0 * n * count**2},
    )
    race("neuralef_loss, both passes", contestants, sizes=sizes, work=work)
