"""nefkern.ops.knn on every backend against dense float64 formulas."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nefkern import backends, ops
from tests.ops.graph_common import backend_device, backends_of, on_backend_device, on_threads

METRICS = ("cosine", "euclidean")
pytestmark = pytest.mark.usefixtures("backend")
knn = on_backend_device(ops.knn)
compiled_only = pytest.mark.parametrize("backend", backends_of("knn", compiled=True), indirect=True)
triton_only = pytest.mark.parametrize(
    "backend", [name for name in backends_of("knn") if name == "triton"], indirect=True
)


# ---- inputs ----


def clustered(n: int, channels: int, clusters: int = 12, seed: int = 0, **kwargs) -> torch.Tensor:
    """[n, channels] rows around a few centres, as image features are."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(clusters, channels, generator=generator, dtype=torch.float64)
    which = torch.randint(clusters, (n,), generator=generator)
    noise = torch.randn(n, channels, generator=generator, dtype=torch.float64)
    return (centres[which] + 0.5 * noise).to(**{"dtype": torch.float32, **kwargs})


def crowded(n: int, channels: int, spread: float = 1e-3, seed: int = 0) -> torch.Tensor:
    """Rows that differ by `spread`, an eighth of them copies: no estimate tells who is nearest."""
    generator = torch.Generator().manual_seed(seed)
    one = torch.randn(channels, generator=generator)
    x = one * (1 + spread * torch.randn(n, channels, generator=generator))
    x[torch.randperm(n, generator=generator)[: n // 8]] = x[0].clone()
    return x


def several_tiles(n: int) -> int:
    """n rows; a fifth where an interpreter takes a millisecond for each."""
    return n // 5 if interpreted() else n


def interpreted() -> bool:
    return backends.current() == "triton" and backends.interpreting()


@pytest.fixture
def narrow_tiles(backend, monkeypatch):
    """In the interpreter, half as wide tiles or less, so that a fifth of the rows fill three."""
    if interpreted():
        kernels = pytest.importorskip("nefkern.triton.knn")
        narrow = {"SELECT": 64, "RERANK": 32, "EXACT": 128, "FLAT": 1 << 13}
        for tile, width in narrow.items():
            assert 2 * width <= getattr(kernels, tile)["BN"]
            monkeypatch.setitem(getattr(kernels, tile), "BN", width)


# ---- the dense formulas ----


def dense_scores(x, metric, segments=None, include_self=False):
    """[N, N] float64, greater is better; -inf where a pair is no candidate."""
    x = x.double()
    if metric == "cosine":
        norm = x.norm(dim=1, keepdim=True)
        unit = torch.where(norm > 0, x / norm, 0.0)
        scores = unit @ unit.T
    else:
        scores = -(x[:, None] - x[None]).norm(dim=2)
    n = len(x)
    bounds = [0, n] if segments is None else segments.tolist()
    segment = torch.bucketize(torch.arange(n), torch.tensor(bounds[1:]), right=True)
    scores[segment[:, None] != segment[None]] = -math.inf
    if not include_self:
        scores.fill_diagonal_(-math.inf)
    return scores


def assert_best(x, k, metric="cosine", segments=None, include_self=False, tolerance=3e-6):
    """Run knn and judge it: values against the k-th best, then the neighbours' own values."""
    values, indices = knn(x, k, metric=metric, segments=segments, include_self=include_self)
    n = len(x)
    assert values.shape == indices.shape == (n, k)
    assert indices.dtype == torch.int32
    scores = dense_scores(x, metric, segments, include_self)
    best = scores.sort(dim=1, descending=True, stable=True).values[:, :k]
    best = torch.nn.functional.pad(best, (0, k - best.shape[1]), value=-math.inf)
    sign = 1 if metric == "cosine" else -1
    got = sign * values.double()
    scale = 1.0 if metric == "cosine" else max(1.0, *x.double().norm(dim=1).tolist(), 0.0)
    filled = best == -math.inf
    torch.testing.assert_close(got, best, atol=tolerance * scale, rtol=0)
    assert (indices[filled] == -1).all()
    assert (values[filled] == -sign * math.inf).all()
    assert ((indices[~filled] >= 0) & (indices[~filled] < n)).all()
    own = scores.gather(1, indices.long().clamp_min(0))
    torch.testing.assert_close(own[~filled], got[~filled], atol=tolerance * scale, rtol=0)
    ordered = torch.where(filled, torch.arange(n, n + k), indices.long()).sort(dim=1).values
    assert (ordered.diff(dim=1) > 0).all(), "a neighbour appears twice"
    if k > 1:
        step = got.nan_to_num(neginf=-1e30).diff(dim=1)
        assert (step <= 0).all(), "not sorted"
        tie = (step == 0) & ~filled[:, 1:]
        assert (indices.diff(dim=1)[tie] > 0).all(), "ties not in the order of the indices"
    return values, indices


def assert_identical(x, k, **options):
    """Inputs whose scores are exact in float32: the indices must be those of a stable sort."""
    values, indices = knn(x, k, **options)
    scores = dense_scores(x, **{"metric": "cosine", **options})
    best, expected = scores.sort(dim=1, descending=True, stable=True)
    best, expected = best[:, :k], expected[:, :k].masked_fill(best[:, :k] == -math.inf, -1)
    assert torch.equal(indices[:, : best.shape[1]].long(), expected)
    sign = 1 if options.get("metric", "cosine") == "cosine" else -1
    assert torch.equal(sign * values[:, : best.shape[1]], best.float())


def exact_rows(n, channels, seed=0):
    """Rows with four entries ±1: norm 2, so every cosine is an exact multiple of 1/4; many tie."""
    generator = torch.Generator().manual_seed(seed)
    where = torch.rand(n, channels, generator=generator).argsort(dim=1)[:, :4]
    signs = torch.randint(0, 2, (n, 4), generator=generator) * 2.0 - 1
    return torch.zeros(n, channels).scatter(1, where, signs)


# ---- values ----


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("include_self", [False, True])
@pytest.mark.parametrize(
    ("n", "channels", "k"),
    [(1, 3, 1), (2, 1, 1), (17, 5, 4), (64, 64, 16), (97, 33, 96), (130, 7, 200), (515, 40, 33)],
)
def test_shapes(n, channels, k, include_self, metric, poisoned_memory):
    assert_best(clustered(n, channels, seed=n), k, metric, include_self=include_self)


@pytest.mark.parametrize("metric", METRICS)
def test_several_tiles(metric):
    assert_best(clustered(several_tiles(1500), 72, seed=3), several_tiles(50), metric)


@pytest.mark.parametrize("metric", METRICS)
def test_gaussian(metric):
    """No clusters: in 72 dimensions all candidates are about equally near."""
    n = several_tiles(900)
    x = torch.randn(n, 72, generator=torch.Generator().manual_seed(1))
    assert_best(x, n // 9, metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("sizes", [(5, 0, 1, 30, 300, 2), (0,), (1,), (40, 41)])
def test_segments(sizes, metric, poisoned_memory):
    segments = torch.tensor([0, *sizes]).cumsum(0)
    for dtype in (torch.int32, torch.int64):
        x = clustered(sum(sizes), 6, seed=4)
        assert_best(x, 10, metric, segments=segments.to(dtype))
        assert_best(x, 10, metric, segments=segments.to(dtype), include_self=True)


@pytest.mark.parametrize("metric", METRICS)
def test_empty(metric):
    for segments in (None, torch.tensor([0]), torch.tensor([0, 0])):
        values, indices = knn(torch.zeros(0, 4), 3, metric=metric, segments=segments)
        assert values.shape == indices.shape == (0, 3)


@pytest.mark.parametrize("metric", METRICS)
def test_no_channels(metric):
    values, indices = knn(torch.zeros(4, 0), 2, metric=metric)
    assert (values == 0).all()
    assert indices.tolist() == [[1, 2], [0, 2], [0, 1], [0, 1]]


def test_zero_rows():
    x = clustered(300, 16, seed=5)
    x[::7] = 0
    values, indices = assert_best(x, 40)
    assert (values[::7] == 0).all()
    assert indices[0].tolist() == list(range(1, 41))


def test_negative_similarities():
    x = torch.cat([torch.ones(3, 8), -torch.ones(200, 8)]) + 0.01 * clustered(203, 8)
    assert_best(x, 150)


# ---- ties ----


@pytest.mark.parametrize("include_self", [False, True])
@pytest.mark.parametrize(("n", "channels", "k"), [(60, 5, 7), (400, 8, 50)])
def test_ties_cosine(n, channels, k, include_self):
    assert_identical(exact_rows(n, channels), k, include_self=include_self)


@pytest.mark.parametrize("include_self", [False, True])
def test_ties_cosine_over_several_tiles(include_self, narrow_tiles):
    x = exact_rows(several_tiles(1100), 70)
    assert_identical(x, several_tiles(200), include_self=include_self)


@pytest.mark.parametrize(
    ("n", "channels", "k"), [(60, 2, 7), (900, 3, 20), (700, 5, 699), (900, 40, 64)]
)
def test_ties_euclidean(n, channels, k):
    x = torch.randint(-3, 4, (n, channels), generator=torch.Generator().manual_seed(2)).float()
    assert_identical(x, k, metric="euclidean")


@pytest.mark.parametrize("metric", METRICS)
def test_all_rows_identical(metric):
    n = several_tiles(1300)
    x = torch.full((n, 64), 0.5)
    values, indices = knn(x, 30, metric=metric)
    assert (values == (1 if metric == "cosine" else 0)).all()
    expected = torch.arange(31).repeat(n, 1)
    rows = torch.arange(n)[:, None]
    expected = expected[expected != rows.where(rows < 31, 30)].view(n, 30)
    assert torch.equal(indices.long(), expected)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("spread", [0.0, 1e-7, 1e-3])
def test_more_near_ties_than_a_buffer_holds(spread, metric):
    assert_best(crowded(several_tiles(1000), 70, spread), several_tiles(60), metric)


def test_norms_over_many_magnitudes():
    """Short rows among long ones: what rounding may change is far more than they differ by."""
    n = several_tiles(1000)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    x = clustered(n, 70) * torch.logspace(-3, 3, n)[order, None]
    values, indices = knn(x, 40, metric="euclidean")
    scores = dense_scores(x, "euclidean")
    best = scores.sort(dim=1, descending=True).values[:, :40]
    torch.testing.assert_close(-values.double(), best, atol=0, rtol=1e-5)
    torch.testing.assert_close(scores.gather(1, indices.long()), best, atol=0, rtol=1e-5)


def test_duplicates_tie():
    """Copies of one row have the same computed value, whatever tile they fall into."""
    n = several_tiles(500)
    x = clustered(n, 96, seed=6).repeat(3, 1)
    values, indices = assert_best(x, 9)
    if backends.current() != "reference":  # a BLAS rounds differently at the edges of its tiles
        assert torch.equal(values[:n], values[n : 2 * n])
        first, second = indices[0, 0].item(), indices[n, 0].item()
        assert {first, second} <= {0, n, 2 * n}


# ---- hard inputs ----


@pytest.mark.parametrize("metric", METRICS)
def test_scales(metric):
    """Rows of very different size; cosine must not overflow or vanish."""
    x = clustered(200, 24, seed=7)
    assert_best(x * torch.logspace(-4, 4, 200)[:, None], 20, metric)
    if metric == "cosine":
        assert_best(x * torch.logspace(-30, 30, 200)[:, None], 20)


LARGEST, SMALLEST = torch.finfo(torch.float32).max, 2.0**-149


def assert_nearest(x, k, **options):
    """Distances right to a few roundings of their own, however small beside the entries; inf only
    beyond the largest float; order by value, then index; all other finite rows are candidates."""
    values, indices = knn(x, k, metric="euclidean", **options)
    exact = (x.double()[:, None] - x.double()[None]).norm(dim=2).fill_diagonal_(math.nan)
    best = exact.sort(dim=1).values[:, :k]  # NaN last
    close = {"rtol": 2e-6, "atol": 1.01 * SMALLEST}
    torch.testing.assert_close(values.double(), best.float().double(), **close)
    own = exact.gather(1, indices.long()).float()
    torch.testing.assert_close(own.double(), values.double(), **close)
    same = values.diff(dim=1).nan_to_num(0) == 0  # NaN: inf beside inf
    assert (values.diff(dim=1).nan_to_num(0) >= 0).all()
    assert (indices.diff(dim=1)[same] > 0).all()
    return values, indices


@pytest.mark.parametrize("channels", [2, 40])
@pytest.mark.parametrize("far", [1e10, 1e22, 1e24, 1e38, LARGEST])
def test_a_far_row_does_not_blur_the_others(far, channels):
    """No-data values: one scale for all rows would make the squares of ordinary rows vanish."""
    x = torch.zeros(4, channels)
    x[:, 0] = torch.tensor([0, 1, 5, far])
    values, indices = knn(x, 2, metric="euclidean")
    assert values[:3].tolist() == [[1, 5], [1, 4], [4, 5]]
    assert indices.tolist() == [[1, 2], [0, 2], [1, 0], [0, 1]]
    assert (values[3] == x[3, 0]).all()


def over_all_magnitudes(n, channels, seed=0):
    """[n, channels] float32, every row of a size of its own, from subnormals to the largest."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.linspace(-148, 127.9, n, dtype=torch.float64).exp2()
    rows = torch.rand(n, channels, generator=generator, dtype=torch.float64) * 2 - 1
    return (rows * size[torch.randperm(n, generator=generator), None]).float()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("channels", [1, 3, 20, 70])
def test_rows_of_all_magnitudes(channels, metric):
    x = over_all_magnitudes(several_tiles(300), channels)
    x[7] = 0
    if metric == "euclidean":
        assert_nearest(x, 25)
    else:
        assert_best(x, 25)


@pytest.mark.parametrize("channels", [5, 24])
def test_small_differences_beside_large_entries(channels):
    """Pairs that differ in small entries only; and none at all between rows that are equal."""
    x = clustered(several_tiles(200), channels, seed=16) * 1e-30
    x[:, 0] = torch.arange(len(x)) % 3
    x[3] = x[9]
    assert_nearest(x, 12)


@pytest.mark.parametrize("channels", [5, 24])
@pytest.mark.parametrize("scale", [1e-43, 1e-38, 1e-30, 1e30, 3e37])
def test_distances_at_the_ends_of_the_range(scale, channels):
    """Distances that are rounded to subnormals, where many tie, and distances that overflow."""
    assert_nearest(clustered(several_tiles(200), channels, seed=17) * scale, 12)


@pytest.mark.parametrize("channels", [3, 40])
def test_distances_beyond_the_largest_float(channels):
    """They are inf, but of rows that are there: in the order of the indices."""
    x = torch.zeros(6, channels)
    x[:, 0] = torch.tensor([-1, 1, 1, math.inf, 0, 0.5]) * LARGEST
    values, indices = knn(x, 5, metric="euclidean")
    assert indices[0].tolist() == [4, 1, 2, 5, -1]
    assert values[0].tolist() == [LARGEST, *[math.inf] * 4]
    assert indices[1].tolist() == [2, 5, 4, 0, -1]
    assert values[1].tolist() == [0, x[5, 0], LARGEST, math.inf, math.inf]
    assert (indices[3] == -1).all()


@pytest.mark.parametrize("channels", [3, 40])
def test_distances_beyond_the_largest_float_tie_whatever_they_are(channels):
    """The nearer of two that are infinite does not come first: nobody can tell by the values."""
    x = torch.zeros(several_tiles(400), channels)
    x[1:, 0] = LARGEST * torch.linspace(1, 0.1, len(x) - 1)
    x[0, 0] = -LARGEST
    values, indices = knn(x, 3, metric="euclidean")
    assert values[0].tolist() == [math.inf] * 3
    assert indices[0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("channels", [2, 20])
def test_many_rows_without_data(channels):
    """Half of the rows are one far value; more ties than a buffer holds on either side."""
    n = several_tiles(600)
    x = clustered(n, channels, seed=18)
    x[::2] = LARGEST
    assert_nearest(x, several_tiles(40))


@pytest.mark.parametrize("metric", METRICS)
def test_float64_of_all_magnitudes(metric):
    with backends.backend("auto"):
        exponents = torch.linspace(-1070, 1023, 60, dtype=torch.float64)
        x = exponents.exp2()[:, None] * torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
        values, indices = knn(x, 1, metric=metric)
        if metric == "cosine":
            torch.testing.assert_close(values, torch.ones_like(values), rtol=1e-15, atol=0)
            return
        # The nearest is the next smaller row; its distance is the difference of the lengths.
        assert indices[:, 0].tolist() == [1, *range(59)]
        a, b = x[:, 0], x[indices[:, 0].long(), 0]
        expected = (a - b).abs() * 1.25**0.5
        torch.testing.assert_close(values[:, 0], expected, rtol=1e-14, atol=2.0**-1074)


@pytest.mark.parametrize("metric", METRICS)
def test_far_from_the_origin(metric):
    """|x|² + |y|² - 2xy would lose every digit here."""
    x = 1000 + clustered(several_tiles(700), 40, seed=8)
    scores = dense_scores(x, metric)
    values, _ = knn(x, 12, metric=metric)
    best = scores.sort(dim=1, descending=True).values[:, :12]
    sign, tolerance = (1, 2e-6) if metric == "cosine" else (-1, 1e-4)
    torch.testing.assert_close(sign * values.double(), best, atol=tolerance, rtol=0)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite(bad, metric, poisoned_memory):
    x = clustered(150, 20, seed=9)
    x[3, 5] = x[77, 0] = bad
    kept = torch.ones(150, dtype=torch.bool)
    kept[[3, 77]] = False
    values, indices = knn(x, 12, metric=metric)
    assert (indices[~kept] == -1).all()
    assert values[~kept].isinf().all()
    assert not torch.isin(indices, torch.tensor([3, 77])).any()
    expected, _ = knn(x[kept], 12, metric=metric)
    torch.testing.assert_close(values[kept], expected)
    with pytest.raises(ValueError, match=r"features: expected finite values.*row 3"):
        knn(x, 12, metric=metric, check_finite=True)
    knn(x[kept], 12, metric=metric, check_finite=True)


@pytest.mark.parametrize("metric", METRICS)
def test_not_contiguous(metric):
    x = clustered(120, 40, seed=10).to(backend_device())
    expected = knn(x, 9, metric=metric)
    padded = torch.full((120, 90), math.nan, device=x.device)
    padded[:, 3:83:2] = x
    for view in (x.T.contiguous().T, padded[:, 3:83:2], x[None].expand(2, -1, -1)[1]):
        values, indices = knn(view, 9, metric=metric)
        torch.testing.assert_close(values, expected[0])
        assert torch.equal(indices, expected[1])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precisions_are_computed_in_float32(dtype, metric):
    x = clustered(260, 48, seed=11, dtype=dtype)
    values, indices = assert_best(x, 30, metric)
    assert values.dtype == torch.float32
    again, same = knn(x.float(), 30, metric=metric)
    assert torch.equal(values, again)
    assert torch.equal(indices, same)


@pytest.mark.parametrize("metric", METRICS)
def test_float64(metric):
    """Float64 goes through the reference whatever was preferred, and keeps its digits."""
    with backends.backend("auto"):
        x = clustered(200, 30, seed=12, dtype=torch.float64)
        values, _ = assert_best(x, 20, metric, tolerance=1e-13)
        assert values.dtype == torch.float64


@compiled_only
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("inputs", ["clustered", "crowded", "few channels"])
def test_results_do_not_depend_on_threads(inputs, metric):
    if backends.current() == "reference":
        x = exact_rows(1200, 40, seed=3)
    elif inputs == "crowded":
        x = crowded(1200, 40)
    else:
        x = clustered(1200, 40 if inputs == "clustered" else 7)
    (values, indices), *others = on_threads(lambda: knn(x, 40, metric=metric))
    for other in others:
        assert torch.equal(values, other[0])
        assert torch.equal(indices, other[1])


ONE_BACKEND = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@compiled_only
@settings(max_examples=60, **ONE_BACKEND)
@given(data=st.data())
def test_properties(data):
    check_properties(data)


@triton_only
@settings(max_examples=12, **ONE_BACKEND)
@given(data=st.data())
def test_properties_of_triton(data):
    check_properties(data)


def check_properties(data):
    """Any sizes, duplicates, zero rows, empty segments: exact against the stable sort."""
    sizes = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=5))
    n = sum(sizes)
    metric = data.draw(st.sampled_from(METRICS))
    channels = data.draw(st.integers(4, 12) | st.integers(17, 70))  # few, or tiles of products
    x = exact_rows(n, channels, seed=data.draw(st.integers(0, 99)))
    if n:
        x[data.draw(st.lists(st.integers(0, n - 1), max_size=3))] = 0
        copies = data.draw(st.lists(st.integers(0, n - 1), max_size=min(n, 5)))
        x[: len(copies)] = x[copies]
    stride = data.draw(st.integers(1, 2))
    x = x.repeat_interleave(stride, dim=1)[:, ::stride]
    assert_identical(
        x,
        data.draw(st.integers(1, n + 2)),
        metric=metric,
        segments=torch.tensor([0, *sizes]).cumsum(0),
        include_self=data.draw(st.booleans()),
    )


@compiled_only
@settings(max_examples=30, **ONE_BACKEND)
@given(data=st.data())
def test_properties_of_crowded_rows(data):
    """A few distinct rows, many copies: the k-th best ties with more rows than a buffer holds."""
    n, distinct = data.draw(st.integers(200, 500)), data.draw(st.integers(1, 4))
    seed = data.draw(st.integers(0, 99))
    rows = exact_rows(distinct, data.draw(st.integers(17, 40)), seed=seed)
    rows[0] *= data.draw(st.sampled_from([0, 1]))
    generator = torch.Generator().manual_seed(seed)
    assert_identical(
        rows[torch.randint(distinct, (n,), generator=generator)],
        data.draw(st.integers(1, 30) | st.integers(1, n)),
        metric=data.draw(st.sampled_from(METRICS)),
        segments=torch.tensor([0, data.draw(st.integers(0, 2) | st.integers(0, n)), n]),
        include_self=data.draw(st.booleans()),
    )


# ---- the ways through the Triton kernels ----


def triton_methods():
    from nefkern.ops.knn import TRITON_METHODS

    return pytest.mark.parametrize("method", TRITON_METHODS[1:])


@triton_only
@pytest.mark.parametrize("metric", METRICS)
@triton_methods()
@pytest.mark.parametrize(("sizes", "channels", "k"), [((1,), 1, 2), ((70, 0, 1, 150), 20, 9)])
def test_both_ways(sizes, channels, k, method, metric, monkeypatch, poisoned_memory):
    """Whatever way a call would choose: both take all shapes, and a block of rows at a time."""
    kernels = pytest.importorskip("nefkern.triton.knn")
    monkeypatch.setenv("NEFKERN_KNN_TRITON", method)
    monkeypatch.setattr(kernels, "WORKSPACE", 0)
    segments = torch.tensor([0, *sizes]).cumsum(0)
    x = clustered(sum(sizes), channels, seed=13)
    assert_best(x, k, metric, segments=segments)
    x = exact_rows(sum(sizes), max(channels, 4))
    assert_identical(x, k, metric=metric, segments=segments)


@triton_only
@triton_methods()
@pytest.mark.parametrize("scale", [1.0, 1e-40])
def test_both_ways_over_all_magnitudes(method, scale, monkeypatch):
    monkeypatch.setenv("NEFKERN_KNN_TRITON", method)
    assert_nearest((over_all_magnitudes(80, 24) * scale), 9)
    monkeypatch.setattr(pytest.importorskip("nefkern.triton.knn"), "_capacity", lambda k, *_: k)
    assert_nearest(over_all_magnitudes(80, 24), 9)


@triton_only
@triton_methods()
def test_the_method_asked_for_runs(method, monkeypatch):
    """No product on tensor cores, or one for every block, whatever a call would choose."""
    kernels = pytest.importorskip("nefkern.triton.knn")
    estimated = []
    pack = kernels.pack
    monkeypatch.setattr(kernels, "pack", lambda *args: estimated.append(1) or pack(*args))
    monkeypatch.setenv("NEFKERN_KNN_TRITON", method)
    for channels, k in ((40, 3), (3, 3), (40, 100)):
        knn(clustered(120, channels), k)
    assert len(estimated) == (3 if method == "preselect" else 0)


@triton_only
def test_a_method_that_is_none(monkeypatch):
    monkeypatch.setenv("NEFKERN_KNN_TRITON", "tf32")
    with pytest.raises(ValueError, match="NEFKERN_KNN_TRITON=tf32: expected one of auto, ieee, pr"):
        knn(clustered(20, 4), 3)


@triton_only
@triton_methods()
@pytest.mark.parametrize("k", [1024, 1300])
def test_k_of_nearly_all_and_of_more_than_there_are(k, method, narrow_tiles, monkeypatch):
    """Of 1,200 candidates; ties to the lower index."""
    monkeypatch.setenv("NEFKERN_KNN_TRITON", method)
    n = several_tiles(1200)
    assert_identical(exact_rows(n, 20), several_tiles(k) if k < 1200 else k)


@triton_only
def test_k_of_a_thousand_and_more(monkeypatch):
    """More than 1,024 keys a row, and indices above 1,024, at their full size everywhere."""
    monkeypatch.setenv("NEFKERN_KNN_TRITON", "ieee")  # the estimates would take four times as long
    assert_identical(exact_rows(1200, 20), 1300)


@triton_only
@pytest.mark.parametrize("metric", METRICS)
def test_rows_that_overflow_are_exact(metric, monkeypatch):
    """No room for any candidate that estimates leave in doubt: some rows fit, others don't."""
    kernels = pytest.importorskip("nefkern.triton.knn")
    monkeypatch.setattr(kernels, "_capacity", lambda k, longest, preselect: k)
    x = clustered(200, 40, seed=14)
    x[100:] = x[0]  # 100 ties
    assert_best(x, 12, metric)


@triton_only
@pytest.mark.parametrize("metric", [*METRICS, "inner_product"])
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e20])
def test_margin_holds(metric, scale):
    """No estimate is further from the truth than its margin, and the margin is not far larger.

    On a GPU the scores are those of its tensor cores.
    """
    kernels = pytest.importorskip("nefkern.triton.knn")
    x = (scale * (3 + clustered(150, 90, seed=15))).to(backend_device())
    data = kernels.rows_of(x, metric, kernels.Ranges([0, 150]))
    packed = kernels.pack(data, 90)
    scores = data.rows.new_empty(256, 256)
    kernels.tuned_score[lambda tile: kernels.grid_of(150, 1, tile)](
        packed.rows, packed.others, packed.offsets, packed.other_offsets, data.begins, data.ends,
        scores, 0, 150, 150, 2, 1, INCLUDE_SELF=True,
    )  # fmt: skip
    y = data.rows.double() * data.scale
    if metric == "inner_product":  # a query in its own unit, the candidates in a common one
        truth = y @ (y * 2.0 ** (data.exponents - data.exponents.max())[:, None].double()).T
    else:
        truth = y @ y.T if metric == "cosine" else -0.5 * (y[:, None] - y[None]).square().sum(2)
    error = (scores[:150, :150].double() - truth).abs().amax(1)
    assert (error <= packed.margins).all()
    assert (packed.margins <= 100 * error).all()


# ---- memory ----


@compiled_only
def test_memory_stays_far_below_n_squared(backend):
    """Peak memory of a process that runs N = 9,000: the N x N scores alone would be 324 MB."""
    device = backend_device(backend)
    peak = {
        "cpu": "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024",
        "cuda": "torch.cuda.max_memory_allocated() >> 20",
    }[device]
    script = f"""
import resource, torch
from nefkern.ops import knn
x = torch.randn(9000, 24, device="{device}")
knn(x[:900], 20)
peak = lambda: {peak}
before = peak()
knn(x, 20)
knn(torch.ones_like(x), 20)
print(peak() - before)
"""
    done = run_script(script, NEFKERN_BACKEND=backend)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100


# ---- instruction sets ----


@pytest.mark.long
@compiled_only
@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512", "avx512bf16"])
def test_instruction_sets(level, backend):
    """Every compiled level that this processor has, through the tests above that tell most; the
    suite itself runs the best."""
    if backend != "cpu":
        pytest.skip("only the compiled kernels have levels")
    if level == backends.native_module().build_info()["isa"]:
        pytest.skip("the suite itself runs it")
    database = Path(__file__).with_name("test_knn_database.py")
    script = f"""
import pytest, sys
from nefkern import backends
if backends.native_module().build_info()["isa"] != "{level}":
    sys.exit(77)
tests = "shapes or ties or segments or scales or not_finite or far or identical or magnitudes"
sys.exit(pytest.main(["-x", "-p", "no:cacheprovider", "-k", f"cpu and ({{tests}})",
                      r"{Path(__file__)}", r"{database}"]))
"""
    done = run_script(script, NEFKERN_ISA=level)
    if done.returncode == 77:
        pytest.skip(f"this processor has no {level}")
    assert done.returncode == 0, done.stdout + done.stderr


def run_script(script, **environment):
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )


# ---- the dispatcher ----


@pytest.mark.parametrize("segments", [None, torch.tensor([0, 20, 20, 50])])
def test_opcheck(segments):
    x = clustered(50, 8).to(backend_device())
    segments = None if segments is None else segments.to(backend_device())
    arguments = (x, 5, "cosine", segments, False, False, None, None)
    torch.library.opcheck(torch.ops.nefkern.knn.default, arguments)


def test_compile_fullgraph():
    def graph(x, segments):
        values, indices = ops.knn(x * 2, 5, segments=segments)
        return values.clamp_min(0), indices + 1

    compiled = torch.compile(graph, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (40, 64):
        x, segments = (t.to(backend_device()) for t in (clustered(n, 8), torch.tensor([0, 20, n])))
        for got, expected in zip(compiled(x, segments), graph(x, segments), strict=True):
            assert torch.equal(got, expected)


def test_not_differentiable_and_says_so():
    x = clustered(30, 8).requires_grad_()
    values, indices = knn(x, 4)
    assert not indices.requires_grad
    with pytest.raises(RuntimeError, match=r"knn is not differentiable.*detach"):
        values.sum().backward()
    (x.sum() + knn(x.detach(), 4)[0].sum()).backward()


# ---- bad input ----

X = torch.zeros(6, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("x", 2), {}, TypeError, "features: expected a torch.Tensor, got str"),
        ((X.to_sparse(), 2), {}, TypeError, "features: expected a dense tensor, got torch.sparse"),
        ((X[0], 2), {}, ValueError, r"features: expected shape \[N, C\], got \[3\]"),
        ((X.int(), 2), {}, TypeError, "features: expected one of float16, .*, got int32"),
        ((X, 0), {}, ValueError, "k: expected at least 1, got 0"),
        ((X, 2.0), {}, TypeError, "k: expected an int, got float"),
        ((X, 2), {"metric": "dot"}, ValueError, "metric: expected 'cosine' or .*, got 'dot'"),
        ((X, 2), {"segments": [0, 6]}, TypeError, "segments: expected a torch.Tensor, got list"),
        ((X, 2), {"segments": X[0]}, TypeError, "segments: expected one of int32.*got float32"),
        ((X, 2), {"segments": (0, 5)}, ValueError, "segments: .* from 0 to 6, got 0 to 5"),
        ((X, 2), {"segments": (1, 6)}, ValueError, "segments: .* from 0 to 6, got 1 to 6"),
        ((X, 2), {"segments": ()}, ValueError, "segments: .* got no offsets"),
        ((X, 2), {"segments": (0, 4, 2, 6)}, ValueError, "got 2 after 4 at position 2"),
    ],
)
def test_bad_input(arguments, options, error, message):
    if isinstance(options.get("segments"), tuple):
        options = {"segments": torch.tensor(options["segments"], dtype=torch.int64)}
    with pytest.raises(error, match=message):
        knn(*arguments, **options)
