"""Neighbours among blocks and over processes against one call with all rows.

Run as a program this file is one of three processes, see :func:`program`.
"""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from nefkern import backends
from nefkern.ops import knn
from nefkern.spectral.neighbours import _Lists, knn_blocks, knn_distributed

METRICS = ("cosine", "euclidean", "inner_product")
RANKS, PATIENCE = 3, 300  # seconds, for a busy machine
metrics = pytest.mark.parametrize("metric", METRICS)


def rows(n: int, channels: int = 20, seed: int = 0) -> torch.Tensor:
    """Rows with copies, zeros, one of NaN and one that is far away."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, channels, generator=generator)
    if n > 20:
        x[::5] = x[3].clone()
        x[7], x[11, 2], x[13] = 0, math.nan, 1e38
    return x


def assert_same(found, expected):
    """To the last bit; to rounding, and in values only, where matrix products round by shape."""
    if not backends.why_not("cpu"):
        assert torch.equal(found[1], expected[1].to(found[1].dtype))
        assert torch.equal(found[0], expected[0])
    else:
        torch.testing.assert_close(found[0], expected[0])


# ---- blocks ----


@metrics
@pytest.mark.parametrize("channels", [5, 20])
def test_blocks_equal_one_call(channels, metric):
    queries, database = rows(60, channels, seed=1), rows(300, channels, seed=2)
    for k in (7, 150, 400):
        expected = knn(queries, k, database=database, metric=metric)
        for block_rows in (1, 70, 299, 1000):
            if block_rows > 1 or k == 7:
                found = knn_blocks(queries, database, k, metric=metric, block_rows=block_rows)
                assert found[1].dtype == torch.int32
                assert_same(found, expected)


@metrics
def test_missing_neighbours_come_after_infinite_ones(metric):
    far = 3e38 * torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    expected = knn(far, 4, database=-far, metric=metric)
    assert expected[0].isinf().any() or metric == "cosine"
    assert_same(knn_blocks(far, (-far).split(1), 4, metric=metric), expected)


def test_rows_on_a_disk(tmp_path):
    queries, database = rows(30, seed=1), rows(200, seed=2)
    np.save(tmp_path / "rows.npy", database.numpy())
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    expected = knn(queries, 9, database=database)
    assert_same(knn_blocks(queries, mapped, 9, block_rows=64), expected)
    assert_same(knn_blocks(queries, (mapped[i : i + 50] for i in range(0, 200, 50)), 9), expected)
    half = np.lib.format.open_memmap(tmp_path / "half.npy", "w+", np.float16, (200, 20))
    half[:] = database.half()
    expected = knn(queries, 9, database=torch.from_numpy(np.array(half)).float())
    assert_same(knn_blocks(queries, half, 9, block_rows=64), expected)


def test_one_block_is_held_at_a_time():
    held = []

    def blocks():
        for seed in range(5):
            assert all(block() is None for block in held)
            block = rows(50, seed=seed)
            held.append(weakref.ref(block))
            yield block
            del block

    expected = knn(rows(9), 5, database=torch.cat([rows(50, seed=seed) for seed in range(5)]))
    assert_same(knn_blocks(rows(9), blocks(), 5), expected)


def test_no_blocks_no_neighbours():
    for blocks in ([], rows(0), [rows(0), rows(0)]):
        values, indices = knn_blocks(rows(3), blocks, 2, metric="euclidean")
        assert values.tolist() == [[math.inf] * 2] * 3
        assert indices.tolist() == [[-1] * 2] * 3


def test_indices_beyond_int32():
    """2^31 rows would not fit here: of the last block of so many."""
    lists = _Lists(torch.tensor([[1.0, -math.inf]]), torch.tensor([[4, -1]], dtype=torch.int32))
    for first, dtype in ((2**31 - 6, torch.int32), (2**31 - 5, torch.int64), (2**40, torch.int64)):
        values, indices = lists.from_row(first).of_rows(first + 5)
        assert indices.dtype == dtype
        assert indices.tolist() == [[first + 4, -1]]
        assert torch.equal(values, lists.values)


@pytest.mark.parametrize(
    ("blocks", "error", "message"),
    [
        (3, TypeError, "blocks: expected an array or tensor .*, got int"),
        ("file", TypeError, "blocks: expected an array or tensor .*, got str"),
        (torch.zeros(4), ValueError, r"blocks: expected shape \[M, C\], got \[4\]"),
        ([rows(2), rows(2, 3)], ValueError, r"blocks\[1\]: expected shape \[M, 20\], got \[2, 3\]"),
        ([rows(2), [[1.0]]], TypeError, r"blocks\[1\]: expected a tensor or an array, got list"),
        ([rows(2).double()], TypeError, r"blocks\[0\]: expected float32, as the queries.*float64"),
        ([rows(2).int()], TypeError, r"blocks\[0\]: expected one of float16.*got int32"),
        ([rows(5), rows(30)], ValueError, r"blocks\[1\]: expected finite values.*row 11"),
    ],
)
def test_bad_blocks(blocks, error, message):
    with pytest.raises(error, match=message):
        knn_blocks(rows(4), blocks, 2, check_finite=True)


def test_bad_queries():
    with pytest.raises(ValueError, match=r"queries: expected finite values.*row 11"):
        knn_blocks(rows(30), [], 2, check_finite=True)
    with pytest.raises(ValueError, match="block_rows: expected at least 1, got 0"):
        knn_blocks(rows(4), rows(4), 2, block_rows=0)
    with pytest.raises(ValueError, match=r"queries: expected shape \[N, C\], got \[3\]"):
        knn_blocks(torch.zeros(3), [], 2)
    with pytest.raises(ValueError, match="metric: expected 'cosine'"):
        knn_blocks(rows(4), [], 2, metric="dot")


# ---- processes ----

#: of every process; one has none
COUNTS = {"uneven": (70, 33, 50), "empty": (0, 90, 41)}


def parts(counts, channels=20, dtype=torch.float32):
    return rows(sum(counts), channels).to(dtype).split(list(counts))


def program(folder: Path) -> None:
    """One of the processes: each case with its own rows; what it found goes to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, found = dist.get_rank(), {}
    pair = dist.new_group([0, 2])
    for name, counts in COUNTS.items():
        mine = parts(counts)[rank]
        for metric in METRICS:
            found[name, metric] = knn_distributed(mine, 12, metric=metric)
            queries = rows(10 + rank, seed=rank)
            found[name, metric, "database"] = knn_distributed(
                queries, 200, database=mine, metric=metric
            )
    found["self"] = knn_distributed(parts((40, 1, 40))[rank], 12, include_self=True)
    found["half"] = knn_distributed(parts((9, 8, 7), dtype=torch.bfloat16)[rank], 5)
    if rank != 1:
        found["pair"] = knn_distributed(parts((30, 0, 44))[rank], 6, group=pair)
    found["errors"] = [
        ending(lambda: knn_distributed(rows(30 if rank == 1 else 5), 3, check_finite=True)),
        ending(lambda: knn_distributed(rows(5), "3" if rank == 2 else 3)),
        ending(lambda: knn_distributed(rows(5, 4 + rank), 3)),
        ending(lambda: knn_distributed(rows(5), 3, metric=METRICS[rank // 2])),
    ]
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def ending(action) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "fine"


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What each of the processes found."""
    folder = tmp_path_factory.mktemp("ring")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(RANKS),
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env={**environment, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(RANKS)
    ]  # fmt: skip
    said = [process.communicate(timeout=PATIENCE)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * RANKS, "\n".join(said)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@metrics
@pytest.mark.parametrize("name", COUNTS)
def test_processes_equal_one(found, name, metric):
    everything = torch.cat(parts(COUNTS[name]))
    expected = knn(everything, 12, metric=metric)
    for part, *lists in zip(found, *(each.split(COUNTS[name]) for each in expected), strict=True):
        assert part[name, metric][1].dtype == torch.int32
        assert_same(part[name, metric], lists)
    for rank, part in enumerate(found):
        queries = rows(10 + rank, seed=rank)
        expected = knn(queries, 200, database=everything, metric=metric)
        assert_same(part[name, metric, "database"], expected)


@pytest.mark.parametrize(
    ("name", "counts", "k", "options"),
    [
        ("self", (40, 1, 40), 12, {"include_self": True}),
        ("half", (9, 8, 7), 5, {}),
        ("pair", (30, 0, 44), 6, {}),
    ],
)
def test_options_over_processes(found, name, counts, k, options):
    dtype = torch.bfloat16 if name == "half" else torch.float32
    expected = knn(torch.cat(parts(counts, dtype=dtype)), k, **options)
    for part, *lists in zip(found, *(each.split(counts) for each in expected), strict=True):
        if name in part:
            assert_same(part[name], lists)


def test_a_mistake_in_one_process_ends_all(found):
    finite, kind, columns, metric = zip(*(part["errors"] for part in found), strict=True)
    mine = "ValueError: features: expected finite values, got NaN or inf in row 11"
    assert finite[1] == mine
    assert finite[0] == finite[2] == f"RuntimeError: knn_distributed: process 1 has failed: {mine}"
    assert kind[2] == "TypeError: k: expected an int, got str"
    assert kind[0] == kind[1] == f"RuntimeError: knn_distributed: process 2 has failed: {kind[2]}"
    assert all("expected the same columns, dtype" in each for each in columns)
    assert all("'cosine'" in each and "'euclidean'" in each for each in metric)


def test_without_processes_it_is_one():
    x = rows(40)
    assert_same(knn_distributed(x, 4), knn(x, 4))


if __name__ == "__main__":
    program(Path(sys.argv[1]))
