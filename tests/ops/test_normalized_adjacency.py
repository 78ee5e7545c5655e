from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nefkern import backend
from nefkern.ops import normalized_adjacency
from tests.ops.graph_common import backends_of, dense_adjacency, moved, on_threads, random_lists

each_backend = pytest.mark.parametrize("name", backends_of("normalized_adjacency"))


def build(name, indices, weights=None, **options):
    """The graph that backend ``name`` makes of the lists, on the CPU."""
    indices, weights = moved(name, indices, weights)
    with backend(name):
        return normalized_adjacency(indices, weights, **options).to("cpu")


@each_backend
@pytest.mark.parametrize("symmetrize", ["mean", "union"])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("n", "k"), [(0, 3), (1, 1), (1, 0), (2, 5), (7, 3), (40, 40), (130, 9)])
def test_equals_dense_formula(name, symmetrize, weighted, n, k, poisoned_memory):
    indices, weights = random_lists(n, k)
    weights = weights if weighted else None
    graph = build(name, indices, weights, num_nodes=n, symmetrize=symmetrize)
    graph.validate()
    assert graph.symmetric
    assert graph.dtype == torch.float32
    exact = dense_adjacency(indices, weights, n, symmetrize)
    assert torch.equal(graph.to_dense() != 0, exact != 0)
    assert graph.nnz == (exact != 0).sum()  # weight 0 is dropped, not stored
    torch.testing.assert_close(graph.to_dense().double(), exact, rtol=1e-6, atol=0)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_dtypes(name, dtype, index_dtype):
    if dtype == torch.float64 and name != "reference":
        name = "auto"  # float64 goes to the reference
    indices, weights = random_lists(50, 6, dtype=dtype, index_dtype=index_dtype)
    graph = build(name, indices, weights, num_nodes=50).validate()
    assert graph.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    rtol = 1e-14 if dtype == torch.float64 else 1e-6
    exact = dense_adjacency(indices, weights, 50)
    torch.testing.assert_close(graph.to_dense().double(), exact, rtol=rtol, atol=0)


@each_backend
def test_clamp_min_and_strides(name):
    indices, weights = moved(name, *random_lists(30, 8))
    indices, weights = indices[:, ::2], weights.T.contiguous().T[:, ::2]
    graph = build(name, indices, weights, num_nodes=30, clamp_min=0.25)
    exact = dense_adjacency(indices, weights, 30, clamp_min=0.25)
    torch.testing.assert_close(graph.to_dense().double(), exact, rtol=1e-6, atol=0)


@each_backend
def test_degree_zero_rows_are_empty(name):
    indices = torch.tensor([[1, -1], [-1, -1], [-1, -1], [1, 0]])
    weights = torch.tensor([[-0.5, 0.9], [1.0, 1.0], [1.0, 1.0], [0.0, 0.5]])
    graph = build(name, indices, weights, num_nodes=4).validate()
    assert graph.row_offsets.tolist() == [0, 1, 1, 1, 2]
    assert graph.columns.tolist() == [3, 0]
    assert graph.values.tolist() == [1.0, 1.0]


@each_backend
def test_self_loop_and_duplicates(name):
    indices = torch.tensor([[0, 1, 1], [1, -1, -1]])
    weights = torch.tensor([[2.0, 1.0, 3.0], [1.0, 7.0, 7.0]])
    graph = build(name, indices, weights, num_nodes=2)
    a = torch.tensor([[2.0, 1.5], [1.5, 1.0]])  # the duplicate counts once, with weight 3
    degree = a.sum(1)
    torch.testing.assert_close(graph.to_dense(), a / (degree[:, None] * degree).sqrt())


@each_backend
def test_order_of_the_list_does_not_matter(name):
    indices, weights = random_lists(60, 12)
    shuffle = torch.argsort(torch.rand(60, 12, generator=torch.Generator().manual_seed(1)), 1)
    one = build(name, indices, weights, num_nodes=60)
    two = build(name, indices.gather(1, shuffle), weights.gather(1, shuffle), num_nodes=60)
    assert all(torch.equal(a, b) for a, b in zip(one.tensors(), two.tensors(), strict=True))


@each_backend
@pytest.mark.parametrize("symmetrize", ["mean", "union"])
def test_a_nan_weight_stays_visible(name, symmetrize):
    graph = build(
        name,
        torch.tensor([[1, 1], [-1, -1]]),
        torch.tensor([[math.nan, 1.0], [1.0, 1.0]]),
        num_nodes=2,
        symmetrize=symmetrize,
    )
    assert graph.values.isnan().all()


# ---- weights of any size ----

SMALLEST, LARGEST = 2.0**-149, torch.finfo(torch.float32).max
TRIANGLE = torch.tensor([[1, 2], [0, 2], [0, 1]])


@each_backend
@pytest.mark.parametrize("symmetrize", ["mean", "union"])
@pytest.mark.parametrize("weight", [SMALLEST, 1e-39, 1e-20, 1e20, 3e38, LARGEST])
def test_equal_weights_of_any_size(name, weight, symmetrize):
    weights = torch.full((3, 2), weight)
    graph = build(name, TRIANGLE, weights, num_nodes=3, symmetrize=symmetrize)
    torch.testing.assert_close(graph.values, torch.full((6,), 0.5), rtol=2e-7, atol=0)


@each_backend
@pytest.mark.parametrize("weight", [5e-324, 1e-310, 1e-200, 1e200, 1.7e308])
@pytest.mark.parametrize("symmetrize", ["mean", "union"])
def test_equal_float64_weights_of_any_size(name, weight, symmetrize):
    name = "reference" if name == "reference" else "auto"  # float64 goes to the reference
    weights = torch.full((3, 2), weight, dtype=torch.float64)
    graph = build(name, TRIANGLE, weights, num_nodes=3, symmetrize=symmetrize)
    expected = torch.full((6,), 0.5, dtype=torch.float64)
    torch.testing.assert_close(graph.values, expected, rtol=1e-15, atol=0)


@each_backend
@pytest.mark.parametrize("symmetrize", ["mean", "union"])
@settings(max_examples=8, deadline=None)
@given(exponent=st.integers(-126, 126), seed=st.integers(0, 9))
def test_a_factor_of_all_weights_changes_nothing(name, symmetrize, exponent, seed):
    indices, weights = random_lists(12, 5, seed)
    weights = weights.abs().clamp(0.5, 1)  # times any power of two: exact
    options = {"num_nodes": 12, "symmetrize": symmetrize}
    one = build(name, indices, weights, **options)
    two = build(name, indices, weights * 2.0**exponent, **options)
    assert torch.equal(one.columns, two.columns)
    torch.testing.assert_close(one.values, two.values, rtol=3e-7, atol=0)


@each_backend
@pytest.mark.parametrize("symmetrize", ["mean", "union"])
def test_weights_of_all_sizes_side_by_side(name, symmetrize):
    """Each row's of a size of its own, from subnormals to the largest: as in exact arithmetic."""
    n, k = 64, 5
    indices, weights = random_lists(n, k, seed=3)
    size = torch.linspace(-146, 127.9, n, dtype=torch.float64).exp2()[:, None]
    weights = (weights.double().abs().clamp(0.1, 1) * size).float()
    weights[-1, 0] = LARGEST
    exact = dense_adjacency(indices, weights, n, symmetrize)
    graph = build(name, indices, weights, num_nodes=n, symmetrize=symmetrize).validate()
    torch.testing.assert_close(graph.to_dense().double(), exact, rtol=5e-7, atol=SMALLEST)


@each_backend
def test_points_far_from_all_others(name):
    """exp(-d^2) of three far points is subnormal: their rows are as well normalised as any."""
    weights = torch.exp(-torch.tensor([[0.25, 1.0], [0.25, 9.0], [100.0, 101.0], [102.0, 103.0]]))
    indices = torch.tensor([[1, 2], [0, 3], [3, 0], [2, 1]])
    assert (weights[2:] < torch.finfo(torch.float32).tiny).all()
    exact = dense_adjacency(indices, weights, 4)
    graph = build(name, indices, weights, num_nodes=4)
    torch.testing.assert_close(graph.to_dense().double(), exact, rtol=5e-7, atol=SMALLEST)


@each_backend
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_check_finite(name, bad):
    weights = torch.ones(3, 2)
    weights[1, 1] = bad
    with pytest.raises(ValueError, match=r"weights: expected finite values, got NaN or inf in row"):
        build(name, TRIANGLE, weights, num_nodes=3, check_finite=True)
    indices = TRIANGLE.clone()
    indices[1, 1] = -1  # knn pads with index -1 and value -inf
    graph = build(name, indices, weights, num_nodes=3, check_finite=True)
    assert graph.values.isfinite().all()
    build(name, TRIANGLE, None, num_nodes=3, check_finite=True)


@each_backend
@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 20), k=st.integers(0, 24), seed=st.integers(0, 99),
    symmetrize=st.sampled_from(["mean", "union"]), weighted=st.booleans(),
)  # fmt: skip
def test_any_lists(name, n, k, seed, symmetrize, weighted):
    indices, weights = random_lists(n, k, seed)
    weights = weights if weighted else None
    exact = dense_adjacency(indices, weights, n, symmetrize)
    graph = build(name, indices, weights, num_nodes=n, symmetrize=symmetrize)
    torch.testing.assert_close(graph.validate().to_dense().double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", backends_of("normalized_adjacency", compiled=True))
def test_result_does_not_depend_on_threads(name):
    indices, weights = random_lists(700, 40)
    first, *others = on_threads(lambda: build(name, indices, weights, num_nodes=700).tensors())
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@each_backend
def test_opcheck(name):
    indices, weights = moved(name, *random_lists(10, 4))
    with backend(name):
        for arguments in (
            (indices, weights, 10, "mean", 0.0, False),
            (indices, None, 10, "union", 0.0, True),
            (indices, weights.double() if name == "reference" else weights, 10, "union", 0.5, True),
        ):
            torch.library.opcheck(torch.ops.nefkern.normalized_adjacency, arguments)


@each_backend
def test_fullgraph_compile(name):
    indices, weights = moved(name, *random_lists(20, 4))
    compiled = torch.compile(
        lambda i, w: normalized_adjacency(i, w, num_nodes=20), fullgraph=True, backend="aot_eager"
    )
    with backend(name):
        one, two = compiled(indices, weights), normalized_adjacency(indices, weights, num_nodes=20)
    assert all(torch.equal(a, b) for a, b in zip(one.tensors(), two.tensors(), strict=True))


@each_backend
@pytest.mark.parametrize("bad", [5, -2])
def test_index_out_of_range(name, bad):
    indices = torch.tensor([[1], [2], [bad], [0], [0]], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"indices: expected -1 .* to 4"):
        build(name, indices, num_nodes=5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"indices": torch.zeros(3, 2)}, TypeError, "indices: expected int32 or int64"),
        ({"indices": torch.zeros(3, dtype=torch.int32)}, ValueError, "indices: expected shape"),
        ({"num_nodes": 4}, ValueError, r"indices: expected shape \[4, k\]"),
        ({"num_nodes": -1}, ValueError, "num_nodes: expected at least 0"),
        ({"weights": torch.ones(3, 1)}, ValueError, "weights: expected the shape"),
        ({"weights": torch.ones(3, 2).int()}, TypeError, "weights: expected floating point"),
        ({"weights": torch.ones(3, 2, device="meta")}, ValueError, "weights: expected device"),
        ({"symmetrize": "max"}, ValueError, "symmetrize: expected mean or union, got 'max'"),
        ({"clamp_min": -1.0}, ValueError, "clamp_min: expected"),
        ({"clamp_min": math.nan}, ValueError, "clamp_min: expected"),
        (
            {"weights": torch.ones(3, 2), "clamp_min": 1e39},
            ValueError,
            r"clamp_min: expected a number that float32 can hold, got 1e\+39",
        ),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {"indices": torch.zeros(3, 2, dtype=torch.int32), "num_nodes": 3} | change
    with pytest.raises(error, match=message):
        normalized_adjacency(**arguments)
