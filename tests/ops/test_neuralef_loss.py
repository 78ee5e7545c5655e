from __future__ import annotations

import math

import pytest
import torch

from nefkern import backend, ops
from nefkern.ops import add, normalized_adjacency
from tests.ops.graph_common import (
    HALF,
    backend_device,
    backends_of,
    dense_adjacency,
    moved,
    on_backend_device,
    random_graph,
    random_lists,
)

neuralef_loss = on_backend_device(ops.neuralef_loss)
each_backend = pytest.mark.parametrize("name", backends_of("neuralef_loss"))


def dense_objective(u, kappa, beta, t):
    """Eqs 5-7 written down as they stand; autograd and detach give the gradient."""
    k = u.shape[1]
    r = u.T @ kappa @ u
    r_hat = u.detach().T @ kappa @ u
    penalty = sum((r_hat[i, j] ** 2 for j in range(k) for i in range(j)), start=u.new_zeros(()))
    return -(t / k) * r.diagonal().sum() + beta * t**2 / k * penalty, r


def unit_columns(x):
    return x / x.norm(dim=0, keepdim=True).clamp(min=1e-9)


@each_backend
@pytest.mark.parametrize(("n", "k"), [(1, 1), (30, 1), (64, 7), (150, 33), (200, 64)])
def test_equals_dense_objective(name, n, k):
    """From neighbour lists to the gradient, against the paper's dense formulas in float64."""
    indices, weights = random_lists(n, 12)
    pixels, _ = random_lists(n, 5, seed=1)
    dense = dense_adjacency(indices, weights, n) + 0.3 * dense_adjacency(pixels, None, n, "union")
    psi = unit_columns(torch.randn(n, k, generator=torch.Generator().manual_seed(0)))
    psi.requires_grad_()
    # A large beta, so that an error in the penalty cannot hide behind the trace.
    beta, t = 50.0, 0.7
    kappa = add(
        normalized_adjacency(indices, weights, num_nodes=n),
        normalized_adjacency(pixels, num_nodes=n, symmetrize="union"),
        0.3,
    )
    with backend(name):
        loss, r = neuralef_loss(psi, kappa, beta, t)
        (found,) = torch.autograd.grad(3 * loss, psi)
    exact_psi = psi.detach().double().requires_grad_()
    exact, exact_r = dense_objective(exact_psi, dense, beta, t)
    (wanted,) = torch.autograd.grad(3 * exact, exact_psi)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(r.double(), exact_r, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    assert not r.requires_grad


def test_float64_is_exact():
    graph = random_graph(80, 8, dtype=torch.float64)
    psi = unit_columns(torch.randn(80, 9, dtype=torch.float64)).requires_grad_()
    loss, r = neuralef_loss(psi, graph, 20.0, 0.5)
    exact, exact_r = dense_objective(psi, graph.to_dense(), 20.0, 0.5)
    torch.testing.assert_close((loss, r), (exact, exact_r.detach()), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(
        torch.autograd.grad(loss, psi), torch.autograd.grad(exact, psi), rtol=1e-12, atol=1e-14
    )


@each_backend
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision(name, dtype):
    graph = random_graph(200, 12)
    psi = unit_columns(torch.randn(200, 40)).to(dtype).requires_grad_()
    with backend(name):
        loss, r = neuralef_loss(psi, graph, 20.0, 0.5)
        loss.backward()
    assert loss.dtype == r.dtype == torch.float32
    assert psi.grad.dtype == dtype
    exact_psi = psi.detach().double().requires_grad_()
    exact, exact_r = dense_objective(exact_psi, graph.to_dense().double(), 20.0, 0.5)
    exact.backward()
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(loss.double(), exact, rtol=unit, atol=0)
    assert (r - exact_r).abs().max() <= unit * exact_r.abs().max()
    assert (psi.grad - exact_psi.grad).abs().max() <= unit * exact_psi.grad.abs().max()


@each_backend
def test_strides_and_empty_graphs(name):
    graph = random_graph(40, 5)
    wide = torch.randn(24, 80, device=backend_device(name))
    empty = normalized_adjacency(torch.full((40, 2), -1), num_nodes=40)
    nothing = normalized_adjacency(torch.zeros(0, 2, dtype=torch.int32), num_nodes=0)
    with backend(name):
        loss, r = neuralef_loss(wide.T[::2], graph, 0.3)
        again, r_again = neuralef_loss(wide.T[::2].contiguous(), graph, 0.3)
        torch.testing.assert_close((loss, r), (again, r_again))
        psi = torch.randn(40, 3, requires_grad=True)
        loss, r = neuralef_loss(psi, empty, 0.3)
        loss.backward()
        assert loss == 0
        assert not r.any()
        assert not psi.grad.any()
        psi = torch.zeros(0, 3, requires_grad=True)
        loss, r = neuralef_loss(psi, nothing, 0.3)
        loss.backward()
        assert loss == 0
        assert r.shape == (3, 3)
        assert not r.any()
        assert psi.grad.shape == (0, 3)


@pytest.mark.parametrize("name", backends_of("neuralef_loss", compiled=True))
def test_descends_to_the_leading_eigenvectors_in_order(name):
    """A path's adjacency has known, simple eigenvectors; gradient descent must order them."""
    n, k = 8, 3
    steps = torch.arange(n)[:, None] + torch.tensor([[-1, 1]])
    indices = torch.where((steps >= 0) & (steps < n), steps, -1)
    with backend(name), torch.device(backend_device(name)):
        indices = indices.to(backend_device(name))
        kappa = normalized_adjacency(indices, num_nodes=n, symmetrize="union")
        # kappa + I: the objective's maximum is meant for a positive semi-definite kernel.
        kappa = add(kappa, normalized_adjacency(torch.arange(n)[:, None], num_nodes=n), 1.0)
        start = torch.randn(n, k, generator=torch.Generator().manual_seed(0), device="cpu")
        weights = start.to(indices.device).requires_grad_()
        optimizer = torch.optim.Adam([weights], lr=0.03)
        for _ in range(600):
            loss, _ = ops.neuralef_loss(unit_columns(weights), kappa, beta=4.0, t=1.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    vectors = torch.linalg.eigh(kappa.to_dense().double()).eigenvectors.flip(1)[:, :k]
    cosine = (vectors * unit_columns(weights.detach().double())).sum(0).abs()
    assert (cosine > 0.98).all(), cosine


@each_backend
def test_opcheck(name):
    (graph,) = moved(name, random_graph(12, 3))
    with backend(name):
        for dtype in (torch.float32, torch.bfloat16):
            psi = torch.randn(12, 5, dtype=dtype, device=graph.device, requires_grad=True)
            torch.library.opcheck(
                torch.ops.nefkern.neuralef_loss, (*graph.tensors(), psi, 0.3, 0.5)
            )


@each_backend
def test_fullgraph_compile_from_lists_to_gradient(name):
    indices, weights = moved(name, *random_lists(30, 6))

    def step(indices, weights, psi):
        graph = normalized_adjacency(indices, weights, num_nodes=30)
        return ops.neuralef_loss(psi, add(graph, graph, 0.3), 0.3, 0.5)

    psi = unit_columns(torch.randn(30, 5)).to(indices.device).requires_grad_()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with backend(name):
        loss, _ = step(indices, weights, psi)
        (wanted,) = torch.autograd.grad(loss, psi)
        found, _ = compiled(indices, weights, psi)
        torch.testing.assert_close(found, loss)
        torch.testing.assert_close(torch.autograd.grad(found, psi)[0], wanted)


def test_bad_arguments():
    graph, neuralef_loss = random_graph(5, 2), ops.neuralef_loss
    with pytest.raises(ValueError, match="psi: expected at least one column"):
        neuralef_loss(torch.zeros(5, 0), graph, 0.1)
    with pytest.raises(ValueError, match=r"psi: expected shape \[5, K\]"):
        neuralef_loss(torch.zeros(6, 2), graph, 0.1)
    with pytest.raises(ValueError, match="graph: expected a symmetric graph"):
        neuralef_loss(torch.zeros(5, 2), random_graph(5, 2, symmetric=False), 0.1)
    with pytest.raises(ValueError, match="beta: expected a finite number"):
        neuralef_loss(torch.zeros(5, 2), graph, math.inf)
    with pytest.raises(ValueError, match="t: expected a finite number"):
        neuralef_loss(torch.zeros(5, 2), graph, 0.1, t=math.nan)
