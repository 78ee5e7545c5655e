"""``python -m bench.roofline``: what the kernels should take on a GPU, into docs/gpu.md.

Everything is computed from the paper's size and the rates of data sheets: an estimate, to be held
against what ``pytest bench/ --benchmark`` measures where there is a GPU. ``--resources`` compiles
every kernel ahead of time, Triton's and those of csrc/cuda (which takes nvcc), and writes what each
needs; that takes minutes.
"""

from __future__ import annotations

import functools
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.graph_inputs import SIZES
from bench.harness import Rates, Work
from bench.report import with_table
from nefkern.runtime.errors import ArgumentParser, UserError, command
from nefkern.runtime.files import replace_file
from nefkern.triton.rates import GPUS, H100, RTX_3090, Gpu

PAGE = Path(__file__).parents[1] / "docs" / "gpu.md"
#: What ``python -m tests.emulator.costs --json`` printed.
COUNTS = Path(__file__).parent / "counts.json"
#: What ``python -m bench.machine_code`` printed.
ATTENTION = Path(__file__).parent / "attention.json"

# The paper's size. κ's entries: counted on clustered features.
B, PATCHES, C, NEIGHBOURS, K = SIZES["paper"]
N = B * PATCHES
ENTRIES = 5_200_000
WIDTH, HIDDEN, HEADS, HEAD_DIM, BLOCKS = 3 * C, 576, 18, 64, 2  # ψ
VIT_TOKENS, VIT_BLOCKS = B * (PATCHES + 1), 12  # ViT-S/16 at 480 x 480, with its class token
# Training in the paper (section 4.1): half a day on one RTX 3090.
STEPS = 40 * (4998 // B)
THEN = 12 * 3600 / STEPS

#: The share of a peak rate of arithmetic that a kernel of each kind is expected to reach.
ARITHMETIC = {
    "library product": 0.65,
    "tile product": 0.45,
    "mma.sync product": 0.35,
    "float32 product": 0.5,
    "thin product": 0.25,
    "register product": 0.25,
    "selection": 0.5,
    "gather": 0.5,
    "stream": 0.5,
    "sort": 0.5,
    "factorisation": 0.3,
}
MEMORY, CACHE = 0.8, 0.6  # the same of device memory and of the L2 cache
#: The same of shared memory's wavefronts and of the instructions issued, as g++ makes them.
SHARED, ISSUE = 0.8, 0.6
SECTOR = 32  # bytes of a cache's sector
UNROLLED = 0.5  # what nvcc, which unrolls, leaves of these, at the least
LAUNCH = 3e-6  # seconds from the end of one kernel to the start of the next,
SHORT_LAUNCH = 1e-6  # at the least


@dataclass(frozen=True)
class Kernel:
    """One kernel, or several of one kind, with what it does at the paper's size.

    Attributes:
        part: the part of a training step that it belongs to.
        kind: a key of ARITHMETIC.
        flops: by the precision of :class:`Gpu` that they run in.
        moved: bytes read from and written to device memory.
        cached: bytes read through the L2 cache again and again.
        cached_once: the same at the least, where the first-level cache keeps what a block has read;
            None: no less.
        resident: bytes that must stay in it for that; what exceeds it comes from device memory.
        launches: how many kernels it is.
        shared: wavefronts of shared memory and of the first-level cache, which are one unit, and
            shuffles, which take the same path.
        issued: instructions of warps.
        code: ``shared`` and ``issued`` by architecture, where they are known of each.
    """

    part: str
    name: str
    kind: str
    flops: dict[str, float] = field(default_factory=dict)
    moved: float = 0.0
    cached: float = 0.0
    resident: float = 0.0
    launches: int = 1
    shared: float = 0.0
    issued: float = 0.0
    cached_once: float | None = None
    code: dict[str, tuple[float, float]] = field(default_factory=dict)

    def on(self, gpu: Gpu) -> Kernel:
        """The kernel as it is compiled for ``gpu``."""
        shared, issued = self.code.get(gpu.arch, (self.shared, self.issued))
        return replace(self, shared=shared, issued=issued, code={})

    def floor(self, gpu: Gpu) -> float:
        """Seconds at the peak rates, the caches free: no kernel of these operations is faster."""
        flops = {name: getattr(gpu, name) for name in self.flops}
        return Work(self.moved, self.flops).floor(Rates(flops, gpu.memory))

    def least(self, gpu: Gpu) -> float:
        """Seconds: the slowest of arithmetic, cache, memory, shared memory and issue, at peak."""
        cached = self.cached if self.cached_once is None else self.cached_once
        its = self.on(gpu)
        slowest = max(
            self._arithmetic(gpu),
            cached / gpu.cache,
            self._from_memory(gpu, cached) / gpu.memory,
            its.shared / gpu.shared,
            UNROLLED * its.issued / gpu.issue,
        )
        return slowest + self.launches * SHORT_LAUNCH

    def expected(self, gpu: Gpu) -> float:
        """The same, at the shares of the peaks that they may reach."""
        return max(self._expected_parts(gpu).values()) + self.launches * LAUNCH

    def limit(self, gpu: Gpu) -> str:
        """What is the slowest of :meth:`expected`."""
        times = self._expected_parts(gpu)
        slowest = max(times, key=times.get)
        return slowest if times[slowest] > self.launches * LAUNCH else "launches"

    def _expected_parts(self, gpu: Gpu) -> dict[str, float]:
        its = self.on(gpu)
        return {
            "arithmetic": self._arithmetic(gpu) / ARITHMETIC[self.kind],
            "L2": self.cached / (gpu.cache * CACHE),
            "DRAM": self._from_memory(gpu, self.cached) / (gpu.memory * MEMORY),
            "shared": its.shared / (gpu.shared * SHARED),
            "issue": its.issued / (gpu.issue * ISSUE),
        }

    def _arithmetic(self, gpu: Gpu) -> float:
        return sum(count / getattr(gpu, name) for name, count in self.flops.items())

    def _from_memory(self, gpu: Gpu, cached: float) -> float:
        """Bytes: what is moved, and what of ``cached`` no longer fits into the cache."""
        missed = cached * max(0.0, 1 - gpu.cache_bytes / self.resident) if self.resident else 0
        return self.moved + missed


# ---- counts of the emulator ----


@functools.cache
def counts() -> dict[str, dict[str, dict[str, float]]]:
    return json.loads(COUNTS.read_text())


def counted(case: str, kernel: str, times: float) -> dict[str, float]:
    """``shared`` and ``issued`` of ``times`` rows of a case."""
    cost = counts()[case][kernel]
    shared = cost["shared_wavefronts"] + cost["shuffles"] + cost.get("lines", 0.0)
    return {"shared": times * shared, "issued": times * cost["issued"]}


def counted_whole(case: str, kernel: str, times: float) -> dict[str, float]:
    """The same, and the bytes that go through the L2 cache."""
    cost = counts()[case][kernel]
    once = times * SECTOR * (cost["sectors_once"] + cost["sectors_written"])
    asked = times * SECTOR * (cost["sectors_read"] + cost["sectors_written"])
    return counted(case, kernel, times) | {"cached": asked, "cached_once": once}


def graph_kernels() -> Iterator[Kernel]:
    """κ: both neighbour searches, both graphs, their sum."""
    scores, candidates, capacity = 4.0 * N * N, N * 300, N * (NEIGHBOURS + NEIGHBOURS // 2)
    yield Kernel("κ", "knn: rows rounded", "stream", moved=N * C * (4 * 5 + 2), launches=12)
    yield Kernel("κ", "knn: scores", "tile product", {"half": 2.0 * N * N * C},
                 N * C * 2, scores, 32 << 20, 26)  # fmt: skip
    # Extremes, about ten halvings of the interval, and the collection.
    yield Kernel("κ", "knn: selection", "selection", cached=12 * scores, resident=32 << 20,
                 launches=26)  # fmt: skip
    yield Kernel("κ", "knn: re-rank", "gather", {"float32": 2.0 * candidates * C},
                 N * C * 4, candidates * C * 4.0, N * C * 4, 26)  # fmt: skip
    yield Kernel("κ", "knn: sort, results", "sort", moved=capacity * 8 * 8 + N * NEIGHBOURS * 8,
                 launches=78)  # fmt: skip
    # 5 channels: all values in float32, then the same selection, twice (k̃ = 10 and 5).
    near = 2 * 4.0 * N * PATCHES
    yield Kernel("κ", "knn of pixels", "selection", {"float32": 2 * 10.0 * N * PATCHES},
                 near, 12 * near, 32 << 20, 40)  # fmt: skip
    yield Kernel("κ", "normalized_adjacency", "sort", moved=1.1e9 * (1 + 15 / NEIGHBOURS),
                 launches=40)  # fmt: skip
    yield Kernel("κ", "add", "stream", moved=2 * 8.0 * ENTRIES + 8 * 2 * ENTRIES, launches=6)


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


#: Nodes of the counted case (tests/emulator/costs.py).
HUB_NODES = 2400
#: Rounds of loads, one after the other, of a block that merges a row: two passes over its names,
#: four a thread at a time, and one over its entries; and seconds of one, from the L2 cache.
MERGE_THREADS, LOADS_AT_ONCE, LATENCY = 256, 4, 0.7e-6


def hub() -> str:
    """What the dearest row of κ costs, one that half of all nodes name, beside all of them."""
    names = N // 2
    case = counts()["kappa of a hub of half the nodes"]["merge_rows"]
    clocks = case["longest_block"] * names / (HUB_NODES // 2)
    waits = names / MERGE_THREADS * (2 / LOADS_AT_ONCE + 1) * LATENCY
    whole = [k for k in merged("kappa", NEIGHBOURS + 15, 2, "fill_both_merged")
             if k.name == "rows merged"]  # fmt: skip
    return (
        f"A hub that half of the {N:,} nodes name: on an H100 its block takes "
        f"{clocks / H100.clock * 1e6:.0f} µs by the counts of the first-level cache and some "
        f"{waits * 1e6:.0f} µs by the latency of its loads; it is begun first, and all rows "
        f"take {span(whole, H100)} ms."
    )


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


def sparse(dtype: str, bytes_: int) -> Kernel:
    """κU by gathered rows."""
    return Kernel(
        "objective",
        f"spmm, {dtype}",
        "gather",
        {"float32": 2.0 * ENTRIES * K},
        8.0 * ENTRIES + 2 * N * K * bytes_,
        float(ENTRIES * K * bytes_),
        N * K * bytes_,
    )


#: Operations of the formula (reference/normalized_adjacency.py), a kernel each.
BACKWARD_LAUNCHES = 78


def gradient_kernels() -> Iterator[Kernel]:
    """Of κ's values by Triton, and of the lists' weights by PyTorch where csrc/cuda is not built;
    no step has need of them."""
    for name, case, kernel, times, launches, kind in (
        ("sddmm, float32", "sddmm of photographs (Triton)", "sddmm", float(ENTRIES), 1, "gather"),
        ("gradient of κ's weights, PyTorch's", "gradient of kappa's weights (PyTorch)",
         "kappa_backward",
         float(N * NEIGHBOURS), BACKWARD_LAUNCHES, "stream"),
    ):  # fmt: skip
        cost = counts()[case][kernel]
        bytes_ = SECTOR * times * (cost["sectors_read"] + cost["sectors_written"])
        if kind == "gather":  # rows of y again and again
            own = 12.0 * ENTRIES + 8.0 * N * K
            yield Kernel("gradients", name, kind, {"float32": 2.0 * ENTRIES * K}, own, bytes_,
                         4.0 * N * K, launches)  # fmt: skip
        else:
            yield Kernel("gradients", name, kind, moved=bytes_, launches=launches)


def objective_kernels() -> Iterator[Kernel]:
    """Gumbel-Softmax, L2 batch norm, the loss and its gradient, what is logged."""
    yield sparse("float32", 4)
    for name in ("R = UᵀY", "dL/dU = Y M"):
        yield Kernel("objective", name, "thin product", {"float32": 2.0 * N * K * K}, 8.0 * N * K)
    yield Kernel("objective", "Gumbel-Softmax, norms, logging", "stream", moved=27 * 4.0 * N * K,
                 launches=60)  # fmt: skip


def attention_code(amp: bool) -> dict[str, tuple[float, float]]:
    """Of a block's linear attention at this size, both passes, "softmax": wavefronts of shared
    memory and instructions by architecture, counted in the machine code."""
    found = {}
    for arch, by_dtype in json.loads(ATTENTION.read_text()).items():
        kernels = by_dtype["bfloat16" if amp else "float32"].values()
        found[arch] = tuple(1e6 * sum(k[what] for k in kernels) for what in ("shared", "issued"))
    return found


CHUNKS = -(-PATCHES // 256)


def attention(amp: bool) -> Kernel:
    """Linear attention, both blocks of ψ, forward and backward: 2 and 4 products of D x D states.

    Arrays of [B, H, N, D]: q, k, v, out; then q, k, v, gradient in, dq, dk, dv. Besides, through
    the cache: S and dS, written by every chunk of 256 tokens, joined, and read by every chunk.
    """
    product = 2.0 * B * HEADS * PATCHES * HEAD_DIM**2
    array = (2.0 if amp else 4.0) * B * HEADS * PATCHES * HEAD_DIM
    states = 4.0 * B * HEADS * HEAD_DIM**2 * (7 * CHUNKS + 3)
    code = {
        arch: (BLOCKS * shared, BLOCKS * issued)
        for arch, (shared, issued) in attention_code(amp).items()
    }
    shared, issued = code[H100.arch]
    return Kernel(
        "ψ",
        f"linear_attention, {'bfloat16' if amp else 'float32'}",
        "register product",
        {"half": BLOCKS * 6 * product * (1 if amp else 3)},
        BLOCKS * 11 * array,
        BLOCKS * (11 * array + states),
        1.0,  # the arrays are in device memory anyway
        launches=BLOCKS * 6,
        shared=shared,
        issued=issued,
        code=code,
    )


def psi_flops() -> float:
    """Products of ψ's forward pass: qkv, projection and MLP of each block, and the head."""
    block = 2 * WIDTH * (3 * WIDTH + WIDTH + 2 * HIDDEN)
    return float(N * (BLOCKS * block + 2 * WIDTH * K))


def psi_parameters() -> int:
    """Weights and biases of ψ."""
    linear = [(WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, HIDDEN), (HIDDEN, WIDTH)]
    block = sum(i * o + o for i, o in linear) + 4 * WIDTH
    return BLOCKS * block + 2 * WIDTH + WIDTH * K + K


def psi_kernels(amp: bool) -> Iterator[Kernel]:
    """ψ forward and backward, and Adam."""
    precision = "half" if amp else "float32"
    yield Kernel("ψ", "products", "library product", {precision: 3 * psi_flops()}, launches=30)
    yield attention(amp)
    # LayerNorm, residuals, GELU, bias gradients: about 30 arrays [N, width] a block, both ways.
    yield Kernel("ψ", "LayerNorm, GELU, residuals", "stream",
                 moved=BLOCKS * 30 * 4.0 * N * WIDTH, launches=BLOCKS * 40)  # fmt: skip
    # Gram matrix, Cholesky, triangular solve and their gradients, in float64.
    yield Kernel("ψ", "orthogonal head", "factorisation", {"float64": 6 * 2.0 * K * K * WIDTH},
                 8.0 * 8 * K * WIDTH, launches=100)  # fmt: skip
    yield Kernel("Adam", "Adam, fused", "stream", moved=28.0 * psi_parameters())


def backbone_flops() -> float:
    """A forward pass of ViT-S/16: qkv, projection, MLP of 4C, softmax attention, patches."""
    block = 2 * C * (3 * C + C + 8 * C) + 4 * (PATCHES + 1) * C
    return float(VIT_TOKENS * (VIT_BLOCKS * block + 2 * 768 * C))


def backbone_kernels(amp: bool) -> Iterator[Kernel]:
    """The frozen backbone, forward."""
    precision, bytes_ = ("half", 2) if amp else ("float32", 4)
    yield Kernel("backbone", "ViT-S/16, forward", "library product", {precision: backbone_flops()},
                 launches=VIT_BLOCKS * 15)  # fmt: skip
    # LayerNorm, residuals, GELU: about 20 arrays [tokens, C] a block.
    yield Kernel("backbone", "LayerNorm, GELU, residuals", "stream",
                 moved=VIT_BLOCKS * 20.0 * bytes_ * VIT_TOKENS * C)  # fmt: skip


def step(amp: bool) -> list[Kernel]:
    """A training step, in order."""
    return [
        *backbone_kernels(amp),
        *graph_kernels(),
        *psi_kernels(amp),
        *objective_kernels(),
    ]


# ---- the page ----


def milliseconds(seconds: float) -> str:
    """About two digits: no estimate has more."""
    amount = seconds * 1e3
    return f"{amount:.{0 if amount >= 10 else 1 if amount >= 1 else 2}f}"


def span(kernels: Sequence[Kernel], gpu: Gpu) -> str:
    """Milliseconds of all of them, from least to expected."""
    ends = sum(k.least(gpu) for k in kernels), sum(k.expected(gpu) for k in kernels)
    return "–".join(map(milliseconds, ends))


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def rates_table() -> str:
    """The data sheets' figures that everything else is computed from."""
    lines = [
        _row("", *(f"{gpu.name} ({gpu.arch})" for gpu in GPUS)),
        "|---|" + "---|" * len(GPUS),
    ]
    kinds = [("bfloat16, float16, TFLOP/s", "half", 1e12), ("TF32, TFLOP/s", "tf32", 1e12),
             ("float32, TFLOP/s", "float32", 1e12), ("float64, TFLOP/s", "float64", 1e12),
             ("memory, GB/s", "memory", 1e9), ("L2, GB/s (see below)", "cache", 1e9),
             ("L2, MiB", "cache_bytes", 2**20), ("multiprocessors", "multiprocessors", 1),
             ("clock, GHz", "clock", 1e9)]  # fmt: skip
    for title, name, unit in kinds:
        lines.append(_row(title, *(f"{getattr(gpu, name) / unit:.4g}" for gpu in GPUS)))
    return "\n".join(lines)


def kernel_table(kernels: Sequence[Kernel]) -> str:
    """One row a kernel: its work, what limits it, and its time on each GPU."""
    names = [f"{gpu.name}, ms" for gpu in GPUS]
    lines = [_row("kernel", "kind", "GFLOP", "memory, MB", "L2, MB", "shared, 10⁶", "issued, 10⁶",
                  "slowest on an H100", *names)]  # fmt: skip
    lines.append("|---|---|" + "---:|" * 5 + "---|" + "---:|" * len(names))
    for kernel in kernels:
        work = (sum(kernel.flops.values()) / 1e9, kernel.moved / 1e6, kernel.cached / 1e6,
                kernel.shared / 1e6, kernel.issued / 1e6)  # fmt: skip
        times = [span([kernel], gpu) for gpu in GPUS]
        shown = [f"{amount:,.0f}" if amount >= 0.5 else "" for amount in work]
        lines.append(_row(kernel.name, kernel.kind, *shown, kernel.limit(H100), *times))
    return "\n".join(lines)


def step_table() -> str:
    """A step by parts, with --amp and in float32, and how often it fits into the paper's."""
    lines = [_row("part, ms", *(f"{gpu.name}, {how}" for gpu in GPUS
                                         for how in ("amp", "float32")))]  # fmt: skip
    lines.append("|---|" + "---:|" * (2 * len(GPUS)))
    columns = [(gpu, step(amp)) for gpu in GPUS for amp in (True, False)]
    for part in dict.fromkeys(kernel.part for kernel in step(True)):
        times = (span([k for k in kernels if k.part == part], g) for g, kernels in columns)
        lines.append(_row(part, *times))
    totals = [sum(k.expected(g) for k in kernels) for g, kernels in columns]
    floors = [sum(k.floor(g) for k in kernels) for g, kernels in columns]
    lines.append(_row("**step**", *(f"**{span(kernels, g)}**" for g, kernels in columns)))
    lines.append(_row("its floor", *map(milliseconds, floors)))
    lines.append(_row("images a second", *(f"{B / t:,.0f}" for t in totals)))
    minutes = (f"{STEPS * t / 60:.0f} min" for t in totals)
    lines.append(_row(f"{STEPS:,} steps", *minutes))
    return "\n".join(lines)


def yardstick() -> str:
    """A step on the RTX 3090 beside a step of the paper's training."""
    amp, plain = (sum(k.expected(RTX_3090) for k in step(how)) for how in (True, False))
    return (
        f"Half a day for {STEPS:,} steps is {THEN:.2f} s a step on an RTX 3090. Expected on the "
        f"same card: {plain * 1e3:.0f} ms in float32 ({THEN / plain:.0f} times as fast), "
        f"{amp * 1e3:.0f} ms with --amp ({THEN / amp:.0f} times)."
    )


def cuda_table() -> str:
    """The kernels of csrc/cuda, operator by operator, each followed by its sum."""
    rows = []
    for part in dict.fromkeys(kernel.part for kernel in cuda_kernels()):
        kernels = [kernel for kernel in cuda_kernels() if kernel.part == part]
        named = [
            replace(k, name=f"{part}: {k.name}" if part not in k.name else k.name) for k in kernels
        ]
        rows += kernel_table(named).splitlines()[2 if rows else 0 :]
        if len(kernels) > 1 and part != "spmm":
            totals = (f"**{span(kernels, gpu)}**" for gpu in GPUS)
            rows.append(_row(f"**{part}**", *[""] * 7, *totals))
    return "\n".join(rows)


def million_table() -> str:
    """knn of a million rows, before and now."""
    rows = []
    for symmetric in (False, True):
        kernels = million_rows(symmetric)
        named = [replace(k, name=f"{k.name}, {k.part}") for k in kernels]
        rows += kernel_table(named).splitlines()[2 if rows else 0 :]
        totals = (f"**{span(kernels, gpu)}**" for gpu in GPUS)
        rows.append(_row(f"**{kernels[0].part}**", *[""] * 7, *totals))
    return "\n".join(rows)


def cuda_graph() -> str:
    """What κ costs by csrc/cuda beside what it costs by Triton."""
    mine = [k for k in cuda_kernels() if k.part in ("knn, fused", "knn of pixels", "kappa")]
    times = ", ".join(
        f"{gpu.name} {span(mine, gpu)} instead of {span(list(graph_kernels()), gpu)}"
        for gpu in GPUS
    )
    return f"κ by these kernels instead of Triton's, ms: {times}."


def estimates() -> str:
    """The generated part of the page."""
    mixed = [attention(True), sparse("bfloat16", 2), *gradient_kernels()]
    return "\n\n".join(
        [
            "**Estimates, computed from data sheets. None of these times was measured.**",
            "### Rates", rates_table(),
            "### Triton's kernels and the rest of a step: least–expected ms",
            kernel_table([*step(False), *mixed]),
            "### The kernels of csrc/cuda: least–expected ms", cuda_table(), cuda_graph(), hub(),
            "### Products of a million rows, k = 10: least–expected ms", million_table(),
            "### A training step, with Triton's kernels", step_table(), yardstick(),
        ]
    )  # fmt: skip


# ---- resources ----


def condensed(found: Sequence) -> str:
    """One row a kernel and architecture: the worst of its configurations.

    Args:
        found: :class:`nefkern.triton.resources.Resources` of every kernel that ships.
    """
    groups: dict[tuple[str, str], list] = {}
    for row in found:
        groups.setdefault((_kernel_of(row.name), row.arch), []).append(row)
    lines = [
        "| kernel | arch | variants | registers | shared | occupancy | spilled | tensor cores |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for (name, arch), rows in sorted(groups.items(), key=lambda g: (g[0][0], int(g[0][1][3:]))):
        lines.append(
            _row(
                name, arch, str(len(rows)),
                str(max(r.registers for r in rows)),
                f"{max(r.shared for r in rows) / 1024:.1f} KiB",
                f"{min(r.occupancy for r in rows):.0%}",
                f"{max(r.spilled for r in rows)} B",
                ", ".join(sorted({r.instruction or "**none**" for r in rows if r.product})),
            )
        )  # fmt: skip
    return "\n".join(lines)


def _kernel_of(name: str) -> str:
    """Operator and kernel without the variant: no word with a digit or a comma is a kernel."""
    return re.match(r"\w+( [a-z_]+\b(?!,))?", name)[0]


def triton_resources() -> str:
    from nefkern.triton.resources import ARCHITECTURES, examine_all

    return condensed(examine_all(ARCHITECTURES))


def cuda_resources() -> str:
    """The kernels of csrc/cuda; threads and shared memory as they are launched at this size."""
    from tests.cuda import launchers, resources

    if missing := launchers.missing_tool() or (not resources.cuobjdump() and "no cuobjdump"):
        raise UserError(f"{missing}: expected the CUDA toolkit, and cmake and g++")
    return resources.condensed(resources.examine_all(), launchers.launched())


#: The generated parts of the page, by the name in their markers.
PARTS = {
    "estimates": estimates, "resources": triton_resources, "cuda-resources": cuda_resources,
}  # fmt: skip


def written(page: str, name: str, text: str) -> str:
    """The page with ``text`` between the markers of its generated part ``name``."""
    begin = f"<!-- {name}: written by python -m bench.roofline -->"
    return with_table(page, text, path=PAGE, begin=begin, end=f"<!-- end of {name} -->")


@command
def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m bench.roofline", description=__doc__.split("\n\n")[1])
    parser.add_argument(
        "--resources", nargs="?", const="all", choices=("all", "triton", "cuda"),
        help="compile the kernels (all, or those of one kind): write those parts instead",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    names = {
        None: ["estimates"], "all": ["resources", "cuda-resources"],
        "triton": ["resources"], "cuda": ["cuda-resources"],
    }[options.resources]  # fmt: skip
    for name in names:
        replace_file(PAGE, written(PAGE.read_text(), name, PARTS[name]()))
        print(f"{PAGE}: {name} written")


if __name__ == "__main__":
    sys.exit(main())
