"""Every objective against autograd through its textbook formula, and at its known minimisers."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from bench.spectral_losses import block_model, steps_to
from nefkern.ops import CSRGraph, feature_kappa, registry
from nefkern.spectral.losses import KINDS, spectral_loss

N, K = 24, 4
BETA, T = 12.0, 0.7
#: Those whose gradient is that of their value: no factor is held constant.
PLAIN = ("nestedlora", "spectralnet", "ncut")
each_kind = pytest.mark.parametrize("kind", KINDS)


def numbers(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def kappa(seed=0, dtype=torch.float64) -> CSRGraph:
    """D^(-1/2) A D^(-1/2) of a random A, two thirds of it empty."""
    a = numbers(N, N, seed=seed).square()
    a = torch.where(numbers(N, N, seed=seed + 1) > 0.5, a, 0.0)
    a = a + a.T
    scale = a.sum(1).rsqrt()
    return CSRGraph.from_torch((scale[:, None] * a * scale).to(dtype), symmetric=True)


def outputs(kind, seed=2):
    psi = numbers(N, K, seed=seed)
    return psi.softmax(1) if kind == "ncut" else psi


def loss(psi, graph, kind):
    return spectral_loss(psi, graph, kind, beta=BETA, t=T)


def textbook(psi, a, kind):
    """The formula as its authors write it, on the dense matrix."""
    n, k = psi.shape
    if kind == "neuralef":
        u = psi / psi.norm(dim=0)
        r, half = u.T @ a @ u, u.detach().T @ a @ u
        return -T / k * r.trace() + BETA * T**2 / k * half.triu(1).square().sum()
    if kind == "spectralnet":
        q = torch.linalg.qr(psi).Q
        return (q.T @ (torch.eye(n, dtype=a.dtype) - a) @ q).trace()
    if kind == "ncut":
        cut = [p @ a @ (1 - p) for p in psi.T]
        return sum(c / (a.sum(1) @ p) for c, p in zip(cut, psi.T, strict=True))
    total = 0.0
    for count in range(1, k + 1):
        prefix = psi[:, :count]
        if kind == "nestedlora-sequential":
            # Only the last column learns from its prefix. The value is another: its minimum is
            # tested below.
            prefix = torch.cat([prefix[:, :-1].detach(), prefix[:, -1:]], 1)
        square = (a - prefix @ prefix.T / n).square().sum() - a.square().sum()
        total = total + square / k
    return total


@each_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_value_and_gradient_are_those_of_the_textbook(kind, dtype):
    graph = kappa(dtype=dtype)
    psi = outputs(kind).to(dtype).requires_grad_()
    exact = psi.detach().double().requires_grad_()
    value, wanted = loss(psi, graph, kind), textbook(exact, graph.to_dense().double(), kind)
    assert value.dtype == dtype
    tolerance = (
        {"rtol": 1e-9, "atol": 1e-11} if dtype.itemsize == 8 else {"rtol": 1e-4, "atol": 1e-6}
    )
    if kind != "nestedlora-sequential":
        torch.testing.assert_close(value.double(), wanted, **tolerance)
    (found,), (gradient,) = torch.autograd.grad(value, psi), torch.autograd.grad(wanted, exact)
    assert (found.double() - gradient).abs().max() <= 1e-5 * gradient.abs().max() + 1e-8


@pytest.mark.parametrize("kind", PLAIN)
def test_gradcheck(kind):
    graph = kappa()
    assert gradcheck(lambda psi: loss(psi, graph, kind), outputs(kind).requires_grad_())


@each_kind
def test_second_derivatives_are_finite_at_a_dead_column(kind):
    psi = outputs(kind)
    psi[:, 1] = 0
    psi.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(psi, kappa(), kind), psi, create_graph=True)
    assert gradient.isfinite().all()
    assert torch.autograd.grad(gradient[:, 0].square().sum(), psi)[0].isfinite().all()


@each_kind
def test_gradient_reaches_the_features_behind_the_graph(kind):
    psi = outputs(kind)

    def function(features):
        return loss(psi, feature_kappa(features, 5), kind)

    assert gradcheck(function, numbers(N, 5, seed=7).requires_grad_(), fast_mode=True)


@each_kind
def test_backward_needs_no_second_sparse_product(kind, monkeypatch):
    calls, graph, psi = [], kappa(), outputs(kind).requires_grad_()
    value = loss(psi, graph, kind)
    run = registry.call
    monkeypatch.setattr(
        registry, "call", lambda name, *args: calls.append(name) or run(name, *args)
    )
    value.backward()
    assert calls == []


def eigenpairs(graph, count=K):
    values, vectors = torch.linalg.eigh(graph.to_dense())
    return values.flip(0)[:count], vectors.flip(1)[:, :count]


def minimiser(kind, graph):
    values, vectors = eigenpairs(graph)
    assert values[-1] > 0.05
    if kind.startswith("nestedlora"):
        return vectors * (values * N).sqrt()
    if kind == "spectralnet":
        return vectors @ numbers(K, K, seed=9)
    return vectors


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "ncut"])
def test_exact_eigenvectors_are_a_minimum(kind):
    """The gradient vanishes there, and every step away costs: for NeuralEF and the sequential form,
    a step of one column towards any direction, since each column has an objective of its own."""
    graph = kappa()
    psi = minimiser(kind, graph).requires_grad_()
    value = loss(psi, graph, kind)
    (gradient,) = torch.autograd.grad(value, psi)
    assert gradient.abs().max() < 1e-10
    with torch.no_grad():
        for seed in range(20):
            step = numbers(N, seed=seed) * psi[:, 0].norm() * 0.05
            moved = psi.clone()
            moved[:, seed % K] += step
            assert loss(moved, graph, kind) > value


def test_minimum_of_nestedlora():
    """−Σ_l m_l λ_l², m_l = (K + 1 − l)/K, joint, and −Σ_l λ_l² / K, sequential."""
    graph = kappa()
    values, _ = eigenpairs(graph)
    psi = minimiser("nestedlora", graph)
    share = torch.arange(K, 0, -1) / K
    torch.testing.assert_close(loss(psi, graph, "nestedlora"), -(share * values**2).sum())
    torch.testing.assert_close(loss(psi, graph, "nestedlora-sequential"), -(values**2).sum() / K)


@pytest.mark.parametrize("kind", ["neuralef", "nestedlora", "nestedlora-sequential"])
def test_ordered_kinds_prefer_the_order(kind):
    graph = kappa()
    psi = minimiser(kind, graph)
    turned = psi @ torch.linalg.qr(numbers(K, K, seed=3)).Q
    first = {"beta": BETA, "t": T}
    gradients = []
    for one in (psi, turned):
        one = one.detach().requires_grad_()
        gradients.append(torch.autograd.grad(spectral_loss(one, graph, kind, **first), one)[0])
    assert gradients[0].abs().max() < 1e-10 < 1e-4 < gradients[1].abs().max()


def test_spectralnet_is_of_the_span_and_at_least_the_trace():
    graph, psi = kappa(), numbers(N, K)
    values, vectors = eigenpairs(graph)
    torch.testing.assert_close(loss(vectors, graph, "spectralnet"), K - values.sum())
    same = loss(psi @ numbers(K, K, seed=3), graph, "spectralnet")
    torch.testing.assert_close(loss(psi, graph, "spectralnet"), same)
    dependent = torch.cat([psi, psi[:, :1]], 1).float().requires_grad_()
    value = loss(dependent, graph, "spectralnet")
    value.backward()
    assert value.isfinite()
    assert dependent.grad.isfinite().all()


def test_ncut_of_a_perfect_partition_is_0():
    block = torch.ones(6, 6, dtype=torch.float64)
    graph = CSRGraph.from_torch(torch.block_diag(*[block] * 4), symmetric=True)
    labels = torch.arange(24) // 6
    membership = torch.nn.functional.one_hot(labels).double()
    assert loss(membership, graph, "ncut").abs() < 1e-12
    assert loss(membership.roll(1, 0), graph, "ncut") > 0.1
    empty = torch.cat([membership, torch.zeros(24, 1)], 1).requires_grad_()
    value = loss(empty, graph, "ncut")  # an empty cluster is no gain
    torch.testing.assert_close(value.detach(), torch.tensor(1.0, dtype=torch.float64))
    value.backward()
    assert empty.grad.isfinite().all()


@each_kind
def test_half_precision_is_summed_in_float32(kind):
    graph = kappa(dtype=torch.float32)
    psi = outputs(kind).bfloat16().requires_grad_()
    value = loss(psi, graph, kind)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.detach(), loss(psi.detach().float(), graph, kind))
    value.backward()
    assert psi.grad.dtype == torch.bfloat16


@each_kind
def test_bad_arguments(kind):
    graph = kappa()
    with pytest.raises(ValueError, match=r"psi: expected shape \[24, K\]"):
        spectral_loss(numbers(5, 2), graph, kind)
    with pytest.raises(ValueError, match="psi: expected at least one column"):
        spectral_loss(numbers(N, 0), graph, kind)
    with pytest.raises(TypeError, match=r"psi: expected a torch\.Tensor, got list"):
        spectral_loss([1.0], graph, kind)
    directed = CSRGraph(*graph.tensors(), N, symmetric=False)
    with pytest.raises(ValueError, match="graph: expected a symmetric graph"):
        spectral_loss(numbers(N, 2), directed, kind)


def test_unknown_kind():
    with pytest.raises(ValueError, match=r"kind: expected one of neuralef, nestedlora.* got 'svd'"):
        spectral_loss(numbers(N, 2), kappa(), "svd")


@each_kind
def test_training_finds_the_blocks(kind):
    cosine, step = steps_to(block_model(rows=120, blocks=3), kind, steps=300, seed=0)
    assert cosine >= 0.99
    assert step <= 300
