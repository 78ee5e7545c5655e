"""Derivatives beyond the first gradient: second and third ones, and torch.func's transforms."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad, gradgradcheck

from nefkern import backend, ops
from tests.ops.graph_common import backends_of, moved, random_graph

MASK = torch.tensor([[True, True, False, True, True], [False] * 5])


def numbers(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def attention(feature_map, mask=None, eps=1e-6):
    def call(_, q, k, v):
        mine = None if mask is None else mask.to(q.device)
        return ops.linear_attention(q, k, v, feature_map=feature_map, mask=mine, eps=eps)

    return call


QKV = ((2, 2, 4, 3), (2, 2, 5, 3), (2, 2, 5, 2))
#: name: (whether the graph is symmetric, the call, the shapes of its operands)
CALLS = {
    "spmm": (True, lambda g, x: ops.spmm(g, x), ((9, 3),)),
    "spmm directed": (False, lambda g, x: ops.spmm(g, x), ((9, 3),)),
    "quadratic_form": (True, lambda g, x: ops.quadratic_form(x, g), ((9, 3),)),
    "quadratic_form directed": (False, lambda g, x: ops.quadratic_form(x, g), ((9, 3),)),
    "quadratic_form of two": (
        False,
        lambda g, x, y: ops.quadratic_form(x, g, y),
        ((9, 3), (9, 2)),
    ),
    "neuralef_loss": (True, lambda g, x: ops.neuralef_loss(x, g, 5.0, 0.7)[0], ((9, 3),)),
    "linear_attention elu": (True, attention("elu"), QKV),
    "linear_attention elu masked": (True, attention("elu", MASK, 0.0), QKV),
    "linear_attention softmax": (True, attention("softmax"), QKV),
    "linear_attention softmax masked": (True, attention("softmax", MASK), QKV),
}
each_call = pytest.mark.parametrize("case", CALLS)


def case_of(case):
    """(the call with its float64 graph bound, its float64 operands)"""
    symmetric, call, shapes = CALLS[case]
    graph = random_graph(9, 4, symmetric=symmetric, dtype=torch.float64)
    operands = tuple(numbers(*shape, seed=i) for i, shape in enumerate(shapes))
    return graph, call, operands


def penalty(call, *operands):
    """The value plus a gradient penalty: |d call / d operands|^2."""
    value = call(*operands).square().sum()
    gradients = torch.autograd.grad(value, operands, create_graph=True)
    return value + sum(g.square().sum() for g in gradients)


@each_call
def test_second_derivatives_are_those_of_the_first(case):
    graph, call, operands = case_of(case)
    assert gradgradcheck(lambda *xs: call(graph, *xs), operands)


@each_call
def test_third_derivatives(case):
    graph, call, operands = case_of(case)

    def first(*xs):
        value = call(graph, *xs)
        # Not of the objective: its first derivative, with stop_gradient, is not that of its value.
        value = value.sum() if case == "neuralef_loss" else value.square().sum()
        return torch.autograd.grad(value, xs, create_graph=True)

    assert gradgradcheck(first, operands, fast_mode=True)


@pytest.mark.parametrize("name", ["reference", "cpu", "triton", "cuda"])
@each_call
def test_gradient_penalty_in_float32_on_every_backend(case, name):
    if name not in backends_of(case.split()[0]):
        pytest.skip("not here")
    graph, call, operands = case_of(case)
    exact = torch.autograd.grad(penalty(lambda *xs: call(graph, *xs), *operands), operands)
    single = type(graph)(*graph.tensors()[:2], graph.values.float(), 9, graph.symmetric)
    single, *leaves = moved(name, single, *(x.detach().float() for x in operands))
    leaves = [x.requires_grad_() for x in leaves]
    with backend(name):
        found = torch.autograd.grad(penalty(lambda *xs: call(single, *xs), *leaves), leaves)
    for a, b in zip(found, exact, strict=True):
        assert (a.cpu().double() - b).abs().max() <= 2e-5 * b.abs().max()


def test_gradient_penalty_in_bfloat16():
    graph = random_graph(60, 8)
    exact = numbers(60, 5)
    half = exact.detach().bfloat16().requires_grad_()
    exact = half.detach().double().requires_grad_()
    found, wanted = (
        torch.autograd.grad(penalty(lambda u: ops.neuralef_loss(u, graph, 5.0, 0.7)[0], x), x)[0]
        for x in (half, exact)
    )
    assert found.dtype == torch.bfloat16
    assert (found.double() - wanted).abs().max() <= 0.03 * wanted.abs().max()


def test_the_second_derivative_of_the_objective_is_that_of_its_closed_form():
    """g(U) = -(2t/K) Y + (2 beta t^2/K) Y triu(R, 1) with Y = kappa U and R = U^T Y inside."""
    graph, beta, t = random_graph(9, 4, dtype=torch.float64), 5.0, 0.7
    u, direction = numbers(9, 3), numbers(9, 3, seed=1).detach()
    (g,) = torch.autograd.grad(ops.neuralef_loss(u, graph, beta, t)[0], u, create_graph=True)
    (found,) = torch.autograd.grad((g * direction).sum(), u)
    y = graph.to_dense() @ u
    closed = -(2 * t / 3) * y + (2 * beta * t**2 / 3) * y @ (u.T @ y).triu(1)
    torch.testing.assert_close(g, closed)
    torch.testing.assert_close(found, torch.autograd.grad((closed * direction).sum(), u)[0])


@each_call
def test_func_grad(case):
    graph, call, operands = case_of(case)
    every = tuple(range(len(operands)))

    def value(*xs):
        return call(graph, *xs).square().sum()

    found = torch.func.grad(value, every)(*operands)
    torch.testing.assert_close(found, torch.autograd.grad(value(*operands), operands))


@each_call
def test_func_jacobian_and_hessian(case):
    graph, call, operands = case_of(case)
    rest = operands[1:]

    def of_first(x):
        return call(graph, x, *rest)

    def value(x):
        return of_first(x).square().sum()

    x = operands[0].detach()
    found = torch.func.jacrev(of_first)(x)
    torch.testing.assert_close(found, torch.autograd.functional.jacobian(of_first, x))
    found = torch.func.jacrev(torch.func.grad(value))(x)
    torch.testing.assert_close(found, torch.autograd.functional.hessian(value, x))


@each_call
def test_forward_mode_is_refused(case):
    """Not dropped, which would say that the derivative is 0."""
    graph, call, operands = case_of(case)
    operands = [x.detach() for x in operands]
    refused = pytest.raises(NotImplementedError, match=f"^{case.split()[0]}: forward-mode")
    with refused, forward_ad.dual_level():
        call(graph, *(forward_ad.make_dual(x, x) for x in operands))
    with refused:
        torch.func.jvp(lambda *xs: call(graph, *xs), tuple(operands), tuple(operands))


@each_call
def test_vmap(case):
    graph, call, operands = case_of(case)
    batches = [torch.stack((x, 2 * x, -x), 1).detach() for x in operands]
    found = torch.vmap(lambda *xs: call(graph, *xs), in_dims=1)(*batches)
    each = [call(graph, *(b[:, i] for b in batches)) for i in range(3)]
    torch.testing.assert_close(found, torch.stack(each))
    one, *others = batches
    rest = [b[:, 0] for b in others]
    found = torch.vmap(torch.func.grad(lambda x: call(graph, x, *rest).sum()), 1)(one)
    each = [torch.func.grad(lambda x: call(graph, x, *rest).sum())(one[:, i]) for i in range(3)]
    torch.testing.assert_close(found, torch.stack(each))


def test_vmap_over_nothing_is_refused():
    graph = ops.normalized_adjacency(torch.tensor([[1], [0]]), num_nodes=2)
    with pytest.raises(NotImplementedError, match=r"^spmm: torch\.vmap over no slices"):
        torch.vmap(lambda x: ops.spmm(graph, x))(torch.zeros(0, 2, 3))


def test_func_grad_passes_by_what_is_not_differentiable():
    x = numbers(9, 3).detach()

    def value(x):
        values, indices = ops.knn(x, 3)
        graph = ops.normalized_adjacency(indices, values.detach(), num_nodes=9)
        return ops.neuralef_loss(x, graph, 5.0, 0.7)[0]

    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(value)(x), torch.autograd.grad(value(leaf), leaf)[0])
    with pytest.raises(RuntimeError, match="knn is not differentiable"):
        torch.func.grad(lambda x: ops.knn(x, 3)[0].sum())(x)
