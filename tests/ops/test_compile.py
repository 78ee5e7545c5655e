"""torch.compile(fullgraph=True) of every operator: a dozen sizes and numbers in two graphs."""

from __future__ import annotations

import math

import pytest
import torch
import torch._inductor.config
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.testing import CompileCounterWithBackend

from nefkern import ops
from tests.ops.graph_common import random_graph, random_lists

SIZES = range(20, 32)
#: Three numbers of each size's own, away from the special 0 and 1.
NUMBERS = {n: (0.01 * n, 0.03 * n, 0.5 / n) for n in SIZES}


def lists(n):
    return *random_lists(n, 4, seed=n), random_lists(n, 3, seed=n + 1)[0]


def rows(n, columns=5):
    x = torch.randn(n, columns, generator=torch.Generator().manual_seed(n))
    return x.requires_grad_()


def learned_lists(n):
    """The weights require a gradient."""
    indices, weights, pixels = lists(n)
    return indices, weights.requires_grad_(), pixels


def chain(features, psi, a, b, c):
    """README's own: neighbours, graph, objective."""
    values, indices = ops.knn(features, 3)
    graph = ops.normalized_adjacency(indices, values, num_nodes=len(features), clamp_min=c)
    loss, r = ops.neuralef_loss(psi, graph, beta=b, t=a)
    return loss, r


def attention(feature_map):
    def call(q, k, v, a, b, c):
        return ops.linear_attention(q, k, v, feature_map=feature_map, eps=c)

    def arguments(n):
        return (
            rows(6 * n, 4).view(2, 3, n, 4).detach().requires_grad_(),
            rows(6 * n + 6, 4).view(2, 3, n + 1, 4).detach().requires_grad_(),
            rows(6 * n + 6, 7).view(2, 3, n + 1, 7).detach().requires_grad_(),
        )

    return call, arguments


#: name: the call, of tensors and three numbers, and its tensors at size n
CALLS = {
    "knn": (lambda x, a, b, c: ops.knn(x, 3), lambda n: (rows(n).detach(),)),
    "knn in a database": (
        lambda x, y, a, b, c: ops.knn(x, 3, database=y, metric="inner_product"),
        lambda n: (rows(n).detach(), rows(3 * n + 1).detach()),
    ),
    "knn in segments of a database": (
        lambda x, y, s, t, a, b, c: ops.knn(x, 3, database=y, segments=s, database_segments=t),
        lambda n: (
            rows(n).detach(),
            rows(2 * n).detach(),
            torch.tensor([0, 5, n]),
            torch.tensor([0, 9, 2 * n]),
        ),
    ),
    "normalized_adjacency": (
        lambda i, w, p, a, b, c: ops.normalized_adjacency(
            i, w, num_nodes=i.shape[0], clamp_min=a
        ).tensors(),
        lists,
    ),
    "kappa": (
        lambda i, w, p, a, b, c: ops.kappa(
            i, w, p, num_nodes=i.shape[0], alpha=a, clamp_min=b
        ).tensors(),
        lists,
    ),
    "kappa of learned weights": (
        lambda i, w, p, a, b, c: ops.kappa(
            i, w, p, num_nodes=i.shape[0], alpha=a, clamp_min=b
        ).values.square(),
        learned_lists,
    ),
    "union of learned weights": (
        lambda i, w, p, a, b, c: ops.normalized_adjacency(
            i, w, num_nodes=i.shape[0], clamp_min=a, symmetrize="union"
        ).values.square(),
        learned_lists,
    ),
    "add": (
        lambda g, h, a, b, c: ops.add(g, h, a).tensors(),
        lambda n: (random_graph(n, 3, seed=n), random_graph(n, 4, seed=n + 1)),
    ),
    "spmm": (lambda g, x, a, b, c: ops.spmm(g, x), lambda n: (random_graph(n, 3), rows(n))),
    "quadratic_form": (
        lambda g, x, y, a, b, c: ops.quadratic_form(x, g) @ ops.quadratic_form(x, g, y),
        lambda n: (random_graph(n, 3), rows(n), rows(n, 2)),
    ),
    "sddmm": (
        lambda g, x, y, a, b, c: ops.sddmm(g, x, y),
        lambda n: (random_graph(n, 3), rows(n), rows(n + 1)[1:]),
    ),
    "feature_kappa": (
        lambda f, x, p, a, b, c: ops.spmm(
            ops.add(ops.feature_kappa(f, 3, pixel_indices=p, alpha=a), ops.feature_kappa(f, 2), b),
            x,
        ).square(),
        lambda n: (rows(n), rows(n, 4), lists(n)[2]),
    ),
    "neuralef_loss": (
        lambda g, x, a, b, c: ops.neuralef_loss(x, g, beta=a, t=b),
        lambda n: (random_graph(n, 3), rows(n)),
    ),
    "linear_attention elu": attention("elu"),
    "linear_attention softmax": attention("softmax"),
    "chain": (chain, lambda n: (rows(n).detach(), rows(n))),
}


@pytest.mark.parametrize("name", ["add", "kappa", "normalized_adjacency", "neuralef_loss"])
def test_opcheck_with_numbers_as_tensors(name):
    graph, (i, w, p) = random_graph(6, 3), lists(6)
    a, b = torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)
    arguments = {
        "add": (*graph.tensors(), *graph.tensors(), a),
        "kappa": (i, w, p, 6, a, b, True),
        "normalized_adjacency": (i, w, 6, "mean", b, True),
        "neuralef_loss": (*graph.tensors(), rows(6), a, b),
    }
    operator = getattr(torch.ops.nefkern, f"{name}_dynamic")
    torch.library.opcheck(operator, arguments[name])


def with_gradients(call, tensors, numbers):
    """The results, and the gradients of their sum."""
    results = call(*tensors, *numbers)
    results = results if isinstance(results, tuple) else (results,)
    leaves = [x for x in tensors if isinstance(x, torch.Tensor) and x.requires_grad]
    total = sum(x.sum() for x in results if x.requires_grad)
    return [*results, *(torch.autograd.grad(total, leaves) if leaves else ())]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", CALLS)
def test_a_dozen_sizes_and_numbers_in_two_graphs(name, dynamic):
    call, tensors_of = CALLS[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter, dynamic=dynamic)
    for n in SIZES:
        tensors = tensors_of(n)
        found = with_gradients(compiled, tensors, NUMBERS[n])
        wanted = with_gradients(call, tensors, NUMBERS[n])
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert counter.frame_count <= (1 if dynamic else 2)


def test_inductor_takes_changing_sizes_and_numbers():
    """Once is enough: it never looks inside the operators. (One that needs hardly any C++.)"""
    call, tensors_of = CALLS["linear_attention elu"]
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(call, fullgraph=True, backend=counter, dynamic=True)
    # Inductor's cache on disk does not know when an operator's fake kernel has changed.
    with torch._inductor.config.patch(force_disable_caches=True):
        for n in (20, 23):
            tensors = tensors_of(n)
            found = with_gradients(compiled, tensors, NUMBERS[n])
            wanted = with_gradients(call, tensors, NUMBERS[n])
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_number_that_turns_out_not_finite_is_refused(bad):
    """A graph for changing numbers has been compiled, and nobody looks at the number any more."""
    compiled = torch.compile(ops.add, fullgraph=True, backend=aot_eager, dynamic=True)
    graph = random_graph(9, 3)
    compiled(graph, graph, 0.3)
    with pytest.raises(Exception, match="alpha: expected a finite number"):
        compiled(graph, graph, bad)
