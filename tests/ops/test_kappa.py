from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nefkern import backend
from nefkern.ops import add, kappa, normalized_adjacency
from tests.ops.graph_common import backends_of, dense_adjacency, moved, on_threads, random_lists

each_backend = pytest.mark.parametrize("name", backends_of("kappa"))


def build(name, indices, weights, pixels, **options):
    """The graph that backend ``name`` makes of the lists, on the CPU."""
    with backend(name):
        return kappa(*moved(name, indices, weights, pixels), **options).to("cpu")


def inputs(n, k, near, seed=0, *, dtype=torch.float32, index_dtype=torch.int32):
    indices, weights = random_lists(n, k, seed, dtype=dtype, index_dtype=index_dtype)
    return indices, weights, random_lists(n, near, seed + 1, index_dtype=index_dtype)[0]


def dense_kappa(indices, weights, pixels, n, alpha=0.3, clamp_min=0.0):
    features = dense_adjacency(indices, weights, n, clamp_min=clamp_min)
    return features + alpha * dense_adjacency(pixels, None, n, "union")


def composed(indices, weights, pixels, n, alpha=0.3):
    features = normalized_adjacency(indices, weights, num_nodes=n)
    return add(features, normalized_adjacency(pixels, num_nodes=n, symmetrize="union"), alpha)


def assert_same(one, two):
    assert all(torch.equal(a, b) for a, b in zip(one.tensors(), two.tensors(), strict=True))


@each_backend
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(
    ("n", "k", "near"), [(0, 3, 2), (1, 1, 1), (1, 0, 0), (7, 3, 0), (7, 0, 3), (30, 9, 5)]
)
def test_equals_dense_formula(name, weighted, n, k, near, poisoned_memory):
    indices, weights, pixels = inputs(n, k, near)
    weights = weights if weighted else None
    graph = build(name, indices, weights, pixels, num_nodes=n)
    assert graph.validate().symmetric
    assert graph.dtype == torch.float32
    exact = dense_kappa(indices, weights, pixels, n)
    assert graph.nnz == (exact != 0).sum()
    torch.testing.assert_close(graph.to_dense().double(), exact, rtol=1e-6, atol=1e-9)


@each_backend
@pytest.mark.parametrize("alpha", [0.3, 0.0, -0.5])
def test_equals_the_sum_of_both_graphs_bit_for_bit(name, alpha):
    n = 150 if name in backends_of("kappa", compiled=True) else 20
    indices, weights, pixels = moved(name, *inputs(n, 12, 4))
    with backend(name):
        graph = kappa(indices, weights, pixels, num_nodes=n, alpha=alpha)
        assert_same(graph, composed(indices, weights, pixels, n, alpha))


@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pixel_dtype", [torch.int32, torch.int64])
def test_dtypes_and_strides(name, dtype, pixel_dtype):
    if dtype == torch.float64 and name != "reference":
        name = "auto"  # float64 goes to the reference
    indices, weights, pixels = moved(name, *inputs(16, 12, 8, dtype=dtype))
    indices, weights, pixels = indices[:, ::2], weights[:, ::2], pixels.to(pixel_dtype)[:, ::2]
    graph = build(name, indices, weights, pixels, num_nodes=16, clamp_min=0.25).validate()
    assert graph.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    rtol = 1e-14 if dtype == torch.float64 else 1e-6
    exact = dense_kappa(indices, weights, pixels, 16, clamp_min=0.25)
    torch.testing.assert_close(graph.to_dense().double(), exact, rtol=rtol, atol=0)


@each_backend
def test_a_node_that_one_graph_leaves_alone(name):
    indices = torch.tensor([[1], [-1], [-1], [-1]])
    pixels = torch.tensor([[-1], [-1], [3], [-1]])
    graph = build(name, indices, torch.tensor([[0.5]] * 4), pixels, num_nodes=4, alpha=0.25)
    expected = torch.zeros(4, 4)
    expected[0, 1] = expected[1, 0] = 1
    expected[2, 3] = expected[3, 2] = 0.25
    torch.testing.assert_close(graph.to_dense(), expected)


@each_backend
def test_a_nan_weight_stays_visible_and_does_not_reach_the_pixel_graph(name):
    nan = torch.tensor(math.nan)
    weights = torch.stack([-nan, nan, torch.tensor(1.0), torch.tensor(1.0)])[:, None]
    indices, pixels = torch.tensor([[1], [0], [3], [2]]), torch.tensor([[1], [2], [3], [0]])
    graph = build(name, indices, weights, pixels, num_nodes=4)
    with backend(name):
        features = normalized_adjacency(*moved(name, indices, weights), num_nodes=4).to("cpu")
    found, clean = graph.to_dense(), features.to_dense()
    assert torch.equal(found.isnan(), clean.isnan())
    assert found.isnan().any()
    alone = build(name, indices, torch.ones(4, 1), pixels, num_nodes=4).to_dense()
    assert torch.equal(found[~found.isnan()], alone[~found.isnan()])


@each_backend
@pytest.mark.parametrize("weight", [2.0**-149, 1e-39, 1e-20, 1e20, 3e38])
def test_weights_of_any_size(name, weight):
    lists = torch.tensor([[1, 2], [0, 2], [0, 1]])
    graph = build(name, lists, torch.full((3, 2), weight), lists, num_nodes=3)
    torch.testing.assert_close(graph.values, torch.full((6,), 0.65), rtol=3e-7, atol=0)


@each_backend
def test_weights_of_all_sizes_side_by_side(name):
    n = 20
    indices, weights, pixels = inputs(n, 5, 3)
    size = torch.linspace(-146, 127.9, n, dtype=torch.float64).exp2()[:, None]
    weights = (weights.double().abs().clamp(0.1, 1) * size).float()
    exact = dense_kappa(indices, weights, pixels, n)
    graph = build(name, indices, weights, pixels, num_nodes=n).validate()
    torch.testing.assert_close(graph.to_dense().double(), exact, rtol=5e-7, atol=2.0**-149)
    arguments = moved(name, indices, weights, pixels)
    with backend(name):
        assert_same(kappa(*arguments, num_nodes=n), composed(*arguments, n))


@each_backend
def test_check_finite(name):
    lists = torch.tensor([[1, 2], [0, 2], [0, 1]])
    weights = torch.tensor([[1, 1], [1, 1], [1, math.inf]])
    with pytest.raises(ValueError, match=r"weights: expected finite .* got NaN or inf in row 2"):
        build(name, lists, weights, lists, num_nodes=3, check_finite=True)
    lists[2, 1] = -1
    graph = build(name, lists, weights, lists, num_nodes=3, check_finite=True)
    assert graph.values.isfinite().all()


@pytest.mark.parametrize("name", backends_of("kappa", compiled=True))
@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 20), k=st.integers(0, 24), near=st.integers(0, 6), seed=st.integers(0, 99),
    weighted=st.booleans(),
)  # fmt: skip
def test_any_lists(name, n, k, near, seed, weighted):
    indices, weights, pixels = inputs(n, k, near, seed)
    weights = weights if weighted else None
    exact = dense_kappa(indices, weights, pixels, n)
    graph = build(name, indices, weights, pixels, num_nodes=n).validate()
    torch.testing.assert_close(graph.to_dense().double(), exact, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", backends_of("kappa", compiled=True))
def test_result_does_not_depend_on_threads(name):
    indices, weights, pixels = inputs(700, 40, 9)
    first, *others = on_threads(lambda: build(name, indices, weights, pixels, num_nodes=700))
    for other in others:
        assert_same(first, other)


@each_backend
def test_opcheck(name):
    indices, weights, pixels = moved(name, *inputs(4, 3, 2))
    with backend(name):
        for w in (weights, None):
            torch.library.opcheck(torch.ops.nefkern.kappa, (indices, w, pixels, 4, 0.3, 0.0, True))


@each_backend
def test_fullgraph_compile(name):
    arguments = moved(name, *inputs(20, 4, 2))
    compiled = torch.compile(
        lambda *lists: kappa(*lists, num_nodes=20), fullgraph=True, backend="aot_eager"
    )
    with backend(name):
        assert_same(compiled(*arguments), kappa(*arguments, num_nodes=20))


@each_backend
@pytest.mark.parametrize("bad", [5, -2])
@pytest.mark.parametrize("which", ["indices", "pixel_indices"])
def test_index_out_of_range(name, which, bad):
    lists = {key: torch.tensor([[1], [2], [0], [0], [0]]) for key in ("indices", "pixel_indices")}
    lists[which][2] = bad
    with pytest.raises(ValueError, match=rf"^{which}: expected -1 .* to 4"):
        build(name, lists["indices"], None, lists["pixel_indices"], num_nodes=5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"indices": torch.zeros(3, 2)}, TypeError, "indices: expected int32 or int64"),
        ({"pixel_indices": torch.zeros(3, 2)}, TypeError, "pixel_indices: expected int32 or int"),
        (
            {"pixel_indices": torch.zeros(4, 2, dtype=torch.int32)},
            ValueError,
            r"pixel_indices: expected shape \[3, k\]",
        ),
        (
            {"pixel_indices": torch.zeros(3, 1, dtype=torch.int32, device="meta")},
            ValueError,
            "pixel_indices: expected device cpu, got meta",
        ),
        ({"alpha": math.inf}, ValueError, "alpha: expected a finite number"),
        ({"weights": torch.ones(3, 1)}, ValueError, "weights: expected the shape"),
        ({"clamp_min": -1.0}, ValueError, "clamp_min: expected"),
    ],
)
def test_bad_arguments(change, error, message):
    zeros = torch.zeros(3, 2, dtype=torch.int32)
    arguments = {"indices": zeros, "weights": None, "pixel_indices": zeros, "num_nodes": 3}
    with pytest.raises(error, match=message):
        kappa(**(arguments | change))
