"""The objective against autograd of its formula in dense float64, the L2 batch norm included."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from nefkern import backend
from nefkern.ops import CSRGraph
from nefkern.spectral.objective import l2_batch_norm, objective, scaled_beta
from tests.ops.graph_common import backends_of, moved


def symmetric(n: int, seed: int) -> torch.Tensor:
    """A sparse normalised kernel as dense float64, with an empty row."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.rand(n, n, generator=generator, dtype=torch.float64)
    a = torch.where(a > 0.8, a, 0)
    a = (a + a.T) / 2
    a[3], a[:, 3] = 0, 0
    scale = a.sum(1).clamp_min(1e-12).rsqrt()
    return torch.where(a > 0, scale[:, None] * a * scale[None], 0)


def formula(psi: torch.Tensor, kernel: torch.Tensor, beta: float, t: float, minimum: float):
    """Eqs 5-7 with the stop-gradient as written; returns loss, R."""
    u = psi / (psi**2).sum(0).clamp_min(minimum**2).sqrt()
    count = u.shape[1]
    r = u.T @ kernel @ u
    r_hat = u.detach().T @ kernel @ u
    loss = -t / count * torch.diagonal(r).sum()
    for i in range(count):
        for j in range(i + 1, count):
            loss = loss + beta * t**2 / count * r_hat[i, j] ** 2
    return loss, r


CASES = {
    "one-hot like": lambda z: (3 * z).softmax(1) * 4,
    "continuous": lambda z: 2 * z,
    "dead columns": lambda z: z * torch.tensor([1e-3, 0.0, 1, 1, 0.05, 1, 1], dtype=z.dtype),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("beta", [0.0, 0.08, 50.0])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in backends_of("neuralef_loss")),
     ("reference", torch.float64)],
)  # fmt: skip
def test_value_and_gradient(case, beta, name, dtype, record_property):
    n, k, t, minimum = 60, 7, 0.01, 1.0
    z = torch.randn(n, k, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    psi = CASES[case](z)
    kernel = symmetric(n, 2)
    exact = psi.clone().requires_grad_()
    loss, r = formula(exact, kernel, beta, t, minimum)
    loss.backward()

    given = psi.to(dtype).requires_grad_()
    graph = CSRGraph.from_torch(kernel.to(dtype), symmetric=True)
    with backend(name):
        parts = objective(*moved(name, given, graph), beta=beta, t=t, minimum=minimum)
        parts.loss.backward()

    value = abs(parts.loss.item() - loss.item()) / abs(loss.item())
    gradient = (given.grad - exact.grad).abs().max() / exact.grad.abs().max()
    record_property("relative differences", (value, gradient.item()))
    print(f"{case}, β = {beta}, {dtype}: value {value:.1e}, gradient {gradient:.1e} (relative)")
    limit = 1e-12 if dtype == torch.float64 else 3e-6
    assert value < limit
    assert gradient < limit

    r = r.detach()
    upper = r.triu(1)
    assert parts.trace == pytest.approx(r.trace().item() / k, rel=1e-5)
    assert parts.penalty == pytest.approx(beta * t**2 / k * (upper**2).sum().item(), rel=1e-4)
    off = upper.abs().sum() / (k * (k - 1) / 2)
    assert parts.off_diagonal == pytest.approx(off.item(), rel=1e-4)
    assert parts.dead == int((psi.norm(dim=0) < minimum).sum())
    assert parts.loss.item() == pytest.approx(-t * parts.trace + parts.penalty, rel=1e-5)


def test_the_stop_gradient_matters():
    """The gradient is not that of the plain formula: a test that cannot see it would be blind."""
    psi = torch.randn(60, 7, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
    kernel = symmetric(60, 2)
    u, _ = l2_batch_norm(psi)
    r = u.T @ kernel @ u
    plain = -0.01 / 7 * r.trace() + 5000 * 1e-4 / 7 * r.triu(1).square().sum()
    (wrong,) = torch.autograd.grad(plain, psi)
    graph = CSRGraph.from_torch(kernel, symmetric=True)
    (right,) = torch.autograd.grad(objective(psi, graph, beta=5000.0).loss, psi)
    assert (wrong - right).abs().max() > 0.05 * right.abs().max()


def test_batch_norm_gives_unit_columns_and_spares_dead_ones():
    psi = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    psi[:, 1] *= 1e-4
    psi[:, 2] = 0
    psi.requires_grad_()
    u, norms = l2_batch_norm(psi)
    torch.testing.assert_close(norms, psi.detach().norm(dim=0))
    assert not norms.requires_grad
    torch.testing.assert_close(u[:, [0, 3]].norm(dim=0), torch.ones(2))
    assert torch.equal(u[:, [1, 2]], psi[:, [1, 2]]), "under the clamp: as it is"
    u.square().sum().backward()
    assert psi.grad.isfinite().all()
    assert l2_batch_norm(psi.detach().bfloat16())[0].dtype == torch.float32


def test_minimum_is_an_option():
    psi = 0.1 * torch.nn.functional.normalize(torch.randn(50, 4), dim=0)
    assert l2_batch_norm(psi, 0.05)[0].norm(dim=0).sum().item() == pytest.approx(4, rel=1e-5)
    assert l2_batch_norm(psi)[0].norm(dim=0).sum().item() == pytest.approx(0.4, rel=1e-5)


@pytest.mark.parametrize(("k", "beta"), [(256, 0.08), (512, 0.04), (64, 0.32)])
def test_beta_scales_with_k(k, beta):
    assert scaled_beta(k) == pytest.approx(beta)
    assert scaled_beta(k, 0.16) == pytest.approx(2 * beta)


def test_second_derivatives_are_right_or_refused():
    """A gradient penalty, against autograd of the objective's closed-form gradient."""
    kernel = symmetric(20, 0)
    psi = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    psi.requires_grad_()
    graph, beta, t = CSRGraph.from_torch(kernel, symmetric=True), 5.0, 0.7

    def penalty(u, gradient_of_u):
        (gradient,) = torch.autograd.grad(u, psi, gradient_of_u, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), psi)[0]

    u = l2_batch_norm(psi)[0]
    y = kernel @ u
    wanted = penalty(u, -(2 * t / 3) * y + (2 * beta * t**2 / 3) * y @ (u.T @ y).triu(1))
    loss = objective(psi, graph, beta=beta, t=t).loss
    torch.testing.assert_close(penalty(loss, torch.ones_like(loss)), wanted)
    shared = objective(psi, graph, beta=beta, t=t, shared=True).loss
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        torch.autograd.grad(shared, psi, create_graph=True)


def test_second_derivatives_at_a_dead_column_are_finite_and_right():
    """There psi / minimum, linear: a norm's own second derivative would be infinite."""
    graph = CSRGraph.from_torch(symmetric(12, 2), symmetric=True)
    psi = torch.rand(12, 3, dtype=torch.float64)
    psi[:, 1] = 0
    psi.requires_grad_()

    def value(psi):
        return objective(psi, graph, beta=50.0, t=0.7, minimum=0.5).loss

    assert torch.autograd.gradgradcheck(value, (psi,))


def test_norms_and_their_gradients_are_those_of_torch_to_the_bit():
    psi = torch.randn(50, 6).requires_grad_()
    leaf = psi.detach().clone().requires_grad_()
    with torch.no_grad():
        psi[:, 2] = leaf[:, 2] = 0
    weights = torch.randn(50, 6)
    expected = torch.nn.functional.normalize(leaf, dim=0, eps=1e-3)
    found, norms = l2_batch_norm(psi, 1e-3)
    assert torch.equal(found, expected)
    assert torch.equal(norms, torch.linalg.vector_norm(leaf.detach(), dim=0))
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert torch.equal(psi.grad, leaf.grad)


def test_gradients_of_the_graph_pass_or_are_refused():
    kernel, psi = symmetric(20, 0).requires_grad_(), torch.randn(20, 3, dtype=torch.float64)
    rows, columns = (kernel + kernel.T).detach().nonzero(as_tuple=True)
    graph = CSRGraph.from_torch((kernel + kernel.T).detach(), symmetric=True)
    graph = dataclasses.replace(graph, values=(kernel + kernel.T)[rows, columns])
    u = l2_batch_norm(psi)[0]
    (found,) = torch.autograd.grad(objective(psi, graph, beta=5.0, t=0.7).loss, kernel)
    r = u.T @ (kernel + kernel.T) @ u
    dense = -(0.7 / 3) * r.trace() + (5.0 * 0.7**2 / 3) * r.triu(1).square().sum()
    stored = (kernel + kernel.T) != 0  # the structure is held fixed
    torch.testing.assert_close(found, torch.autograd.grad(dense, kernel)[0] * stored)
    with pytest.raises(NotImplementedError, match=r"no gradient reaches the values.*detach"):
        objective(psi, graph, beta=5.0, shared=True)


def test_gradient_descent_finds_the_leading_eigenspace():
    """The minimiser spans the leading eigenvectors, in their order (section 3.4)."""
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64))[0]
    values = torch.tensor([1.0, 0.7, 0.4, *[0.05] * 37], dtype=torch.float64)
    kernel = q @ torch.diag(values) @ q.T
    kernel = (kernel + kernel.T) / 2
    graph = CSRGraph.from_torch(kernel, symmetric=True)
    psi = torch.randn(40, 3, generator=generator, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.Adam([psi], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        # t = 1 and a strong penalty: the order shows within a short test.
        objective(psi, graph, beta=10.0, t=1.0, minimum=1e-3).loss.backward()
        optimizer.step()
    u = l2_batch_norm(psi.detach(), 1e-3)[0]
    overlap = (u.T @ q[:, :3]).abs()
    assert torch.diagonal(overlap).min() > 0.95, overlap
