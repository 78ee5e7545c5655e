from __future__ import annotations

import pytest
import torch

from nefkern import backend, ops
from tests.ops.graph_common import HALF, backends_of, moved, on_backend_device, random_graph

quadratic_form = on_backend_device(ops.quadratic_form)
each_backend = pytest.mark.parametrize("name", backends_of("quadratic_form"))


@each_backend
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("n", "k", "j"), [(0, 3, 2), (1, 1, 1), (90, 17, 5), (200, 64, 64)])
def test_values_and_gradients(name, symmetric, n, k, j):
    graph = random_graph(n, 8, symmetric=symmetric)
    dense = graph.to_dense().double()
    psi = torch.randn(n, k, requires_grad=True)
    phi = torch.randn(n, j, requires_grad=True)
    for pair in ((psi, None), (psi, phi)):
        right = pair[0] if pair[1] is None else pair[1]
        inputs = [x for x in pair if x is not None]
        grad = torch.randn(k, right.shape[1])
        with backend(name):
            r = quadratic_form(pair[0], graph, pair[1])
            found = torch.autograd.grad(r, inputs, grad)
        exact = psi.double().T @ dense @ right.double()
        torch.testing.assert_close(r.double(), exact, rtol=1e-5, atol=1e-3)
        wanted = torch.autograd.grad(exact, inputs, grad.double())
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-3)


@each_backend
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision(name, dtype):
    graph = random_graph(90, 8)
    psi = torch.randn(90, 17).to(dtype).requires_grad_()
    with backend(name):
        r = quadratic_form(psi, graph)
        r.sum().backward()
    assert r.dtype == torch.float32
    assert psi.grad.dtype == dtype
    exact = psi.double().T @ graph.to_dense().double() @ psi.double()
    # Against the float32 result of the same numbers: half precision only rounds kappa psi, if that.
    scale = exact.abs().max()
    assert ((r.double() - exact).abs() <= torch.finfo(dtype).eps * scale).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradcheck(symmetric):
    graph = random_graph(20, 4, symmetric=symmetric, dtype=torch.float64)
    psi = torch.randn(20, 3, dtype=torch.float64, requires_grad=True)
    phi = torch.randn(20, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: quadratic_form(a, graph), psi)
    assert torch.autograd.gradcheck(lambda a, b: quadratic_form(a, graph, b), (psi, phi))
    assert torch.autograd.gradcheck(lambda b: quadratic_form(psi.detach(), graph, b), phi)
    assert torch.autograd.gradcheck(lambda a: quadratic_form(a, graph, phi.detach()), psi)


@each_backend
def test_opcheck_and_compile(name):
    graph, psi, phi = moved(
        name, random_graph(12, 3, symmetric=False), torch.randn(12, 5), torch.randn(12, 4)
    )
    psi, phi, quadratic_form = psi.requires_grad_(), phi.requires_grad_(), ops.quadratic_form
    compiled = torch.compile(quadratic_form, fullgraph=True, backend="aot_eager")
    with backend(name):
        for other in (None, phi):
            torch.library.opcheck(
                torch.ops.nefkern.quadratic_form, (*graph.tensors(), psi, other, False)
            )
        compiled(psi, graph, phi).sum().backward()
        found = psi.grad.clone(), phi.grad.clone()
        psi.grad = phi.grad = None
        quadratic_form(psi, graph, phi).sum().backward()
    torch.testing.assert_close(found, (psi.grad, phi.grad))


def test_bad_arguments():
    graph = random_graph(5, 2)
    with pytest.raises(ValueError, match=r"psi: expected shape \[5, K\]"):
        quadratic_form(torch.zeros(4, 2), graph)
    with pytest.raises(ValueError, match=r"phi: expected shape \[5, K\]"):
        quadratic_form(torch.zeros(5, 2), graph, torch.zeros(4, 2))
    with pytest.raises(TypeError, match=r"phi: expected torch\.float32"):
        quadratic_form(torch.zeros(5, 2), graph, torch.zeros(5, 2).half())
