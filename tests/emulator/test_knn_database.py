"""csrc/cuda/knn.cu on the processor: neighbours in a database, and by inner product."""

from __future__ import annotations

import numpy as np
import pytest

from tests.emulator.test_knn import (
    METRICS,
    WAYS,
    assert_best,
    assert_identical,
    assert_same,
    exact_rows,
    knn,
    normal,
)

pytestmark = pytest.mark.long

__all__ = ["knn"]  # a fixture
LARGEST = float(np.finfo(np.float32).max)
metrics = pytest.mark.parametrize("metric", METRICS)


@metrics
@pytest.mark.parametrize(
    ("n", "m", "channels", "k"),
    [(0, 3, 5, 2), (3, 0, 5, 2), (3, 0, 40, 2), (1, 1, 1, 1), (1, 37, 40, 2), (37, 1, 33, 3),
     (2, 37, 0, 2), (20, 37, 16, 40), (140, 33, 33, 4), (33, 150, 70, 40)],
)  # fmt: skip
def test_shapes(knn, n, m, channels, k, metric):
    x, y = normal(n, channels, seed=n), normal(m, channels, seed=m + 1)
    got = knn(x, k, metric, database=y, order="random")
    assert_best(got, x, k, metric, database=y)


@metrics
def test_several_tiles(knn, metric):
    """Chunks of queries, tiles of candidates, the last of either ragged; never a mirrored one."""
    x, y = normal(150, 33), normal(300, 33, seed=1)
    options = {"database": y, "order": "forward"}
    fused = knn(x, 12, metric, method="fused", **options)
    assert 0 <= fused[2] < 10, "estimates decided hardly any row"
    assert_best(fused, x, 12, metric, database=y)
    assert_same(fused, knn(x, 12, metric, method="baseline", **options))


@metrics
@WAYS
def test_the_rows_themselves_as_a_database(knn, channels, method, metric):
    """The same values to the last bit, and a row is its own neighbour."""
    x = normal(70, channels)
    values, indices, _ = knn(x, 7, metric, database=x, method=method, order="forward")
    own = knn(x, 7, metric, include_self=True, method=method, order="forward")
    np.testing.assert_array_equal(values, own[0])
    np.testing.assert_array_equal(indices, own[1])


@metrics
@WAYS
def test_segments(knn, channels, method, metric):
    """Empty ones on either side; a tile of queries whose candidates are many tiles."""
    segments = {
        "segments": [0, 0, 1, 50, 50, 52, 140, 140, 141],
        "database_segments": [0, 9, 300, 340, 350, 350, 351, 360, 500],
    }
    x, y = normal(141, channels), normal(500, channels, seed=1)
    got = knn(x, 4, metric, database=y, method=method, order="reverse", **segments)
    assert_best(got, x, 4, metric, database=y, **segments)
    assert (got[1][50:52] == -1).all()


@metrics
@WAYS
def test_ties_go_to_the_lower_index(knn, channels, method, metric):
    rows = exact_rows(110, channels)
    rows[60:65] = rows[3]
    rows[::17] = 0
    x, y = rows[:30], rows[30:]
    got = knn(x, 8, metric, database=y, method=method, order="random")
    assert_identical(got, x, 8, metric, database=y)


@metrics
def test_equal_candidates_overflow_and_are_redone(knn, metric):
    x, y = np.full((20, 33), 0.5), np.full((140, 33), 0.5)
    got = knn(x, 8, metric, database=y, method="fused", order="forward")
    assert got[2] == 20
    np.testing.assert_array_equal(got[1], np.arange(8) + np.zeros((20, 1), dtype=int))


@metrics
@WAYS
def test_not_finite_and_zero_rows(knn, channels, method, metric):
    x, y = normal(20, channels), normal(90, channels, seed=1)
    x[7, 0], y[30, 4], y[31, 1] = np.nan, np.inf, -np.inf
    x[3] = y[[2, 40]] = 0
    values, indices, _ = knn(x, 7, metric, database=y, method=method, order="forward")
    assert (indices[7] == -1).all()
    assert (values[7] == (np.inf if metric == "euclidean" else -np.inf)).all()
    assert not np.isin(indices, [30, 31]).any()
    kept, there = np.delete(np.arange(20), 7), np.delete(np.arange(90), [30, 31])
    renumbered = np.full(90, -1)
    renumbered[there] = np.arange(88)
    got = values[kept], renumbered[indices[kept]], 0
    assert_best(got, x[kept], 7, metric, database=y[there])


@pytest.mark.parametrize("channels", [6, 33])
def test_many_neighbours_take_several_passes(knn, channels):
    rows = exact_rows(60, channels)
    x, y = rows[:10], rows[10:]
    for k in (23, 50, 60):
        got = knn(x, k, "cosine", database=y, keep=8, order="forward")
        assert_identical(got, x, k, "cosine", database=y)


# ---- inner products ----


def assert_products(got, x, y, k):
    """Each right to a few roundings of |x| |y|, infinite beyond the largest float, in order; and
    nobody who was left out is surely better than the last."""
    values, indices, _ = got
    x, y = x.astype(np.float64), y.astype(np.float64)
    exact = x @ y.T
    allowed = 3e-6 * np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(y, axis=1) + 2.0**-148
    own, slack = (np.take_along_axis(z, indices, 1) for z in (exact, allowed))
    found = np.clip(values.astype(np.float64), -(2.0**128), 2.0**128)
    beyond = np.isinf(values) & (np.sign(own) == np.sign(values))
    beyond &= np.abs(own) > (1 - 1e-5) * LARGEST
    assert ((np.abs(found - own) <= slack) | beyond).all()
    assert (values[:, 1:] <= values[:, :-1]).all()
    assert (np.diff(indices)[values[:, 1:] == values[:, :-1]] > 0).all()
    left_out = np.ones_like(exact, dtype=bool)
    np.put_along_axis(left_out, indices, False, 1)
    better = (exact - allowed > found[:, -1:] + slack[:, -1:]) & (values[:, -1:] < LARGEST)
    assert not (better & left_out).any()


def over_all_magnitudes(n, channels, seed):
    random = np.random.default_rng(seed)
    size = np.exp2(random.permutation(np.linspace(-140, 126, n)))
    return (random.uniform(-1, 1, (n, channels)) * size[:, None]).astype(np.float32)


@WAYS
def test_products_over_all_magnitudes(knn, channels, method):
    x, y = over_all_magnitudes(30, channels, 1), over_all_magnitudes(140, channels, 2)
    got = knn(x, 9, "inner_product", database=y, method=method, order="forward")
    assert_products(got, x, y, 9)
    small = y[::3] * np.float32(1e-30)
    got = knn(x, 9, "inner_product", database=small, method=method, order="forward")
    assert_products(got, x, small, 9)
    got = knn(y, 9, "inner_product", method=method, include_self=True, order="forward")
    assert_products(got, y, y, 9)


@WAYS
def test_products_beyond_the_largest_float(knn, channels, method):
    """They are ±inf, in the order of the indices; none is NaN, whatever overflows on the way."""
    y = np.zeros((150, channels), dtype=np.float32)
    y[:, 0] = np.linspace(0.1, 1, 150) * LARGEST
    y[-1] = -y[-2]
    x = np.zeros((3, channels), dtype=np.float32)
    x[:, 0] = [8, -8, 2.0**-100]
    values, indices, _ = knn(x, 5, "inner_product", database=y, method=method, order="forward")
    first = int((y[:, 0].astype(np.float64) * 8 > LARGEST).nonzero()[0][0])
    assert indices[0].tolist() == list(range(first, first + 5))
    assert (values[0] == np.inf).all()
    assert indices[1].tolist() == [149, 0, 1, 2, 3]
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(values[1], np.float32(-8) * y[indices[1], 0])
    assert indices[2].tolist() == [148, 147, 146, 145, 144]
    rows = np.zeros((140, channels), dtype=np.float32)
    rows[:, 0] = -LARGEST
    values, indices, _ = knn(-rows[:2], 6, "inner_product", database=rows, method=method)
    assert (values == -np.inf).all()
    assert (indices == np.arange(6)).all()


def test_products_of_far_queries_are_estimated_as_well(knn):
    """A query's own power of two is taken out: its size beside the candidates' is of no account."""
    x, y = normal(40, 33) * np.float32(1e25), normal(260, 33, seed=1) * np.float32(1e-20)
    x[::2] *= np.float32(1e-40)
    fused = knn(x, 6, "inner_product", database=y, method="fused", order="forward")
    assert 0 <= fused[2] < 4
    assert_products(fused, x, y, 6)
