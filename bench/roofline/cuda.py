"""The kernels of csrc/cuda, at the paper's size, of a million rows, and of a whole data set."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from bench.roofline.counts import counted, counted_whole
from bench.roofline.model import Kernel
from bench.roofline.sizes import ENTRIES, NEIGHBOURS, PATCHES, C, N
from bench.roofline.training_step import sparse

# What the fused knn of csrc/cuda makes of this size (fused_sizes in knn.cu): rows of its sample,
# the place in it that gives a threshold, and the candidates that a row then has.
SAMPLE, RANK = 1024, 40
CANDIDATES = RANK * N / SAMPLE
RERANKED = 300  # a row: k, and what the margin leaves besides
VALUED = 266  # the same of the counted case
# Of four rows that follow one another, which share their candidates' rows: how many times as many
# candidates they have as differ, in photographs (tests/emulator/costs.py: PHOTOGRAPHS).
SHARING = 2.2
TILE = 128


#: Instructions of the loop over channels in rerank_rows, for 16 channels of 64 candidates with four
#: rows: of the machine code (tests/cuda/test_resources.py), which is unrolled; g++'s is not.
RERANK_LOOP = 317


def reranked() -> dict[str, float]:
    """``shared`` and ``issued`` of all rows: from counts at two widths, since what they need grows
    evenly, but for the instructions of the loop over channels."""
    narrow, wide = (
        counted(f"knn fused, k = 256, {channels} channels, alike", "rerank_rows", N)
        for channels in (32, 64)
    )
    others = {name: 2 * narrow[name] - wide[name] for name in narrow}
    grown = C / 32 * (wide["shared"] - narrow["shared"]) * RERANKED / VALUED
    loops = math.ceil(4 * RERANKED / SHARING / 64) / 4 * C / 16
    return {
        "shared": others["shared"] + grown,
        "issued": others["issued"] + N * loops * RERANK_LOOP,
    }


def knn_fused() -> Iterator[Kernel]:
    """csrc/cuda/knn_fused.cuh: tensor cores choose candidates, whose values are then computed."""
    row, sampled = 4.0 * N * C, 4.0 * N * SAMPLE
    tile_rows = -(-N // TILE)
    upper = tile_rows * (tile_rows + 1) // 2  # tiles: each pair once
    operands = 2 * TILE * C * 2.0  # bytes of a tile
    yield Kernel("knn, fused", "rows: unit length, centred, float16", "stream", moved=3.5 * row,
                 launches=4)  # fmt: skip
    yield Kernel("knn, fused", "scores of the sample", "mma.sync product",
                 {"half": 2.0 * N * SAMPLE * C}, row / 2,
                 tile_rows * SAMPLE / TILE * operands + sampled, row / 2 + sampled / 3,
                 launches=3)  # fmt: skip
    yield Kernel("knn, fused", "thresholds", "selection", cached=sampled, resident=sampled / 3,
                 launches=3, **counted("knn select of 1,024, k = 40", "select_rows", N),
                 )  # fmt: skip
    yield Kernel("knn, fused", "scores, candidates", "mma.sync product",
                 {"half": upper * 2.0 * TILE * TILE * C}, row / 2 + N * CANDIDATES * 8,
                 upper * operands, row / 2, launches=2)  # fmt: skip
    yield Kernel("knn, fused", "re-rank, sort", "gather", {"float32": 2.0 * N * RERANKED * C},
                 row + N * (CANDIDATES * 8 + NEIGHBOURS * 8), N * RERANKED / SHARING * C * 4.0, row,
                 launches=1, **reranked())  # fmt: skip
    # Nothing is left to redo, but the host doesn't know.
    yield Kernel("knn, fused", "rows left open: none", "stream", launches=14)


def knn_baseline() -> Iterator[Kernel]:
    """csrc/cuda/knn_exact.cuh: all values in float32, then a selection."""
    row, scores = 4.0 * N * C, 4.0 * N * N
    tile_rows = -(-N // TILE)
    yield Kernel("knn, baseline", "rows: unit length", "stream", moved=2 * row)
    yield Kernel("knn, baseline", "values", "float32 product", {"float32": 2.0 * N * N * C}, row,
                 tile_rows * (2 * tile_rows) * 1.5 * TILE * C * 4 + scores, row + (32 << 20), 29,
                 )  # fmt: skip
    yield Kernel("knn, baseline", "selection", "selection", moved=8.0 * N * NEIGHBOURS,
                 cached=scores, resident=32 << 20, launches=29,
                 **counted("knn select, k = 256", "select_rows", N))  # fmt: skip


# A million rows of as many channels, with ten neighbours: what fused_sizes in knn.cu makes of it.
MANY, FEW = 10**6, 10
MANY_SAMPLE, MANY_CAPACITY, MANY_FOUND = 62_592, 448, 128
SIDE, CHUNK = 16, 16_384  # tiles of a square of them; rows of a chunk, before


def million_rows(symmetric: bool) -> list[Kernel]:
    """The products of csrc/cuda's fused knn of 10⁶ rows, now (each pair once, squares of tiles) and
    before (each pair twice but within chunks of 16,384 rows, and tiles row by row)."""
    part = "each pair once, squares of tiles" if symmetric else "chunks of 16,384 rows, as before"
    high, sampled = -(-MANY // TILE), -(-MANY_SAMPLE // TILE)
    panel = TILE * C * 2.0  # bytes of a tile's rows
    if symmetric:
        count = high * (high + 1) / 2
    else:
        chunks, own = -(-MANY // CHUNK), CHUNK / TILE
        count = high * high - chunks * own * (own - 1) / 2
    found = 8.0 * MANY * MANY_FOUND

    def tiles(name: str, wanted: float, written: float, chunk_launches: int) -> Kernel:
        work = {"half": wanted * 2 * TILE**2 * C}
        # The rows of a column of tiles come from device memory for every row of tiles, or, with
        # squares, for every row of squares.
        again = wanted * panel / (SIDE if symmetric else 1)
        launches = chunk_launches * (1 if symmetric else -(-MANY // CHUNK))
        return Kernel(part, name, "mma.sync product", work, again + written, wanted * 2 * panel,
                      1, launches=launches)  # fmt: skip

    # The scores of the sample are read where they have been written: in the L2 cache.
    return [
        tiles("10⁶ rows: scores of the sample", float(high * sampled), 0, 8),
        tiles("10⁶ rows: scores, candidates", count, found, 1),
    ]


def knn_pixels() -> Iterator[Kernel]:
    """direct_rows, twice (k̃ = 10 and 5): rows of 5 channels, padded to 8."""
    pairs = 1.0 * N * PATCHES
    each = [counted(f"knn pixels, k = {k}", "direct_rows", N) for k in (10, 5)]
    selected = {name: sum(one[name] for one in each) for name in each[0]}
    yield Kernel("knn of pixels", "knn of pixels", "selection", {"float32": 2 * 15 * pairs},
                 2 * 3 * 32.0 * N, 2 * 32 * pairs, 32.0 * N, launches=8, **selected)  # fmt: skip


def merged(part: str, list_size: int, lists: int, fill: str) -> Iterator[Kernel]:
    """csrc/cuda/merged_rows.cuh: who names a node is counted and written, then a row is merged."""
    edges = float(N * list_size)
    case = f"{part} of photographs"
    # Bytes an edge: index and weight, its place among the names, a name; an entry, merged.
    index, place, name, entry = 8, 4, 8, 12
    moved = {
        "count_names": edges * (index + place),
        "write_names": edges * (index + place + name),
        "merge_rows": edges * (index + name) + entry * ENTRIES,
        fill: (entry + 8.0) * ENTRIES,
    }
    # Each graph's lists have a launch of the first two. Two memsets before; a scan is two kernels;
    # the sizes' has one before and one after it, a copy and a wait.
    launches = {"count_names": 2 + lists, "write_names": 2 + lists, "merge_rows": 1, fill: 7}
    titles = {"count_names": "names counted", "write_names": "names written",
              "merge_rows": "rows merged", fill: "filled"}  # fmt: skip
    for kernel, bytes_ in moved.items():
        yield Kernel(part, titles[kernel], "sort", moved=bytes_, launches=launches[kernel],
                     **counted_whole(case, kernel, edges))  # fmt: skip


def weights_gradient() -> Iterator[Kernel]:
    """csrc/cuda/normalized_adjacency_backward.cu; no step has need of it."""
    edges = float(N * NEIGHBOURS)
    # Bytes: index and weight, a listed place, a joined one, an entry's column and gradient.
    lists, listed, joined, entry = 8, 8, 16, 8
    for kernel, title, moved, launches in (
        ("list_places", "listed", edges * (lists + 4) + 3.0 * listed * ENTRIES, 2),
        ("join_places", "joined", (entry + listed + joined) * float(ENTRIES), 1),
        ("find_scales", "scales", joined * float(ENTRIES), 1),
        ("find_pulls", "pulls", (joined + 4.0) * ENTRIES, 1),
        ("write_gradients", "written", edges * (lists + 8) + (listed + joined) * float(ENTRIES), 1),
    ):
        yield Kernel("gradient of κ's weights", title, "gather", moved=moved, launches=launches,
                     **counted_whole("gradient of kappa's weights", kernel, edges))  # fmt: skip


def added() -> Iterator[Kernel]:
    """csrc/cuda/add.cu: both graphs read to count, and again to fill."""
    both = float(ENTRIES + N * 2 * 15)
    moved = {"count_union": 4 * both, "fill_union": 8 * both + 8.0 * ENTRIES}
    for kernel, bytes_ in moved.items():
        yield Kernel("add", {"count_union": "counted", "fill_union": "filled"}[kernel], "stream",
                     moved=bytes_, launches=1 if kernel == "fill_union" else 8,
                     **counted_whole("add of photographs", kernel, both))  # fmt: skip


#: Instructions of spmm_shared_rows' machine code (sm_80; 49 in its inner loop, for a row of x and
#: four of κ; about 33 an entry) to those that are counted as g++ makes them.
MACHINE_CODE = 0.4


def spmm_kernels() -> Iterator[Kernel]:
    """csrc/cuda/spmm.cu: of photographs, whose rows beside each other share x's, and of others."""
    for graph, dtype, bytes_ in (
        ("photographs", "float32", 4), ("photographs", "bfloat16", 2),
        ("scattered clusters", "float32", 4),
    ):  # fmt: skip
        found = counted_whole(f"spmm of {graph}, {dtype}", "spmm_shared_rows", ENTRIES)
        found["issued"] *= MACHINE_CODE
        yield replace(
            sparse(dtype, bytes_), part="spmm", name=f"spmm, {dtype}, {graph}", launches=2, **found
        )


#: κ of a whole data set (train --method spectral), and the block of vectors that it multiplies;
#: entries as counted of 64,000 nodes with 64 neighbours.
DATA_SET, DATA_SET_ENTRIES, VECTORS = 131_072, 90 * 131_072, 160


def data_set_product() -> Kernel:
    """csrc/cuda/spmm.cu, of more nodes than a bitmap has bits: rows of x are gathered."""
    x = 4.0 * DATA_SET * VECTORS
    return Kernel(
        "spmm", "spmm, float32, a data set's 131,072 nodes, 160 columns", "gather",
        {"float32": 2.0 * DATA_SET_ENTRIES * VECTORS}, 8.0 * DATA_SET_ENTRIES + 2 * x,
        4.0 * DATA_SET_ENTRIES * VECTORS, x, 2,
    )  # fmt: skip


def cuda_kernels() -> list[Kernel]:
    """Those of csrc/cuda, in the order of the graph's assembly and of the objective."""
    return [
        *knn_fused(), *knn_baseline(), *knn_pixels(),
        *merged("kappa", NEIGHBOURS + 15, 2, "fill_both_merged"),
        *merged("normalized_adjacency", NEIGHBOURS, 1, "fill_merged"),
        *weights_gradient(), *added(), *spmm_kernels(), data_set_product(),
    ]  # fmt: skip
