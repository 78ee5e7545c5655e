"""nefkern.ops.knn in a database, and by inner product, against dense float64 formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nefkern import backends, ops
from nefkern.ops import registry
from tests.ops.graph_common import backend_device, backends_of, on_backend_device, on_threads
from tests.ops.test_knn import (
    LARGEST,
    ONE_BACKEND,
    clustered,
    crowded,
    exact_rows,
    over_all_magnitudes,
    run_script,
    several_tiles,
)

METRICS = ("cosine", "euclidean", "inner_product")
pytestmark = pytest.mark.usefixtures("backend")
knn = on_backend_device(ops.knn)
metrics = pytest.mark.parametrize("metric", METRICS)
compiled_only = pytest.mark.parametrize("backend", backends_of("knn", compiled=True), indirect=True)


def dense_scores(x, y, metric):
    """[N, M] float64, greater is better."""
    x, y = x.double(), y.double()
    if metric == "euclidean":
        return -(x[:, None] - y[None]).norm(dim=2)
    if metric == "cosine":
        x, y = (z / z.norm(dim=1, keepdim=True).where(z.any(1, keepdim=True), 1) for z in (x, y))
    return x @ y.T


def bounds_of(sizes):
    return torch.tensor([0, *sizes]).cumsum(0)


def within_segments(scores, segments, database_segments):
    """The scores, -inf where query and candidate are of different segments."""
    if segments is None:
        return scores
    own, its = (
        torch.bucketize(torch.arange(size), bounds[1:], right=True)
        for size, bounds in zip(scores.shape, (segments, database_segments), strict=True)
    )
    return scores.masked_fill(own[:, None] != its[None], -math.inf)


def assert_best(x, y, k, metric, segments=None, database_segments=None, tolerance=3e-6):
    """Values against the k-th best, then the neighbours' own values, their order and marks."""
    offsets = {"segments": segments, "database_segments": database_segments}
    values, indices = knn(x, k, database=y, metric=metric, **offsets)
    assert values.shape == indices.shape == (len(x), k)
    assert indices.dtype == torch.int32
    scores = within_segments(dense_scores(x, y, metric), segments, database_segments)
    best = scores.sort(dim=1, descending=True, stable=True).values[:, :k]
    best = torch.nn.functional.pad(best, (0, k - best.shape[1]), value=-math.inf)
    sign = -1 if metric == "euclidean" else 1
    size = {
        "cosine": 1.0,
        "euclidean": max([1.0, *x.double().norm(dim=1).tolist(), *y.double().norm(dim=1).tolist()]),
        "inner_product": (x.double().norm(dim=1).max() * y.double().norm(dim=1).max()).item()
        if x.numel() and y.numel()
        else 1.0,
    }[metric]
    filled, got, close = (
        best == -math.inf,
        sign * values.double(),
        {"atol": tolerance * size, "rtol": 0},
    )
    torch.testing.assert_close(got, best, **close)
    assert (indices[filled] == -1).all()
    assert (indices[~filled] >= 0).all()
    if len(y):
        own = scores.gather(1, indices.long().clamp_min(0))
        torch.testing.assert_close(own[~filled], got[~filled], **close)
    step, rise = got.nan_to_num(neginf=-1e300).diff(dim=1), indices.diff(dim=1)
    assert (step <= 0).all(), "not sorted"
    assert (rise[(step == 0) & ~filled[:, 1:]] > 0).all(), "ties not in the order of the indices"
    return values, indices


def assert_identical(x, y, k, metric, segments=None, database_segments=None):
    """Inputs whose scores are exact in float32: the indices must be those of a stable sort."""
    offsets = {"segments": segments, "database_segments": database_segments}
    values, indices = knn(x, k, database=y, metric=metric, **offsets)
    scores = within_segments(dense_scores(x, y, metric), segments, database_segments)
    best, expected = scores.sort(dim=1, descending=True, stable=True)
    best, expected = best[:, :k], expected[:, :k].masked_fill(best[:, :k] == -math.inf, -1)
    count = best.shape[1]
    assert torch.equal(indices[:, :count].long(), expected)
    assert torch.equal(values[:, :count], (-best if metric == "euclidean" else best).float())
    assert (indices[:, count:] == -1).all()
    assert (values[:, count:] == (math.inf if metric == "euclidean" else -math.inf)).all()


# ---- values ----


@metrics
@pytest.mark.parametrize(
    ("n", "m", "channels", "k"),
    [
        (1, 1, 1, 1),
        (3, 1, 40, 2),
        (1, 130, 20, 7),
        (17, 64, 5, 4),
        (64, 17, 64, 30),
        (200, 300, 33, 50),
    ],
)
def test_shapes(n, m, channels, k, metric, poisoned_memory):
    assert_best(clustered(n, channels, seed=n), clustered(m, channels, seed=m + 1), k, metric)


@metrics
def test_several_tiles(metric):
    x, y = (clustered(several_tiles(n), 72, seed=n) for n in (1000, 1500))
    assert_best(x, y, several_tiles(50), metric)


@metrics
def test_all_sides_of_nothing(metric):
    for channels in (4, 40):
        x, none = clustered(3, channels), torch.zeros(0, channels)
        assert knn(none, 2, database=x, metric=metric)[0].shape == (0, 2)
        values, indices = knn(x, 2, database=none, metric=metric)
        assert (indices == -1).all()
        assert (values == (math.inf if metric == "euclidean" else -math.inf)).all()
    values, indices = knn(torch.zeros(2, 0), 2, database=torch.zeros(3, 0), metric=metric)
    assert (values == 0).all()
    assert indices.tolist() == [[0, 1]] * 2


@metrics
@pytest.mark.parametrize("channels", [6, 24])
@pytest.mark.parametrize(
    ("sizes", "others"),
    [
        ((5, 0, 1, 30, 2), (9, 4, 0, 50, 1)),
        ((0, 40), (300, 7)),
        ((3, 0, 3), (1, 2000, 2)),
        ((), ()),
    ],
)
def test_segments(sizes, others, channels, metric, poisoned_memory):
    x, y = clustered(sum(sizes), channels, seed=4), clustered(sum(others), channels, seed=5)
    for dtype in (torch.int32, torch.int64):
        assert_best(x, y, 10, metric, bounds_of(sizes).to(dtype), bounds_of(others).to(dtype))


@compiled_only
def test_more_queries_than_are_held_at_a_time():
    x, y = clustered(8300, 20, seed=1), clustered(60, 20, seed=2)
    assert_best(x, y, 3, "cosine")


@metrics
def test_the_rows_themselves_as_a_database(metric):
    """A row is its own candidate then; and all is as without, to the last bit."""
    for channels in (5, 40):
        x = clustered(several_tiles(500), channels, seed=3)
        values, indices = knn(x, 20, metric=metric, include_self=True)
        again, same = knn(x, 20, database=x, metric=metric)
        assert torch.equal(values, again)
        assert torch.equal(indices, same)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@metrics
@pytest.mark.parametrize("channels", [5, 40])
def test_a_pair_has_one_value_beside_any_others(channels, metric, backend):
    """A far row changes the scale of all estimates, a part their number: no digit of a value. (On
    other backends values round by the way they are found.)"""
    x, y = clustered(50, channels, seed=1), clustered(300, channels, seed=2)
    values, indices = knn(x, 300, database=y, metric=metric)
    table = torch.empty(50, 300).scatter(1, indices.long(), values)
    for far in (1e38, -1e22, 1e4):
        more = torch.cat([torch.full((1, channels), far), y[100:200]])
        values, indices = knn(x[7:30], 101, database=more, metric=metric)
        again = torch.empty(23, 101).scatter(1, indices.long(), values)
        assert torch.equal(again[:, 1:], table[7:30, 100:200])


# ---- ties ----


@metrics
@pytest.mark.parametrize(
    ("n", "m", "channels", "k"),
    [(30, 60, 5, 7), (200, 400, 20, 50), (40, 300, 24, 299), (3, 9, 8, 20)],
)
def test_ties(n, m, channels, k, metric):
    rows = exact_rows(n + m, channels)
    if metric == "euclidean":
        rows = torch.randint(-3, 4, (n + m, 2)).float().repeat(1, channels // 2)[:, : channels // 2]
        rows = torch.nn.functional.pad(rows[:, :2], (0, channels - 2))
    assert_identical(rows[:n], rows[n:], k, metric)


@metrics
@pytest.mark.parametrize("spread", [0.0, 1e-7, 1e-3])
@pytest.mark.parametrize("channels", [8, 70])
def test_more_near_ties_than_a_buffer_holds(channels, spread, metric):
    rows = crowded(several_tiles(1500), channels, spread)
    assert_best(rows[::10], rows, several_tiles(60), metric)


# ---- hard inputs ----


@metrics
@pytest.mark.parametrize("channels", [5, 20])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_finite(bad, channels, metric, poisoned_memory):
    x, y = clustered(40, channels, seed=9), clustered(150, channels, seed=10)
    x[3, 0] = y[7, 4] = y[77, 0] = bad
    values, indices = knn(x, 12, database=y, metric=metric)
    assert (indices[3] == -1).all()
    assert not torch.isin(indices, torch.tensor([7, 77])).any()
    kept = torch.arange(40) != 3
    clean = y.clone()
    clean[[7, 77]] = 0
    there = torch.arange(150)[~torch.isin(torch.arange(150), torch.tensor([7, 77]))]
    expected, _ = knn(x[kept], 12, database=y[there], metric=metric)
    torch.testing.assert_close(values[kept], expected)
    with pytest.raises(ValueError, match=r"^features: expected finite values.*row 3"):
        knn(x, 12, database=clean, metric=metric, check_finite=True)
    with pytest.raises(ValueError, match=r"^database: expected finite values.*row 7"):
        knn(x[kept], 12, database=y, metric=metric, check_finite=True)
    knn(x[kept], 12, database=clean, metric=metric, check_finite=True)


def test_zero_rows():
    x, y = clustered(30, 20, seed=1), clustered(90, 20, seed=2)
    x[4] = 0
    y[::9] = 0
    for metric in METRICS:
        assert_best(x, y, 40, metric)
    values, indices = knn(x, 5, database=y)
    assert (values[4] == 0).all()
    assert indices[4].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("channels", [3, 20, 70])
def test_distances_over_all_magnitudes(channels):
    x, y = (over_all_magnitudes(several_tiles(n), channels, seed=n) for n in (150, 300))
    values, indices = knn(x, 25, database=y, metric="euclidean")
    scores = dense_scores(x, y, "euclidean")
    best = -scores.sort(dim=1, descending=True).values[:, :25]
    close = {"rtol": 2e-6, "atol": 2.0**-148}
    torch.testing.assert_close(values.double(), best.float().double(), **close)
    own = -scores.gather(1, indices.long()).float()
    torch.testing.assert_close(own.double(), values.double(), **close)


def assert_products(x, y, k, **options):
    """Inner products within a few roundings of |x| |y|; infinite beyond the largest float."""
    values, indices = knn(x, k, metric="inner_product", **options)
    exact = x.double() @ y.double().T
    allowed = 3e-6 * x.double().norm(dim=1)[:, None] * y.double().norm(dim=1)[None] + 2.0**-148
    own, slack = (z.gather(1, indices.long()) for z in (exact, allowed))
    reach = (values.double().nan_to_num(posinf=2.0**128, neginf=-(2.0**128)) - own).abs() <= slack
    beyond = values.isinf() & (own.sign() == values.sign()) & (own.abs() > (1 - 1e-5) * LARGEST)
    assert (reach | beyond).all()
    order = values.nan_to_num(posinf=math.inf, neginf=-math.inf)
    assert (order[:, 1:] <= order[:, :-1]).all()
    assert (indices.diff(dim=1)[values[:, 1:] == values[:, :-1]] > 0).all()
    # Nobody who was left out is surely better than the last.
    left_out = torch.ones_like(exact, dtype=torch.bool).scatter(1, indices.long(), False)
    last = values[:, -1:].double().nan_to_num(posinf=LARGEST, neginf=-math.inf)
    better = (exact - allowed > last + slack[:, -1:]) & left_out & (last < LARGEST)
    assert not better.any()
    return values, indices


@pytest.mark.parametrize("channels", [3, 20, 70])
def test_products_over_all_magnitudes(channels):
    x, y = (over_all_magnitudes(several_tiles(n), channels, seed=n) for n in (150, 300))
    assert_products(x, y, 25, database=y)
    assert_products(x * 1e-30, y[::7] * 1e-30, 9, database=y[::7] * 1e-30)


@pytest.mark.parametrize("channels", [3, 40])
def test_products_beyond_the_largest_float(channels):
    """They are ±inf, in the order of the indices; none is NaN, whatever overflows on the way."""
    n = several_tiles(400)
    y = torch.zeros(n, channels)
    y[:, 0] = torch.linspace(0.1, 1, n) * LARGEST
    y[-1] = -y[-2]
    values, indices = knn(torch.tensor([[8.0, 0, 0]]).repeat(1, 20)[:, :channels], 5, database=y,
                          metric="inner_product")  # fmt: skip
    first = int((y[:, 0].double() * 8 > LARGEST).nonzero()[0])
    assert indices[0].tolist() == list(range(first, first + 5))
    assert (values == math.inf).all()
    x = torch.zeros(2, channels)
    x[:, :2] = torch.tensor([[1e30, 1e30], [1e30, -1e30]])
    y = torch.zeros(3, channels)
    y[:, :2] = torch.tensor([[1e30, -1e30], [-1e30, 1e30], [-1e30, -1e30]])
    values, indices = knn(x, 3, database=y, metric="inner_product")
    assert values.tolist() == [[0, 0, -math.inf], [math.inf, 0, -math.inf]]
    assert indices.tolist() == [[0, 1, 2], [0, 2, 1]]


@pytest.mark.parametrize("channels", [4, 24])
@pytest.mark.parametrize("include_self", [False, True])
def test_products_of_the_rows_themselves(channels, include_self):
    """Long rows are near to many; each is computed once for both of its rows."""
    x = clustered(several_tiles(400), channels, seed=6)
    x = x * torch.logspace(-2, 2, len(x))[torch.randperm(len(x)), None]
    values, indices = knn(x, 30, metric="inner_product", include_self=include_self)
    scores = dense_scores(x, x, "inner_product")
    if not include_self:
        scores.fill_diagonal_(-math.inf)
    best = scores.sort(dim=1, descending=True).values[:, :30]
    close = 3e-6 * x.double().norm(dim=1).max() * x.double().norm(dim=1)[:, None]
    assert ((values.double() - best).abs() <= close).all()
    assert ((scores.gather(1, indices.long()) - values.double()).abs() <= close).all()


triton_only = pytest.mark.parametrize("backend", ["triton"], indirect=True)


@triton_only
@pytest.mark.parametrize("method", ["ieee", "preselect"])
@pytest.mark.parametrize("crowded_out", [False, True], ids=["", "no room for doubt"])
def test_products_by_both_ways(method, crowded_out, monkeypatch, poisoned_memory):
    """Whatever way a call would choose: with a database and without, a block of rows at a time."""
    kernels = pytest.importorskip("nefkern.triton.knn")
    monkeypatch.setenv("NEFKERN_KNN_TRITON", method)
    monkeypatch.setattr(kernels, "WORKSPACE", 0)
    if crowded_out:
        monkeypatch.setattr(kernels, "_capacity", lambda k, longest, preselect: k)
    for channels in (1, 20, 70):
        x, y = (over_all_magnitudes(n, channels, seed=n) for n in (140, 90))
        assert_products(x, y, 9, database=y)
        assert_products(y, y, 9, include_self=True)
    x, y = exact_rows(171, 20), exact_rows(160, 20, seed=1)
    sizes, others = bounds_of((70, 0, 1, 100)), bounds_of((40, 3, 0, 117))
    assert_identical(x, y, 9, "inner_product", sizes, others)
    assert_best(x, y, 9, "inner_product", sizes, others)


@triton_only
def test_short_queries_of_products_keep_their_digits():
    """Lengths over six decades: for each query the estimates still tell most candidates apart."""
    kernels = pytest.importorskip("nefkern.triton.knn")
    x = clustered(200, 60, seed=3)
    x = (x * torch.logspace(-6, 0, 200)[:, None]).to(backend_device())
    data = kernels.rows_of(x, "inner_product", kernels.Ranges([0, 200]))
    margins = kernels.pack(data, 60).margins
    others = data.rows.double() * 2.0 ** (data.exponents - data.exponents.max())[:, None].double()
    scores = data.rows.double() @ others.T
    assert (margins < 0.02 * scores.std(1)).all()


@metrics
def test_float64(metric):
    with backends.backend("auto"):
        x, y = (clustered(n, 30, seed=n, dtype=torch.float64) for n in (100, 200))
        values, _ = assert_best(x, y, 20, metric, tolerance=1e-13)
        assert values.dtype == torch.float64


def test_products_of_float64_of_all_magnitudes():
    """Exponents that no float64 holds on the way."""
    with backends.backend("auto"):
        rows = torch.tensor([[2.0**600, 2.0**-1070], [2.0**-1000, 0]], dtype=torch.float64)
        others = rows * torch.tensor([[2.0**-700], [2.0**500]], dtype=torch.float64)
        values, indices = knn(rows, 2, database=others, metric="inner_product")
        assert values.tolist() == [[2.0**500, 2.0**100], [0, 0]]
        assert indices.tolist() == [[0, 1], [0, 1]]
        values, _ = knn(rows, 1, database=rows, metric="inner_product")
        assert values.tolist() == [[math.inf], [2.0**-400]]


@metrics
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precisions_are_computed_in_float32(dtype, metric):
    x, y = (clustered(n, 24, seed=n, dtype=dtype) for n in (60, 90))
    for one, other in zip(
        knn(x, 9, database=y, metric=metric),
        knn(x.float(), 9, database=y.float(), metric=metric),
        strict=True,
    ):
        assert torch.equal(one, other)


@metrics
def test_not_contiguous(metric):
    x, y = clustered(40, 20).to(backend_device()), clustered(50, 20, seed=1).to(backend_device())
    expected = knn(x, 5, database=y, metric=metric)
    found = knn(x.T.contiguous().T, 5, database=y.T.contiguous().T, metric=metric)
    torch.testing.assert_close(found, expected)


@compiled_only
@metrics
@pytest.mark.parametrize("channels", [7, 40])
def test_results_do_not_depend_on_threads(channels, metric):
    if backends.current() == "reference":
        x, y = exact_rows(300, channels), exact_rows(1200, channels, seed=1)
    else:
        x, y = clustered(300, channels), crowded(1200, channels)
    (values, indices), *others = on_threads(lambda: knn(x, 40, database=y, metric=metric))
    for other in others:
        assert torch.equal(values, other[0])
        assert torch.equal(indices, other[1])


@compiled_only
@settings(max_examples=60, **ONE_BACKEND)
@given(data=st.data())
def test_properties(data):
    """Any sizes, duplicates, zero rows, empty segments: exact against the stable sort."""
    count = data.draw(st.integers(1, 4))
    sizes, others = (
        data.draw(st.lists(st.integers(0, most), min_size=count, max_size=count))
        for most in (30, 120)
    )
    channels = data.draw(st.integers(4, 12) | st.integers(17, 70))
    x, y = (
        exact_rows(sum(each), channels, seed=data.draw(st.integers(0, 99)))
        for each in (sizes, others)
    )
    if data.draw(st.booleans()) and len(x) and len(y):
        y = x[torch.arange(len(y)) % min(3, len(x))]
    for rows in (x, y):
        if len(rows):
            rows[data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=3))] = 0
    k = data.draw(st.integers(1, 150))
    metric = data.draw(st.sampled_from(METRICS))
    if metric == "euclidean":  # ±1 differ by 0, 1 or 2: roots of integers, exact enough to tie
        x, y = x[:, :4].clone(), y[:, :4].clone()
        x[:, 1:] = y[:, 1:] = 0
    assert_identical(x, y, k, metric, bounds_of(sizes), bounds_of(others))


@compiled_only
def test_memory_stays_far_below_n_times_m(backend):
    """2,000 queries in 60,000 rows: the scores alone would be 480 MB."""
    device = backend_device(backend)
    peak = {
        "cpu": "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024",
        "cuda": "torch.cuda.max_memory_allocated() >> 20",
    }[device]
    script = f"""
import resource, torch
from nefkern.ops import knn
x, y = torch.randn(2000, 24, device="{device}"), torch.randn(60000, 24, device="{device}")
knn(x[:200], 20, database=y[:1000])
before = {peak}
knn(x, 20, database=y)
print({peak} - before)
"""
    done = run_script(script, NEFKERN_BACKEND=backend)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 150


# ---- the dispatcher ----


@metrics
def test_opcheck(metric):
    device = backend_device()
    x, y = clustered(20, 8).to(device), clustered(50, 8).to(device)
    bounds, others = (torch.tensor([0, 9, end], device=device) for end in (20, 50))
    for offsets in ((None, None), (bounds, others)):
        arguments = (x, 5, metric, offsets[0], False, False, y, offsets[1])
        torch.library.opcheck(torch.ops.nefkern.knn.default, arguments)


def test_not_differentiable_and_says_so():
    x, y = clustered(30, 8), clustered(20, 8).requires_grad_()
    values, indices = knn(x, 4, database=y)
    assert not indices.requires_grad
    with pytest.raises(RuntimeError, match=r"knn is not differentiable.*detach"):
        values.sum().backward()


def test_vmap_searches_slice_by_slice():
    x, y = clustered(12, 4).view(3, 4, 4), clustered(8, 4)
    x, y = x.to(backend_device()), y.to(backend_device())
    found = torch.vmap(lambda x: ops.knn(x, 2, database=y))(x)
    for i in range(3):
        one = ops.knn(x[i], 2, database=y)
        assert torch.equal(found[0][i], one[0])
        assert torch.equal(found[1][i], one[1])


X, BOUNDS = torch.zeros(6, 3), torch.tensor([0, 2, 6])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"database": "y"}, TypeError, "database: expected a torch.Tensor, got str"),
        ({"database": X[0]}, ValueError, r"database: expected shape \[M, 3\], got \[3\]"),
        ({"database": X[:, :2]}, ValueError, r"database: expected shape \[M, 3\], got \[6, 2\]"),
        ({"database": X.double()}, TypeError, "database: expected one of float32, got float64"),
        ({"database": X, "include_self": True}, ValueError, "include_self: expected False with a"),
        ({"database_segments": BOUNDS}, ValueError, "database_segments: expected None without"),
        (
            {"database": X, "segments": BOUNDS},
            ValueError,
            "database_segments: expected offsets beside segments, got None",
        ),
        (
            {"database": X, "database_segments": BOUNDS},
            ValueError,
            "^segments: expected offsets beside database_segments, got None",
        ),
        (
            {"database": X, "segments": BOUNDS, "database_segments": BOUNDS[1:] - 2},
            ValueError,
            "database_segments: expected offsets from 0 to 6, got 0 to 4",
        ),
        (
            {"database": X, "segments": BOUNDS, "database_segments": torch.tensor([0, 6])},
            ValueError,
            "database_segments: expected as many offsets as segments, 3, got 2",
        ),
        (
            {"database": X, "segments": BOUNDS, "database_segments": [0, 2, 6]},
            TypeError,
            "database_segments: expected a torch.Tensor, got list",
        ),
    ],
)
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        knn(X, 2, **options)


def test_database_on_another_device():
    with pytest.raises(
        ValueError, match="database: expected the device of features, cpu, got meta"
    ):
        ops.knn(X, 2, database=X.to("meta"))


def test_every_backend_takes_every_metric(backend):
    accepts = registry._kernels["knn"][backend][1]
    for metric in METRICS:
        assert accepts is None or accepts(X, 2, metric, None, False, False, X, None)
