"""csrc/cuda/knn.cu on the processor: launcher and kernels against the float64 reference."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from nefkern import reference
from tests.emulator import emulated

pytestmark = pytest.mark.long

METRICS = ("cosine", "euclidean", "inner_product")  # the order of KnnMetric
METHODS = ("auto", "baseline", "fused")  # the order of KnnMethod
# Small enough that blocks of rows, chunks and passes have several of them in a small input.
TUNING = {
    "score_bytes": 1 << 16, "fused_share": 8, "chunk_rows": 128, "sample_share": 2, "keep": 2048,
    "tile_side": 2,
}  # fmt: skip


@pytest.fixture
def knn(tmp_path):
    return functools.partial(run_knn, tmp_path)


def run_knn(
    folder, x, k, metric="cosine", *, method="auto", segments=None, include_self=False,
    database=None, database_segments=None, order=None, **tuning,
):  # fmt: skip
    """Values, indices [n, k], and how many rows of the last chunk estimates left open.

    All thread orders (or one) under the sanitizers; one under the race check, which sees what is
    not ordered in any of them.
    """
    x = np.ascontiguousarray(x, dtype=np.float32)
    n, channels = x.shape
    offsets = np.array([0, n] if segments is None else segments, dtype=np.int64)
    inputs = {"features": x, "offsets": offsets}
    if database is not None:
        bounds = [0, len(database)] if database_segments is None else database_segments
        inputs["database"] = np.ascontiguousarray(database, dtype=np.float32)
        inputs["database_offsets"] = np.array(bounds, dtype=np.int64)
    arguments = {
        "inputs": inputs,
        "outputs": {"values": np.float32, "indices": np.int32, "redone": np.int32},
        "n": n, "channels": channels, "segments": len(offsets) - 1, "k": k,
        "metric": METRICS.index(metric), "include_self": int(include_self),
        "method": METHODS.index(method), **TUNING, **tuning,
    }  # fmt: skip
    chosen = {"order": order} if order else {}
    got = emulated.run("knn", "knn", folder, **arguments, **chosen, variants=("checked",))
    same = emulated.run("knn", "knn", folder, **arguments, variants=("races",), order="reverse")
    for name, array in got.items():
        assert array.tobytes() == same[name].tobytes(), name
    return got["values"].reshape(n, k), got["indices"].reshape(n, k), int(got["redone"][0])


def expected(
    x, k, metric="cosine", segments=None, include_self=False, database=None, database_segments=None
):
    x, y = (
        None if rows is None else torch.from_numpy(np.asarray(rows, dtype=np.float64))
        for rows in (x, database)
    )
    values, indices = reference.knn(x, k, metric, segments, include_self, y, database_segments)
    return values.numpy(), indices.numpy()


def assert_best(got, x, k, metric="cosine", *, tolerance=2e-6, **options):
    """Values near the k best in float64; the neighbours' own values, in order, ties by index."""
    values, indices, _ = got
    best, _ = expected(x, k, metric, **options)
    if metric == "inner_product":  # right to the rounding of |x| |y|
        others = x if options.get("database") is None else options["database"]
        lengths = [np.linalg.norm(rows, axis=1).max(initial=0) for rows in (x, others)]
        tolerance = max(tolerance * lengths[0] * lengths[1], 1e-30)
    np.testing.assert_allclose(values, best, atol=tolerance, rtol=2e-6)
    missing = np.isinf(best)
    np.testing.assert_array_equal(indices == -1, missing)
    count = len(x if options.get("database") is None else options["database"])
    own, where = expected(x, count, metric, **options)
    for i in range(len(x)):
        by_index = dict(zip(where[i], own[i], strict=True))
        neighbours = indices[i][~missing[i]]
        assert len(set(neighbours)) == len(neighbours)
        np.testing.assert_allclose(
            [by_index[j] for j in neighbours], best[i][~missing[i]], atol=tolerance, rtol=2e-6
        )
    tied = (values[:, 1:] == values[:, :-1]) & ~missing[:, 1:]
    assert (np.diff(indices)[tied] > 0).all()


def assert_identical(got, x, k, metric, **options):
    """Inputs whose values are exact in float32."""
    values, indices = expected(x, k, metric, **options)
    np.testing.assert_array_equal(got[1], indices)
    np.testing.assert_array_equal(got[0], values.astype(np.float32))


def assert_same(got, other):
    np.testing.assert_array_equal(got[0], other[0])
    np.testing.assert_array_equal(got[1], other[1])


def normal(n, channels, seed=0):
    return np.random.default_rng(seed).standard_normal((n, channels), dtype=np.float32)


def exact_rows(n, channels, seed=0):
    """Four entries of ±1 a row: every cosine is a multiple of 1/4 and every distance has ties."""
    random = np.random.default_rng(seed)
    x = np.zeros((n, channels), dtype=np.float32)
    for row in x:
        row[random.permutation(channels)[:4]] = random.choice([-1, 1], 4)
    return x


# ---- every kernel, ragged sizes ----


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("n", "channels", "k"),
    [(0, 3, 2), (1, 5, 1), (1, 40, 2), (2, 1, 1), (3, 0, 2), (37, 5, 4), (37, 16, 40), (37, 33, 4),
     (33, 70, 40)],
)  # fmt: skip
def test_shapes(knn, n, channels, k, metric):
    x = normal(n, channels, seed=n)
    for include_self in (False, True):
        got = knn(x, k, metric, include_self=include_self)
        assert_best(got, x, k, metric, include_self=include_self)


@pytest.mark.parametrize("metric", METRICS)
def test_several_tiles(knn, metric):
    """Two chunks of rows, three tiles of columns, the last ragged; mirrored tiles and not."""
    x = normal(260, 33)
    order = "random" if metric == "cosine" else "forward"
    fused = knn(x, 12, metric, method="fused", order=order)
    assert 0 <= fused[2] < 10, "estimates decided hardly any row"
    assert_best(fused, x, 12, metric)
    assert_same(fused, knn(x, 12, metric, method="baseline", order="forward"))


@pytest.mark.parametrize("method", ["baseline", "fused"])
@pytest.mark.parametrize("channels", [5, 33])
def test_segments(knn, channels, method):
    segments = [0, 0, 1, 50, 50, 52, 140]
    x = normal(140, channels)
    got = knn(x, 4, "euclidean", segments=segments, method=method)
    assert_best(got, x, 4, "euclidean", segments=segments)


@pytest.mark.parametrize(("n", "k"), [(7, 8), (7, 200), (7, 300), (3, 820), (3, 1000)])
def test_rerank_of_rows_that_share_candidates(knn, n, k):
    """Groups of four rows, the last with one missing, and beyond 819 neighbours of one row."""
    y = normal(1200, 33, seed=1)
    x = y[0] + 0.5 * normal(n, 33)
    x[2] = np.nan
    options = {"database": y, "fused_share": 1, "order": "forward"}
    fused = knn(x, k, "euclidean", method="fused", **options)
    assert 0 <= fused[2] <= 1
    assert_same(fused, knn(x, k, "euclidean", method="baseline", **options))
    assert (fused[1][2] == -1).all()


# ---- ties, and rows that estimates cannot decide ----


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("channels", "method"), [(8, "auto"), (40, "baseline"), (40, "fused")])
def test_ties_go_to_the_lower_index(knn, channels, method, metric):
    x = exact_rows(70, channels)
    x[20:25] = x[3]
    x[::17] = 0
    include_self = metric == "cosine"
    got = knn(x, 8, metric, method=method, include_self=include_self, order="random")
    assert_identical(got, x, 8, metric, include_self=include_self)


@pytest.mark.parametrize("metric", METRICS)
def test_equal_rows_overflow_and_are_redone(knn, metric):
    x = np.full((140, 33), 0.5, dtype=np.float32)
    got = knn(x, 8, metric, method="fused", order="forward")
    assert got[2] == 140 - 128, "the last chunk has all of its rows on the list"
    places = np.arange(9) + np.zeros((140, 1), dtype=int)
    rows = np.arange(140)[:, None]
    np.testing.assert_array_equal(got[1], places[places != np.minimum(rows, 8)].reshape(140, 8))


@pytest.mark.parametrize("metric", METRICS)
def test_estimates_cannot_tell_near_copies_apart(knn, metric):
    """Differences below float16's: only the margin keeps the candidates that decide."""
    x = normal(10, 40).repeat(10, axis=0)
    x *= 1 + 1e-4 * normal(100, 40, seed=1)
    fused = knn(x, 7, metric, method="fused", order="reverse")
    assert fused[2] < 100
    assert_same(fused, knn(x, 7, metric, method="baseline", order="reverse"))
    assert_best(fused, x, 7, metric, tolerance=1e-6)


def test_a_full_list_of_a_tile(knn):
    """More candidates in one tile than its list in shared memory has room for."""
    x = np.ones((128, 17), dtype=np.float32)
    got = knn(x, 16, "cosine", method="fused", include_self=True)
    np.testing.assert_array_equal(got[1], np.arange(16) + np.zeros((128, 1), dtype=int))


# ---- values that are not ordinary ----


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("channels", "method"), [(5, "auto"), (33, "baseline"), (33, "fused")])
def test_not_finite_and_zero_rows(knn, channels, method, metric):
    x = normal(60, channels)
    x[7, 0], x[30, 4], x[31, 1] = np.nan, np.inf, -np.inf
    x[[2, 40]] = 0
    values, indices, _ = knn(x, 7, metric, method=method)
    bad = [7, 30, 31]
    kept = np.setdiff1d(np.arange(60), bad)
    assert (indices[bad] == -1).all()
    assert (values[bad] == (np.inf if metric == "euclidean" else -np.inf)).all()
    assert not np.isin(indices, bad).any()
    renumbered = np.full(60, -1)
    renumbered[kept] = np.arange(57)
    assert_best((values[kept], renumbered[indices[kept]], 0), x[kept], 7, metric)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("metric", METRICS)
def test_scales(knn, metric, scale):
    x = normal(40, 33)
    if metric == "inner_product":
        scale = scale**0.5  # its square is the products'
    values, indices, _ = knn(x * np.float32(scale), 4, metric, method="fused", order="forward")
    if metric != "cosine":
        unit = scale if metric == "euclidean" else scale**2
        values = (values / np.float64(unit)).astype(np.float32)
    assert_best((values, indices, 0), x, 4, metric)


WAYS = pytest.mark.parametrize(
    ("channels", "method"), [(5, "auto"), (33, "baseline"), (33, "fused")]
)


def assert_nearest(got, x, k):
    """Distances right to a few roundings of their own, and in order."""
    values, indices, _ = got
    x = x.astype(np.float64)
    exact = np.sqrt(((x[:, None] - x[None]) ** 2).sum(2))
    np.fill_diagonal(exact, np.nan)
    with np.errstate(over="ignore"):
        best = np.sort(exact, axis=1)[:, :k].astype(np.float32)
        own = np.take_along_axis(exact, indices, 1).astype(np.float32)
    np.testing.assert_allclose(values, best, rtol=2e-6, atol=1.01 * 2.0**-149)
    np.testing.assert_allclose(own, values, rtol=2e-6, atol=1.01 * 2.0**-149)
    assert (values[:, 1:] >= values[:, :-1]).all()
    assert (np.diff(indices)[values[:, 1:] == values[:, :-1]] > 0).all()


@WAYS
def test_a_far_row_does_not_blur_the_others(knn, channels, method):
    x = np.zeros((24, channels), dtype=np.float32)
    x[:, 0] = [0, 1, 5, 1e24, *np.arange(20) * 1e20 + 1e22]
    values, indices, _ = knn(x, 2, "euclidean", method=method)
    assert values[:3].tolist() == [[1, 5], [1, 4], [4, 5]]
    assert indices[:3].tolist() == [[1, 2], [0, 2], [1, 0]]
    assert (indices[3] == [23, 22]).all()


@WAYS
def test_distances_beyond_the_largest_float_tie_whatever_they_are(knn, channels, method):
    largest = np.finfo(np.float32).max
    x = np.zeros((140, channels), dtype=np.float32)
    x[1:, 0] = largest * np.linspace(1, 0.1, 139, dtype=np.float32)
    x[0, 0] = -largest
    values, indices, _ = knn(x, 3, "euclidean", method=method)
    assert values[0].tolist() == [np.inf] * 3
    assert indices[0].tolist() == [1, 2, 3]


@WAYS
def test_rows_of_all_magnitudes(knn, channels, method):
    random = np.random.default_rng(1)
    size = np.exp2(random.permutation(np.linspace(-148, 127.9, 50)))
    x = (random.uniform(-1, 1, (50, channels)) * size[:, None]).astype(np.float32)
    x[[4, 30]] = np.finfo(np.float32).max
    x[5] = -x[4]
    assert_nearest(knn(x, 6, "euclidean", method=method), x, 6)
    x *= np.float32(2.0**-126)  # all subnormal: distances are rounded, and tie
    assert_nearest(knn(x, 6, "euclidean", method=method), x, 6)


def test_far_from_the_origin(knn):
    x = 1000 + normal(60, 33)
    assert_best(knn(x, 6, "euclidean", method="fused"), x, 6, "euclidean")


# ---- any k ----


@pytest.mark.parametrize("channels", [6, 33])
def test_many_neighbours_take_several_passes(knn, channels):
    x = exact_rows(50, channels)
    for k in (23, 24, 60):
        got = knn(x, k, "cosine", keep=8)
        assert_identical(got, x, k, "cosine")


@pytest.mark.parametrize("channels", [5, 20])
@pytest.mark.parametrize("k", [10, 64, 65, 300, 600])
def test_selection_of_long_streams(knn, channels, k):
    """Several chunks, full buffers, and ties that go on across warps and chunks."""
    random = np.random.default_rng(k)
    database = random.integers(-2, 3, (2300, channels)).astype(np.float32)
    database[:, 4:] = 0  # 625 rows that differ
    database[700:1900] = database[3]
    x = database[3:6].copy()
    database[random.integers(0, 2300, 9)] = np.nan
    got = knn(x, k, "inner_product", database=database, method="baseline", order="random")
    bad = np.isnan(database).any(axis=1)
    products = np.where(bad, -np.inf, x.astype(np.float64) @ np.nan_to_num(database).T)
    best = np.argsort(-products, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(got[1], best)
    np.testing.assert_array_equal(got[0], np.take_along_axis(products, best, 1))
    # Ever better candidates: every chunk displaces the last.
    rising = np.zeros((2300, channels), dtype=np.float32)
    rising[:, 0] = np.arange(2300)
    one = np.ones((1, channels), dtype=np.float32)
    got = knn(one, k, "inner_product", database=rising, method="baseline", order="forward")
    np.testing.assert_array_equal(got[1][0], 2299 - np.arange(k))


@pytest.mark.parametrize("k", [1024, 2048])
def test_selection_of_many(knn, k):
    """More than a quarter of the candidates, whose values fall, rise, and tie."""
    places = np.arange(5000)
    database = np.zeros((5000, 5), dtype=np.float32)
    database[:, 0] = np.where(places < 2500, -places, places // 3)
    one = np.ones((1, 5), dtype=np.float32)
    got = knn(one, k, "inner_product", database=database, order="random")
    best = np.argsort(-database[:, 0], kind="stable")[:k]
    np.testing.assert_array_equal(got[1][0], best)
    np.testing.assert_array_equal(got[0][0], database[best, 0])


# ---- values ----


@pytest.mark.parametrize("method", ["baseline", "fused"])
def test_the_sum_of_a_value_is_a_tree(knn, method):
    """Terms too small to move a sum of 1 move it together: one chain of all would lose them all."""
    channels, small = 1024, 0.9 * 2.0**-24
    x = np.full((40, channels), 2.0**-13, dtype=np.float32)
    y = np.full((40, channels), small * 2.0**13, dtype=np.float32)
    x[:, 0] = 1
    y[:, 0] = 1 + np.arange(40) / 64
    values, _, redone = knn(x, 4, "inner_product", database=y, method=method, order="forward")
    assert redone == (0 if method == "fused" else -1)
    exact = y[:-5:-1, 0] + (channels - 1) * small
    bound = 32 + channels / 32 + 8
    assert np.abs(values / exact - 1).max() <= bound * 2.0**-24 < (channels - 1) * small / 2


# ---- the order of tiles ----


@pytest.mark.parametrize(
    ("rows", "columns", "first_own", "mirrored"),
    [(1, 1, 0, 1), (5, 5, 0, 1), (7, 7, 0, 1), (3, 9, 4, 1), (3, 9, 6, 1), (4, 9, 0, 0),
     (9, 4, 0, 0), (1, 7, 0, 0)],
)  # fmt: skip
@pytest.mark.parametrize("side", [1, 2, 4, 16])
def test_every_tile_is_taken_once(tmp_path, rows, columns, first_own, mirrored, side):
    taken = tile_order(tmp_path, rows, columns, first_own, mirrored, side)
    wanted = [
        (r, c) for r in range(rows) for c in range(columns)
        if not (mirrored and first_own <= c < first_own + r)
    ]  # fmt: skip
    assert sorted(taken) == wanted


def test_tiles_that_are_near_in_time_share_their_rows(tmp_path):
    """256 tiles one after the other, as many as are under way, read about 32 tiles of rows."""
    taken = tile_order(tmp_path, 100, 100, 0, 1, 16)
    assert len(taken) == 100 * 101 // 2
    for first in range(0, len(taken) - 256, 64):
        rows, columns = (set(part) for part in zip(*taken[first : first + 256], strict=True))
        assert len(rows | columns) <= 72
    panels = [len({p for tile in taken[f : f + 256] for p in tile}) for f in range(0, 5050, 256)]
    assert np.mean(panels) < 48


def tile_order(folder, rows, columns, first_own, mirrored, side):
    tiles = emulated.run(
        "knn", "tile_order", folder, inputs={}, outputs={"tiles": np.int64}, variants=("checked",),
        rows=rows, columns=columns, first_own=first_own, mirrored=mirrored, side=side,
    )["tiles"]  # fmt: skip
    return [divmod(int(tile), columns) for tile in tiles if tile >= 0]
