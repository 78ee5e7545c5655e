"""Gradients that reach a graph's values, the weights they come from, and the features behind."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from nefkern import backend, backends, ops, reference
from nefkern.ops import feature_kappa, neighbour_similarities, registry
from nefkern.reference.csr import sums_of
from tests.ops.graph_common import backends_of, moved, on_threads, random_graph, random_lists

N = 8
LISTS, PIXELS = random_lists(N, 4, dtype=torch.float64)[0], random_lists(N, 2, seed=5)[0]


def leaf(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def weighted(seed=0):
    """Weights whose edges stay when they change a little: some negative, none 0, no ties."""
    return leaf(N, 4, seed=seed)


def adjacency(weights, symmetrize="mean", clamp_min=0.0):
    return ops.normalized_adjacency(
        LISTS, weights, num_nodes=N, symmetrize=symmetrize, clamp_min=clamp_min
    )


def with_values(graph, values):
    return dataclasses.replace(graph, values=values)


#: name: a function of one matrix M [N, N] whose places in a symmetric graph hold M + M^T, and of ψ
CALLS = {
    "spmm": lambda g, x: ops.spmm(g, x),
    "quadratic_form": lambda g, x: ops.quadratic_form(x, g),
    "quadratic_form of two": lambda g, x: ops.quadratic_form(x, g, x.tanh()),
    "neuralef_loss": lambda g, x: ops.neuralef_loss(x, g, 5.0, 0.7)[0],
    "add": lambda g, x: ops.add(g, random_graph(N, 3, seed=9, dtype=torch.float64), 0.4).values,
    "added": lambda g, x: ops.add(random_graph(N, 3, seed=9, dtype=torch.float64), g, 0.4).values,
}


def symmetric_case(call):
    graph = random_graph(N, 4, dtype=torch.float64)
    rows = torch.arange(N).repeat_interleave(graph.row_offsets.diff())

    def function(m, x):
        return call(with_values(graph, (m + m.T)[rows, graph.columns.long()]), x)

    return function


@pytest.mark.parametrize("name", CALLS)
def test_of_the_values_of_a_symmetric_graph(name):
    function, x = symmetric_case(CALLS[name]), leaf(N, 3, seed=1)
    # In ψ the objective holds a factor constant: its gradient is not that of its value.
    fixed = x.detach() if name == "neuralef_loss" else x
    assert gradcheck(function, (leaf(N, N), fixed), fast_mode=True)
    assert gradgradcheck(function, (leaf(N, N), fixed), fast_mode=True)


@pytest.mark.parametrize("name", ["spmm", "quadratic_form", "quadratic_form of two", "add"])
def test_of_the_values_of_a_directed_graph(name):
    graph = random_graph(N, 4, symmetric=False, dtype=torch.float64)
    inputs = graph.values.clone().requires_grad_(), leaf(N, 3, seed=1)
    function = lambda values, x: CALLS[name](with_values(graph, values), x)  # noqa: E731
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend_name", backends_of("sddmm"))
@pytest.mark.parametrize("name", ["spmm", "quadratic_form", "neuralef_loss"])
def test_values_gradient_on_every_backend(name, backend_name, dtype):
    graph, x = random_graph(60, 6), torch.randn(60, 21).to(dtype)
    graph, x = moved(backend_name, graph, x)

    def gradient(graph, x):
        values = graph.values.clone().requires_grad_()
        CALLS[name](with_values(graph, values), x).square().sum().backward()
        return values.grad

    with backend(backend_name):
        found = gradient(graph, x)
    exact = gradient(with_values(graph, graph.values.double()), x.double())
    assert found.dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2  # spmm's result is rounded to bfloat16
    assert (found.double() - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.parametrize("name", ["spmm", "quadratic_form", "neuralef_loss"])
def test_nothing_more_is_kept_where_values_are_constants(name):
    """One tensor of N rows at most (Y), as ever; none of ψ beside it."""
    graph, x = random_graph(N, 4), torch.randn(N, 3, requires_grad=True)
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        CALLS[name](graph, x)
    assert sum(t.shape == (N, 3) for t in kept) == (0 if name == "spmm" else 1)


@pytest.mark.parametrize("symmetrize", ["mean", "union"])
@pytest.mark.parametrize("clamp_min", [0.0, 0.3])
def test_of_the_weights(symmetrize, clamp_min):
    """With padding, duplicates, self loops and clamped weights among them."""

    def function(weights):
        return adjacency(weights, symmetrize, clamp_min).values

    weights = weighted()
    assert (weights < clamp_min).any()
    assert (LISTS < 0).any()
    assert gradcheck(function, (weights,))
    assert gradgradcheck(function, (weights,), fast_mode=True)


def test_of_the_weights_of_kappa():
    def function(weights):
        return ops.kappa(LISTS, weights, PIXELS, num_nodes=N, alpha=0.4).values

    assert gradcheck(function, (weighted(),))
    assert gradgradcheck(function, (weighted(),), fast_mode=True)


@pytest.mark.parametrize("symmetrize", ["mean", "union"])
def test_no_sum_of_the_weights_gradient_is_left_to_chance(symmetrize):
    """PyTorch's formula on a GPU, which need not exist: no atomic additions, whose order changes
    from run to run."""
    by_chance = re.compile("index_add|scatter_add|scatter_reduce|put_|bincount|histc")
    found = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            reduce = args[4:5] if function is torch.ops.aten.scatter_reduce.two else ()
            found.append(" ".join([str(function), *reduce]))
            return function(*args, **(kwargs or {}))

    graph = reference.normalized_adjacency(LISTS, None, num_nodes=N, symmetrize=symmetrize)
    with FakeTensorMode(), Names():
        places = [torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in graph]
        lists = torch.empty(N, 4, dtype=torch.int32, device="cuda")
        reference.normalized_adjacency_backward(
            places[2].float(), lists, lists.double(), *places[:2], symmetrize, 0.0
        )
        sums_of(lists.flatten().double(), lists.flatten().long(), N)
    risky = {name for name in found if by_chance.search(name)}
    assert "aten.index_put.default" in found
    assert risky <= {"aten.scatter_reduce.two amax", "aten.index_put.default"}


@pytest.mark.parametrize("size", [5, 9])
def test_sums_by_index(size):
    index, values = torch.tensor([4, 0, 4, 4]), torch.tensor([1.0, 2, 3, 4]).double()
    values.requires_grad_()
    found = sums_of(values, index, size)
    assert found.tolist() == [2, 0, 0, 0, 8] + [0] * (size - 5)
    by_sorting = values.new_zeros(size).index_put((index,), values, accumulate=True)
    assert torch.equal(found, by_sorting)  # what a GPU does
    assert gradgradcheck(lambda v: sums_of(v.square(), index, size), (values,))


def test_competing_weights():
    """The largest duplicate has it all, equal ones and equal directions share evenly."""
    indices = torch.tensor([[1, 1, 2], [0, 2, -1], [0, 1, -1]])
    weights = torch.tensor([[2.0, 2.0, 1.0], [4.0, 1.0, 9.0], [0.5, -3.0, 9.0]]).double()
    weights.requires_grad_()

    def gradient(symmetrize):
        graph = ops.normalized_adjacency(indices, weights, num_nodes=3, symmetrize=symmetrize)
        dense = graph.to_dense()
        return torch.autograd.grad((dense * torch.arange(9.0).view(3, 3)).sum(), weights)[0]

    mean, union = gradient("mean"), gradient("union")
    assert mean[0, 0] == mean[0, 1] != 0  # duplicates
    assert union[0, 0] == union[0, 1] == 0 != union[1, 0]  # 4 beats 2
    for found in (mean, union):
        assert found[2, 1] == found[1, 2] == found[2, 2] == 0  # clamped, padding
    assert union[2, 0] == 0 != union[0, 2]
    twin = torch.ones(3, 1, dtype=torch.float64, requires_grad=True)
    ring = ops.normalized_adjacency(
        torch.tensor([[1], [0], [1]]), twin, num_nodes=3, symmetrize="union"
    )
    ring.values[0].backward()
    assert twin.grad[0] == twin.grad[1] != 0


@pytest.mark.parametrize(("n", "k"), [(0, 3), (3, 0), (3, 2)])
def test_no_edge_at_all(n, k):
    weights = torch.ones(n, k, requires_grad=True)
    padding = torch.full((n, k), -1)
    for graph in (
        ops.normalized_adjacency(padding, weights, num_nodes=n),
        ops.kappa(padding, weights, padding, num_nodes=n),
    ):
        (gradient,) = torch.autograd.grad(graph.values.sum(), weights)
        assert torch.equal(gradient, torch.zeros(n, k))


@pytest.mark.parametrize("factor", [1e-38, 1e36])
def test_weights_of_any_size(factor):
    """κ does not change with the weights' unit, so the gradient is 1 / unit times as large."""
    weights = torch.rand(N, 4, generator=torch.Generator().manual_seed(0)) + 0.5

    def gradient(weights):
        weights = weights.detach().requires_grad_()
        graph = ops.normalized_adjacency(LISTS, weights, num_nodes=N)
        return torch.autograd.grad(graph.values[::3].sum(), weights)[0]

    found = gradient(weights * factor).double() * factor
    exact = gradient(weights.double())
    assert (found - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("name", backends_of("kappa"))
def test_weights_in_float32_on_every_backend(name):
    indices, weights = random_lists(80, 9)
    pixels = random_lists(80, 4, seed=3)[0]
    direction = torch.randn(80, 80, dtype=torch.float64)

    def gradient(indices, weights, pixels):
        weights = weights.detach().requires_grad_()
        graph = ops.kappa(indices, weights, pixels, num_nodes=80)
        (graph.to_dense().cpu() * direction).sum().backward()
        return weights.grad.cpu().double()

    exact = gradient(indices, weights.double(), pixels)
    with backend(name):
        found = gradient(*moved(name, indices, weights, pixels))
    assert (found - exact).abs().max() <= 1e-5 * exact.abs().max()


def crowded_lists(n, k):
    """Short ranges of nodes and few distinct weights: duplicates, self loops, ties both ways."""
    indices, weights = random_lists(n, k)
    near = torch.where(indices < 0, -1, (torch.arange(n)[:, None] + indices % 4) % n)
    return near.to(indices.dtype), (weights * 2).round() / 2


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("lists", [random_lists, crowded_lists])
@pytest.mark.parametrize("symmetrize", ["mean", "union"])
@pytest.mark.parametrize("name", backends_of("normalized_adjacency_backward"))
def test_every_backend_has_the_gradient_of_the_reference(name, symmetrize, lists, index_dtype):
    """At the places of the lists' own graph, and of one with more places than that."""
    for n, k in ((1, 1), (2, 3), (60, 7), (200, 30)):
        indices, weights = lists(n, k)
        indices = indices.to(index_dtype)
        for clamp_min in (0.0, 0.5):
            options = {"num_nodes": n, "symmetrize": symmetrize, "clamp_min": clamp_min}
            own = ops.normalized_adjacency(indices, weights, **options)
            for graph in (own, ops.add(own, random_graph(n, 3), 1.0)):
                grad = torch.randn(graph.nnz, generator=torch.Generator().manual_seed(n))
                call = grad, indices, weights, *graph.tensors()[:2]
                exact = reference.normalized_adjacency_backward(
                    grad.double(), indices, weights.double(), *call[3:], symmetrize, clamp_min
                )
                with backend(name):
                    found = registry.call(
                        "normalized_adjacency_backward", *moved(name, *call), symmetrize, clamp_min
                    ).cpu()
                assert found.dtype == torch.float32
                limit = 1e-9 + 1e-6 * exact.abs().max()  # of what cancels
                assert ((found - exact).abs() <= limit).all()
                assert not found[(indices < 0) | (weights < clamp_min)].any()


@pytest.mark.parametrize("name", backends_of("add_backward"))
def test_every_backend_gathers_the_gradient_of_a_sum(name):
    for n in (1, 5, 300):
        graphs = random_graph(n, 20), random_graph(n, 2, seed=3, symmetric=False)
        total = ops.add(*graphs, 0.5)
        grad = torch.randn(total.nnz)
        dense = dataclasses.replace(total, values=grad).to_dense()
        for graph in graphs:
            rows = torch.arange(n).repeat_interleave(graph.row_offsets.diff())
            call = grad, *total.tensors()[:2], *graph.tensors()[:2]
            with backend(name):
                found = registry.call("add_backward", *moved(name, *call)).cpu()
            assert torch.equal(found, dense[rows, graph.columns.long()])


@pytest.mark.parametrize("symmetrize", ["mean", "union"])
@pytest.mark.parametrize("name", backends_of("normalized_adjacency_backward"))
def test_places_without_a_listed_edge_play_no_part(name, symmetrize):
    """Of kappa's, those that the pixel graph alone has: whatever the gradient says there."""
    indices, weights = torch.tensor([[1], [2], [-1]], dtype=torch.int32), torch.rand(3, 1) + 1
    own = ops.normalized_adjacency(indices, weights, num_nodes=3, symmetrize=symmetrize)
    graph = ops.add(own, ops.CSRGraph.from_torch(torch.ones(3, 3), symmetric=True), 1.0)
    grad = torch.where(ops.add(own, graph, 0.0).values == 0, torch.inf, torch.randn(graph.nnz))
    assert grad.isinf().any()
    call = grad, indices, weights, *graph.tensors()[:2]
    with backend(name):
        found = registry.call("normalized_adjacency_backward", *moved(name, *call), symmetrize, 0.0)
    assert found[:2].isfinite().all()
    assert found[:2].all()
    assert found[2] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gradients_have_the_dtype_of_the_weights(dtype):
    indices, weights = random_lists(30, 5, dtype=dtype)
    weights.requires_grad_()
    graph = ops.kappa(indices, weights, random_lists(30, 2, seed=1)[0], num_nodes=30)
    graph.values.square().sum().backward()
    assert weights.grad.dtype == dtype
    assert weights.grad.any()


@pytest.mark.parametrize("name", backends_of("normalized_adjacency_backward", compiled=True))
@pytest.mark.parametrize("symmetrize", ["mean", "union"])
def test_gradient_does_not_depend_on_threads(name, symmetrize):
    indices, weights = moved(name, *random_lists(3000, 40))
    graph = ops.normalized_adjacency(indices, weights, num_nodes=3000, symmetrize=symmetrize)
    total = ops.add(graph, moved(name, random_graph(3000, 9))[0], 0.5).tensors()[:2]
    grad = torch.randn_like(total[1], dtype=torch.float32)

    def gradients():
        call = grad, indices, weights, *total, symmetrize, 0.0
        return (
            registry.call("normalized_adjacency_backward", *call),
            registry.call("add_backward", grad, *total, *graph.tensors()[:2]),
        )

    with backend(name):
        first, *others = on_threads(gradients)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


NO_GRAPH = "graph: expected row_offsets that never fall"


@pytest.mark.skipif(backends.why_not("cpu") is not None, reason=str(backends.why_not("cpu")))
@pytest.mark.parametrize(
    ("offsets", "columns", "indices", "message"),
    [
        (
            [0, 1, 2, 2],
            [1, 0],
            [[1], [0], [3]],
            r"indices: expected -1 \(padding\) to 2, got 0 to 3",
        ),
        ([0, 1, 2, 2], [1, 3], [[1], [0], [-1]], NO_GRAPH),
        ([0, 1, 2, 2], [1, -1], [[1], [0], [-1]], NO_GRAPH),
        ([0, 2, 1, 2], [1, 0], [[1], [0], [-1]], NO_GRAPH),
        ([0, 1, 2, 5], [1, 0], [[1], [0], [-1]], NO_GRAPH),
        ([0, 1, 2, 2], [1, 0], [[1], [2], [-1]], NO_GRAPH),  # an edge that is not stored
        ([0, 1, 2, 2], [1, 2], [[1], [2], [-1]], NO_GRAPH),  # not symmetric
        ([0, 2, 3, 3], [1, 2, 2], [[1], [2], [-1]], NO_GRAPH),
    ],
)
def test_the_native_backward_follows_no_contradiction(offsets, columns, indices, message):
    graph = torch.tensor(offsets), torch.tensor(columns, dtype=torch.int32)
    call = torch.ones(len(columns)), torch.tensor(indices), torch.ones(3, 1), *graph
    with backend("cpu"), pytest.raises(ValueError, match=message):
        registry.call("normalized_adjacency_backward", *call, "mean", 0.0)


@pytest.mark.skipif(backends.why_not("cpu") is not None, reason=str(backends.why_not("cpu")))
@pytest.mark.parametrize(
    ("offsets", "columns"), [([0, 1, 1, 1], [2]), ([0, 0, 2, 2], [0, 1]), ([0, 2, 1, 1], [1])]
)
def test_the_native_sum_backward_follows_no_contradiction(offsets, columns):
    total = torch.tensor([0, 1, 2, 2]), torch.tensor([1, 0], dtype=torch.int32)
    own = torch.tensor(offsets), torch.tensor(columns, dtype=torch.int32)
    with backend("cpu"), pytest.raises(ValueError, match=NO_GRAPH):
        registry.call("add_backward", torch.ones(2), *total, *own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("symmetrize", ["mean", "union"])
def test_opcheck_of_the_backward_operators(symmetrize, dtype):
    indices, weights = random_lists(12, 4, dtype=dtype)
    graph = ops.normalized_adjacency(indices, weights, num_nodes=12, symmetrize=symmetrize)
    structure = graph.tensors()[:2]
    grad = torch.randn(graph.nnz, dtype=dtype).requires_grad_()
    arguments = grad, indices, weights.requires_grad_(), *structure, symmetrize, 0.0
    torch.library.opcheck(torch.ops.nefkern.normalized_adjacency_backward, arguments)
    total = ops.add(graph, random_graph(12, 3, dtype=dtype), 1.0)
    grad = torch.randn(total.nnz, dtype=dtype).requires_grad_()
    torch.library.opcheck(torch.ops.nefkern.add_backward, (grad, *total.tensors()[:2], *structure))


def test_second_derivatives_in_float32_are_those_in_float64():
    """The native kernel's derivative is the reference's formula."""
    indices, weights = random_lists(40, 5)
    pixels = random_lists(40, 3, seed=2)[0]

    def second(weights):
        weights = weights.detach().requires_grad_()
        values = ops.kappa(indices, weights, pixels, num_nodes=40).values
        (first,) = torch.autograd.grad(values.square().sum(), weights, create_graph=True)
        return torch.autograd.grad(first.square().sum(), weights)[0]

    exact = second(weights.double())
    assert (second(weights) - exact).abs().max() <= 1e-4 * exact.abs().max()


@pytest.mark.parametrize("name", ["normalized_adjacency", "kappa", "add"])
def test_opcheck_with_gradients(name):
    indices, weights = random_lists(10, 4)
    graph = random_graph(10, 3)
    values = graph.values.clone().requires_grad_()
    weights.requires_grad_()
    arguments = {
        "normalized_adjacency": (indices, weights, 10, "mean", 0.0, False),
        "kappa": (indices, weights, random_lists(10, 2)[0], 10, 0.3, 0.0, False),
        "add": (*graph.tensors()[:2], values, *random_graph(10, 2, seed=1).tensors(), 0.3),
    }
    # PyTorch's own check of compiled gradients adds a float to an integer result in place, and
    # fails on any operator like these; test_compile does it for them.
    checks = "test_schema", "test_autograd_registration", "test_faketensor"
    operator = getattr(torch.ops.nefkern, name)
    torch.library.opcheck(operator, arguments[name], test_utils=checks)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_similarities_are_those_of_knn(dtype):
    features = torch.randn(50, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    features[3] = 0
    values, indices = ops.knn(features, 7)
    found = neighbour_similarities(features, indices)
    assert found.dtype == values.dtype
    torch.testing.assert_close(found, values, rtol=0, atol=1e-15 if values.itemsize == 8 else 5e-7)


def test_similarities_of_padding_and_of_rows_without_length():
    features = torch.tensor([[1e30, 1e30], [1e-30, 0.0], [0.0, 0.0], [3.0, 4.0], [1.0, torch.nan]])
    features.requires_grad_()
    indices = torch.tensor([[1, 3], [0, 3], [0, 1], [0, -1], [-1, -1]])
    found = neighbour_similarities(features, indices)
    half = 0.5**0.5
    expected = torch.tensor([[half, 7 * half / 5], [half, 0.6], [0, 0], [7 * half / 5, 0], [0, 0]])
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert features.grad[:4].isfinite().all()
    assert not features.grad[2].any()


def test_similarities_hold_no_gathered_rows():
    """What is kept for the backward pass is O(N (k + C)), never N k C."""
    n, k, c = 200, 40, 50
    features = torch.randn(n, c, requires_grad=True)
    indices = torch.randint(0, n, (n, k))
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        neighbour_similarities(features, indices)
    assert max(kept) <= n * max(k, c)


@pytest.mark.parametrize("pixels", [None, PIXELS])
@pytest.mark.parametrize("name", ["similarities", "trace", "eigenvalue", "objective"])
def test_the_chain_from_features(name, pixels):
    """Features → neighbours → κ → a number, with the neighbours of a generic point held fixed."""
    features, psi = leaf(N, 4), leaf(N, 3, seed=1)
    indices = ops.knn(features.detach(), 3)[1]

    def function(features):
        if name == "similarities":
            return neighbour_similarities(features, indices)
        graph = feature_kappa(features, 3, pixel_indices=pixels)
        if name == "trace":
            return ops.quadratic_form(psi.detach(), graph).trace()
        if name == "objective":
            return ops.neuralef_loss(psi.detach(), graph, 5.0, 0.7)[0]
        return torch.linalg.eigvalsh(graph.to_dense())[-1]

    assert gradcheck(function, (features,))
    if name != "eigenvalue":
        assert gradgradcheck(function, (features,), fast_mode=True)


@pytest.mark.parametrize("pixels", [None, PIXELS])
def test_a_leading_eigenvalue_by_its_vector(pixels):
    """dλ/dκ = v vᵀ: the sparse operators give the gradient that autograd through LAPACK does."""
    features = leaf(N, 4)
    graph = feature_kappa(features, 3, pixel_indices=pixels)
    values, vectors = torch.linalg.eigh(graph.to_dense())
    (exact,) = torch.autograd.grad(values[-1], features, retain_graph=True)
    rayleigh = ops.quadratic_form(vectors[:, -1:].detach(), graph).sum()
    torch.testing.assert_close(torch.autograd.grad(rayleigh, features)[0], exact)


def test_without_gradients_it_is_knn_and_kappa():
    features = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    pixels = random_lists(60, 3)[0]
    similarities, indices = ops.knn(features, 6)
    assert feature_kappa(features, 6, pixel_indices=pixels, alpha=0.2) == ops.kappa(
        indices, similarities, pixels, num_nodes=60, alpha=0.2
    )
    assert feature_kappa(features, 6, symmetrize="union") == ops.normalized_adjacency(
        indices, similarities, num_nodes=60, symmetrize="union"
    )
    learned = feature_kappa(features.requires_grad_(), 6)
    assert learned.values.requires_grad
    torch.testing.assert_close(
        learned.values.detach(), feature_kappa(features.detach(), 6).values, rtol=1e-5, atol=1e-7
    )
    segments = torch.tensor([0, 30, 60])
    assert not feature_kappa(features, 6, segments=segments).to_dense()[:30, 30:].any()


def test_compiled_and_by_torch_func():
    features, psi = torch.randn(40, 6), torch.randn(40, 3)

    def value(features):
        return ops.neuralef_loss(psi, feature_kappa(features, 5), 5.0, 0.7)[0]

    leaf = features.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(value(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(value)(features), wanted)
    compiled = torch.compile(value, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(leaf), leaf)
    torch.testing.assert_close(found, wanted)


@pytest.mark.filterwarnings("ignore:.*input value tensor is non-contiguous")  # of torch.vmap's own
def test_gradients_come_through_vmap_and_tangents_are_refused():
    """Neither is dropped where a tensor does not tell that it is asked for."""
    features = torch.rand(2, 9, 4, dtype=torch.float64)  # all neighbours count: sizes are equal

    def value(features):
        return feature_kappa(features, 8).values.square().sum()

    def values(features):
        return torch.vmap(value)(features).sum()

    wanted = torch.stack([torch.func.grad(value)(one) for one in features])
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(torch.func.grad(values)(features), wanted)
    torch.testing.assert_close(torch.vmap(torch.func.grad(value))(features), wanted)
    leaf = features.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(values(leaf), leaf)[0], wanted)
    one = features[0]
    with pytest.raises(NotImplementedError, match="sddmm: forward-mode"):
        torch.func.jvp(value, (one,), (one,))
    with pytest.raises(NotImplementedError, match="sddmm: forward-mode"), forward_ad.dual_level():
        value(forward_ad.make_dual(one, one))


def test_similarities_of_listed_rows_that_are_not_finite():
    for bad in (torch.nan, torch.inf):
        features = torch.tensor([[1.0, 2.0], [1.0, bad], [0.0, 0.0]])
        found = neighbour_similarities(features, torch.tensor([[0, 1], [0, 2], [0, -1]]))
        assert found.isnan().tolist() == [[False, True], [True, True], [False, False]]


def test_similarities_of_lists_by_vmap():
    features = torch.randn(6, 3)
    indices = torch.randint(-1, 6, (4, 6, 2))
    found = torch.vmap(neighbour_similarities, (None, 0))(features, indices)
    each = [neighbour_similarities(features, one) for one in indices]
    torch.testing.assert_close(found, torch.stack(each))


def test_bad_arguments():
    features = torch.randn(6, 3)
    with pytest.raises(ValueError, match="symmetrize: expected 'mean' with pixel_indices"):
        feature_kappa(features, 2, pixel_indices=PIXELS, symmetrize="union")
    with pytest.raises(TypeError, match=r"features: expected a torch\.Tensor, got list"):
        feature_kappa([1.0], 2)
    with pytest.raises(ValueError, match=r"indices: expected -1 \(padding\) to 5, got 0 to 6"):
        neighbour_similarities(features, torch.tensor([[0], [1], [2], [3], [4], [6]]))
    with pytest.raises(ValueError, match=r"indices: expected shape \[6, k\]"):
        neighbour_similarities(features, torch.zeros(5, 2, dtype=torch.int32))
    with pytest.raises(TypeError, match="indices: expected one of int32, int64, got float32"):
        neighbour_similarities(features, torch.zeros(6, 2))
