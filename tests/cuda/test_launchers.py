"""What the compiled launchers ask of the CUDA runtime: seen on one that records instead of running.

They use the caller's stream alone, wait once where they say so, never allocate (the recording
runtime has no allocation to link to), and end at the first error.
"""

from __future__ import annotations

from collections import Counter

import pytest

from tests.cuda import launchers, resources
from tests.cuda.launchers import (
    BASELINE,
    EUCLIDEAN,
    FUSED,
    INNER_PRODUCT,
    PAPER,
    recorded,
)

if missing := launchers.missing_tool():
    pytest.skip(missing, allow_module_level=True)

ASSEMBLIES = {
    "normalized_adjacency": {"n": 300, "k": 7},
    "kappa": {"n": 300, "k": 7, "near": 3},
    "add": {"n": 300, "nnz": 900},
}
# Small sizes that reach every launch of an operator.
OPERATORS = [
    *ASSEMBLIES.items(),
    ("kappa", ASSEMBLIES["kappa"] | {"padded": 1}),
    ("kappa", ASSEMBLIES["kappa"] | {"n": 70_000}),  # sorted, not merged
    ("normalized_adjacency", {"n": 70_000, "k": 7}),
    ("normalized_adjacency_backward", {"n": 300, "k": 7, "nnz": 900}),
    ("spmm", {"n": 300, "columns": 100, "nnz": 900}),
    ("knn", {"n": 300, "k": 4, "channels": 5}),
    ("knn", {"n": 300, "k": 4, "channels": 40, "method": BASELINE, "metric": EUCLIDEAN}),
    ("knn", {"n": 300, "k": 4, "channels": 40, "method": FUSED, "chunk_rows": 128}),
    *(
        ("knn", {"n": 90, "database": 300, "k": 4, "channels": 40, "method": m, "metric": e})
        for m, e in ((BASELINE, EUCLIDEAN), (FUSED, INNER_PRODUCT))
    ),
]
each_operator = pytest.mark.parametrize(
    ("op", "sizes"), OPERATORS, ids=[f"{op}-{i}" for i, (op, _) in enumerate(OPERATORS)]
)


@each_operator
def test_everything_is_on_the_callers_stream(op, sizes):
    found = recorded(op, **sizes)
    assert found.returned == 0
    assert found.launches
    assert all(event.on_stream for event in found.events if event.what != "between")


@each_operator
def test_the_host_waits_once_at_most(op, sizes):
    """For the number of entries, between the two steps of an assembly: 16 bytes and one wait."""
    whats = [event.what for event in recorded(op, **sizes).events]
    if op not in ASSEMBLIES or "padded" in sizes:
        assert not {"copy", "synchronize"} & set(whats)
        return
    place = whats.index("between")
    assert whats[place - 2 : place] == ["copy", "synchronize"]
    assert Counter(whats)["copy"] == Counter(whats)["synchronize"] == 1
    assert recorded(op, **sizes).events[place - 2].bytes == 16


@each_operator
def test_the_first_error_ends_the_call(op, sizes):
    """Of every launch, memset, copy and wait in turn."""
    whole = [event for event in recorded(op, **sizes).events if event.what != "between"]
    for number in range(len(recorded(op, **sizes).events)):
        found = recorded(op, **sizes, fail=number)
        done = [event for event in found.events if event.what != "between"]
        if len(done) == len(whole):  # "between" itself
            continue
        assert found.returned == launchers.LAUNCH_FAILURE, number
        assert len(found.events) == number + 1, f"work after the failing {done[-1]}"


@pytest.fixture(scope="module")
def compiled() -> dict[str, resources.Resources]:
    """What each kernel needs on sm_80, by its mangled name."""
    return {r.kernel: r for s in resources.sources() for r in resources.examine(s, "80")}


@pytest.mark.long
@pytest.mark.parametrize(("op", "sizes"), PAPER)
def test_shared_memory_is_asked_for_before_it_is_used(compiled, op, sizes):
    """48 KiB hold a kernel's static variables as well; more than that takes a question."""
    for event in recorded(op, **sizes).launches:
        if event.kernel in compiled:
            shared = compiled[event.kernel].shared + event.bytes
            assert shared <= 48 << 10 or event.bytes <= event.asked, event
            assert compiled[event.kernel].shared + event.asked <= 99 << 10, "sm_86 has no more"


@pytest.mark.long
def test_every_kernel_is_launched(compiled):
    """What docs/gpu.md's table of resources asks for every kernel."""
    assert set(compiled) - set(launchers.launched()) == set()


# ---- sizes ----


@pytest.mark.parametrize("shift", [0, 4])
@pytest.mark.parametrize(
    ("n", "columns"), [(1, 65_536 * 256), (70_000, 65_536 * 128), (2**31 - 1, 256), (2**31 - 1, 1)]
)
def test_spmm_has_a_grid_for_any_shape(n, columns, shift):
    (launch,) = recorded("spmm", n=n, columns=columns, nnz=1, shift=shift).launches
    a_tile = 128 if shift else 256
    rows = 32 if n <= 65_536 and not shift else 8
    assert launch.grid == (-(-n // rows) * -(-columns // a_tile), 1, 1)


@pytest.mark.parametrize(("columns", "rows"), [(256, 32), (20, 8)])
def test_blocks_for_the_pieces_of_long_rows(columns, rows):
    """Where there may be some; 8 chunks of 2,048 entries each, before those of the rows."""
    assert recorded("spmm", n=300, columns=columns, nnz=2048).workspace == 0
    found = recorded("spmm", n=300, columns=columns, nnz=100_000)
    chunks = -(-100_000 // 2048)
    pieces, rows = -(-chunks // 8), -(-300 // rows)
    assert [launch.grid[0] for launch in found.launches] == [pieces + rows, pieces]
    assert "join_pieces" in found.launches[1].kernel
    assert found.workspace == 2 * chunks * columns * 4


def test_a_grid_that_no_gpu_has_is_an_error_not_another_grid():
    found = recorded("spmm", n=2**31 - 1, columns=2**20, nnz=1)
    assert found.returned == launchers.INVALID_CONFIGURATION
    assert found.launches == []


@pytest.mark.parametrize("method", [BASELINE, FUSED])
def test_knn_of_millions_of_rows(method):
    """Rows of scores beyond 2^31 bytes and tiles beyond 65,535 fit the workspace and the grid."""
    n, k, channels = 3_000_000, 8, 64
    found = recorded("knn", n=n, k=k, channels=channels, method=method)
    assert found.returned == 0
    assert max(launch.grid[0] for launch in found.launches) > 65_535
    assert found.workspace > n * channels * 4
    fixed = (4 << 30) if method == FUSED else 0  # of candidates
    assert found.workspace < n * (channels * 8 + 1_000) + fixed, "O(N k) and a fixed part"


@pytest.mark.parametrize("method", [BASELINE, FUSED])
def test_knn_of_few_rows_in_millions(method):
    """The workspace is O(rows of both), and no grid has tiles for pairs that are none."""
    n, m, k, channels = 1_000, 3_000_000, 8, 64
    found = recorded("knn", n=n, database=m, k=k, channels=channels, method=method)
    assert found.returned == 0
    assert m * channels * 4 < found.workspace < m * (channels * 8 + 1_000)
    tiles = [launch for launch in found.launches if "tile" in launch.kernel]
    assert max(launch.grid[0] for launch in tiles) <= 8 * (-(-m // 128) + 16)  # whole squares
    assert any("estimate_tiles" in launch.kernel for launch in tiles) == (method == FUSED)


@pytest.mark.parametrize("database", [-1, 50_000])
def test_the_tiles_of_segments_are_those_of_their_candidates(database):
    """Of the rows of one tile and all their segments, however many segments there are."""
    n, segments = 20_000, 2_000
    sizes = {"n": n, "segments": segments, "k": 4, "channels": 40, "method": BASELINE}
    found = recorded("knn", **sizes, database=database)
    tiles = [launch for launch in found.launches if "exact_tile" in launch.kernel]
    reach = (128 // 10 + 2) * (10 if database < 0 else 25)
    assert 0 < sum(launch.grid[0] for launch in tiles) <= -(-n // 128) * -(-reach // 64)


def test_an_empty_database_needs_no_scores():
    found = recorded("knn", n=300, database=0, k=4, channels=40)
    assert found.returned == 0
    assert not any("tile" in launch.kernel for launch in found.launches)
    assert any("select_rows" in launch.kernel for launch in found.launches)  # which write the marks


def test_pairs_beyond_32_bits():
    n, k = 30_000_000, 256
    found = recorded("normalized_adjacency", n=n, k=k)
    assert found.returned == 0
    assert found.workspace > 2 * n * k * 24
    assert found.launches[0].grid == (n * k // 256, 1, 1)


@pytest.mark.parametrize("op", ["spmm", "normalized_adjacency_backward", *ASSEMBLIES])
def test_more_nodes_than_int32_are_refused(op):
    found = recorded(op, n=2**31, k=1, near=1, columns=1, nnz=1)
    assert found.returned == launchers.INVALID_VALUE
    assert found.events == []


@pytest.mark.parametrize(
    "tuning", [{"chunk_rows": 100}, {"chunk_rows": 0}, {"candidate_bytes": -1}, {"tile_side": 0},
               {"sample_share": 0}, {"fused_share": 0}, {"keep": 0}, {"keep": 2049}, {"k": 0},
               {"n": 2**31}, {"n": -1}, {"database": 2**31 - 300}],
)  # fmt: skip
def test_knn_refuses_what_it_cannot_follow(tuning):
    found = recorded("knn", **{"n": 300, "k": 4, **tuning})
    assert found.returned == launchers.INVALID_VALUE
    assert found.events == []


def test_a_rerank_that_does_not_fit_is_left_to_the_baseline():
    """Few sampled rows leave many candidates, whose scores shared memory has to hold."""
    sizes = {"n": 200_000, "k": 2048, "channels": 40, "method": FUSED}
    fused = recorded("knn", **sizes)
    assert any("rerank_rows" in launch.kernel for launch in fused.launches)
    sparse = recorded("knn", **sizes, sample_share=2000)
    assert sparse.returned == 0
    assert not any("rerank_rows" in launch.kernel for launch in sparse.launches)


@pytest.mark.parametrize("op", ["knn", "spmm", "normalized_adjacency_backward", *ASSEMBLIES])
def test_nothing_is_nothing_to_do(op):
    found = recorded(op, n=0, k=3, near=2, columns=4, nnz=0)
    assert found.returned == 0
    assert all(launch.grid == (1, 1, 1) for launch in found.launches)


# ---- docs/gpu.md ----


@pytest.mark.parametrize(
    ("part", "op", "sizes", "calls"),
    [
        ("knn, fused", "knn", {"n": 14400, "k": 256, "method": FUSED}, 1),
        ("knn, baseline", "knn", {"n": 14400, "k": 256, "method": BASELINE}, 1),
        ("knn of pixels", "knn", {"n": 14400, "k": 10, "channels": 5, "segments": 16,
                                  "metric": EUCLIDEAN}, 2),
        ("kappa", "kappa", {"n": 14400, "k": 256, "near": 15}, 1),
        ("normalized_adjacency", "normalized_adjacency", {"n": 14400, "k": 256}, 1),
        ("add", "add", {"n": 14400, "nnz": 4_550_000}, 1),
        ("gradient of κ's weights", "normalized_adjacency_backward",
         {"n": 14400, "k": 256, "nnz": 5_200_000}, 1),
    ],
)  # fmt: skip
def test_estimates_count_what_is_launched(part, op, sizes, calls):
    pytest.importorskip("triton")  # bench.roofline has its rates beside Triton's kernels
    from bench.roofline.cuda import cuda_kernels

    events = [event for event in recorded(op, **sizes).events if event.what != "between"]
    counted = sum(kernel.launches for kernel in cuda_kernels() if kernel.part == part)
    assert calls * len(events) == counted


def capacity_of(**sizes) -> int:
    """Candidates of a row: 128 more rows at a time take so much more workspace."""
    one, two = (recorded("knn", **sizes, chunk_rows=128 * c).workspace for c in (1, 2))
    a_row, rest = divmod(two - one, 128)
    assert rest == 0
    return (a_row - 12) // 8  # threshold, count and place on a list; score and index


def test_estimates_have_the_candidates_of_the_fused_knn():
    pytest.importorskip("triton")  # the buffers follow from sample and rank
    from bench.roofline import cuda, sizes

    for n, k, rank, sample in (
        (sizes.N, sizes.NEIGHBOURS, cuda.RANK, cuda.SAMPLE),
        (cuda.MANY, cuda.FEW, 8, cuda.MANY_SAMPLE),
    ):
        most = (rank + 5 * rank**0.5 + 5) * n / sample
        assert capacity_of(n=n, k=k, method=FUSED) == 32 * -(-int(most) // 32)
    assert 32 * -(-int(most) // 32) == cuda.MANY_CAPACITY


def test_all_rows_of_a_segment_are_one_chunk_where_their_candidates_have_room():
    """Then a pair's score is computed once: tiles of one triangle, by squares of 16 x 16."""
    sizes = {"n": 100_000, "k": 10, "method": FUSED}
    (tiles,) = estimates(**sizes)
    high = -(-100_000 // 128)
    assert high * (high + 1) // 2 <= tiles <= (high + 16) * (high + 32) // 2
    capacity = capacity_of(**sizes)
    some = estimates(**sizes, candidate_bytes=8 * capacity * 40_000)
    assert len(some) == 3
    assert sum(some) > 1.5 * tiles
    least = estimates(**{**sizes, "n": 5000}, candidate_bytes=0)
    assert len(least) == 40  # a tile's rows at a time


def estimates(**sizes) -> list[int]:
    """Blocks of every launch of estimates of all pairs."""
    launches = recorded("knn", **sizes).launches
    return [one.grid[0] for one in launches if "estimate_tilesILb0" in one.kernel]
