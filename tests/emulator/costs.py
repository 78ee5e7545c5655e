"""``python -m tests.emulator.costs``: what the CUDA kernels ask of a GPU, counted without one.

Runs the kernels of ``csrc/cuda`` on the emulator at shapes like the paper's, fewer rows where it is
slow, and counts for every kernel, per row of its result (entry, pair; what is said):

- counted: wavefronts of shared memory with their bank conflicts, shuffles (which take the same
  path), 32-byte sectors of global memory (``sectors_read`` as asked for, ``sectors_once`` where a
  block's first-level cache keeps all that it has read, ``sectors_written``), products of tensor
  cores, and instructions of memory, collectives and barriers.
- estimated: ``issued``, all instructions of a warp: the basic blocks that it ran, weighed by their
  arithmetic, comparisons and branches as g++ compiles them, without unrolling (but for spmm).
  nvcc's are fewer: of spmm's 83 an entry some 33.

Lanes of a warp that part and meet again are taken together as far as they can be; see
cost_counter.cpp. Atomic operations on one word of shared memory are counted one by one.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from tests.emulator import emulated, graphs, other_costs
from tests.emulator.graphs import Lists

#: Instructions of x86 that a GPU has none for, or that are counted elsewhere (memory, calls).
NOT_ISSUED = re.compile(r"(c?mov|push|pop|call|ret|nop|endbr|leave|cdq|cqo|xchg|data16|cs$|hlt)")
#: Calls that are an instruction of a GPU, or two.
ARITHMETIC_CALL = re.compile(r"<(fmaf?|sqrtf?|fabsf?|fm(in|ax)f?)@plt")

#: What stands in for an instruction of a GPU, and the emulator's own.
TWIN = re.compile(r"nefkern::(emulator::|cuda::(twins::|cp_async_|mma_|ldmatrix_))")


@dataclass(frozen=True)
class Cost:
    """What a kernel asks of a GPU for one row (or entry, or pair: the case's unit)."""

    shared_wavefronts: float
    shuffles: float
    lines: float
    sectors_read: float
    sectors_once: float
    sectors_written: float
    mma: float
    issued: float
    #: Clocks of :attr:`first_level` that the dearest of all blocks takes; not of one row.
    longest_block: float = 0.0

    @property
    def shared(self) -> float:
        """Clocks of a multiprocessor's shared memory: wavefronts and shuffles take one each."""
        return self.shared_wavefronts + self.shuffles

    @property
    def first_level(self) -> float:
        """The same of the unit that shared memory and the first-level cache are."""
        return self.shared + self.lines

    @property
    def cached(self) -> tuple[float, float]:
        """Bytes between the L2 cache and the multiprocessors: least, most."""
        return (
            32 * (self.sectors_once + self.sectors_written),
            32 * (self.sectors_read + self.sectors_written),
        )


@dataclass(frozen=True)
class Case:
    """A run of a program: arrays, numbers, and by what its counts are divided."""

    program: str
    case: str
    rows: int | Callable[[], int]
    make: Callable[[], tuple[Mapping[str, np.ndarray], Mapping[str, float]]]

    def run(self) -> dict[str, Cost]:
        """Costs by kernel."""
        inputs, numbers = self.make()
        found = counted(self.program, self.case, inputs, numbers)
        rows = self.rows if isinstance(self.rows, int) else self.rows()
        return {name: cost_of(counts, rows) for name, counts in found.items()}


def counted(
    program: str, case: str, inputs: Mapping[str, np.ndarray], numbers: Mapping[str, float]
) -> dict[str, dict]:
    """The raw counts of every kernel that a case launches; ``issued`` among them."""
    executable = emulated.build(program, ("counts",))["counts"]
    with tempfile.TemporaryDirectory() as folder:
        for name, array in inputs.items():
            (Path(folder) / f"{name}.in").write_bytes(np.ascontiguousarray(array).tobytes())
        file = Path(folder) / "counts.json"
        subprocess.run(
            [executable, case, folder, "order=forward", *(f"{k}={v}" for k, v in numbers.items())],
            check=True, env={**os.environ, "NEFKERN_COUNTS": str(file)},
        )  # fmt: skip
        found = json.loads(file.read_text("utf-8"))
    weights = block_weights(executable)
    result = {}
    names = symbols(executable)
    for kernel, counts in found.items():
        code = counts.pop("code")
        arithmetic = sum(weights.get(int(place), 0) * times for place, times in code.items())
        others = ("shared_instructions", "global_instructions", "shuffles", "meetings", "barriers",
                  "mma")  # fmt: skip
        counts["issued"] = arithmetic + sum(counts[other] for other in others)
        result[short_name(names[int(kernel)])] = counts
    return result


def short_name(kernel: str) -> str:
    """``direct_rows`` of ``void nefkern::cuda::direct_rows<(nefkern::...)1>(...)``.

    An argument that says what the kernel does stays: ``estimate_tiles<true>``.
    """
    name = kernel.removeprefix("void ").replace("(anonymous namespace)::", "")
    short = re.split(r"[<(]", name)[0].split("::")[-1]
    kept = re.search(rf"\b{short}(<(true|false)>)", name)
    return short + (kept[1] if kept else "")


@functools.cache
def symbols(executable: Path) -> dict[int, str]:
    """Names of functions by their addresses."""
    listing = subprocess.run(
        ["nm", "-C", "--defined-only", executable], capture_output=True, text=True, check=True
    )
    lines = (line.split(maxsplit=2) for line in listing.stdout.splitlines())
    return {int(address, 16): name for address, kind, name in lines if kind in "tTwW"}


@functools.cache
def block_weights(executable: Path) -> dict[int, int]:
    """Instructions of every basic block, by the address that its call of the hook returns to.

    Those of the kernels: the emulator's own functions weigh nothing.
    """
    listing = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", executable],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    weights: dict[int, int] = {}
    block, waiting, own = None, False, False
    for line in listing.splitlines():
        if head := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            # Some names of templates objdump leaves as they are.
            named = "nefkern::cuda::" in head[1] or "7nefkern4cuda" in head[1]
            own = named and "launch" not in head[1].split("(")[0]
            own = own and not TWIN.search(head[1])
            block = None
            continue
        if not (found := re.match(r"\s*([0-9a-f]+):\t(.*)", line)):
            continue
        address, text = int(found[1], 16), found[2]
        if waiting:
            block, waiting = address, False
            weights[block] = 0
        if "__sanitizer_cov_trace_pc" in text:
            waiting = True
        elif block is not None and own:
            issued = not NOT_ISSUED.match(text) or ARITHMETIC_CALL.search(text)
            weights[block] += bool(issued)
    return weights


def cost_of(counts: Mapping[str, int], rows: int) -> Cost:
    names = {"sectors_once": "sectors_read_once"}
    by_row = {field: counts[names.get(field, field)] / rows for field in Cost.__dataclass_fields__}
    return Cost(**by_row | {"longest_block": counts["longest_block"]})


# ---- the cases ----


def neighbours(
    rows: int, candidates: int, channels: int, k: int, *, method: int = 1, metric: int = 1,
    alike: float = 0, **tuning: float,
) -> Case:  # fmt: skip
    """knn of ``rows`` queries in a database; method and metric as KnnMethod and KnnMetric.

    ``alike``: the correlation of two of four queries that follow one another is its square.
    """

    def make():
        random = np.random.default_rng(0)
        x = random.standard_normal((rows, channels), dtype=np.float32)
        if alike:
            common = random.standard_normal((-(-rows // 4), channels), dtype=np.float32)
            x = alike * common.repeat(4, axis=0)[:rows] + (1 - alike**2) ** 0.5 * x
            x = x.astype(np.float32)
        y = random.standard_normal((candidates, channels), dtype=np.float32)
        inputs = {"features": x, "offsets": np.array([0, rows]), "database": y,
                  "database_offsets": np.array([0, candidates])}  # fmt: skip
        numbers = {"n": rows, "channels": channels, "segments": 1, "k": k, "metric": metric,
                   "include_self": 0, "method": method, "score_bytes": 1 << 24,
                   "chunk_rows": 1024, "sample_share": 16, "keep": 2048, "tile_side": 16,
                   "fused_share": 8, **tuning}  # fmt: skip
        return inputs, numbers

    return Case("knn", "knn", rows, make)


def fused(channels: int, alike: float = 0) -> Case:
    """Eight rows in a tile of 128, with 32 tiles of candidates and eight of their sample.

    Some 270 of a row's candidates get their values.
    """
    return neighbours(8, 4096, channels, 256, method=2, metric=0, sample_share=4,
                      chunk_rows=16384, alike=alike)  # fmt: skip


#: Four neighbouring rows then have 2.2 times as many candidates as differ: those of patches of
#: photographs (16 of VOC 2012, ViT-S/14 of DINOv2, 300 each) have.
PHOTOGRAPHS = 0.93


def sparse(
    lists: Callable[[], Lists], columns: int, *, dtype: str = "float32", rows: int = 128
) -> Case:
    """spmm of ``rows`` rows beside each other of such a graph, per entry."""
    parts = functools.cache(lambda: graphs.some_rows(graphs.adjacency(lists()), rows))

    def make():
        offsets, nodes, values = parts()
        n = len(offsets) - 1
        x = np.ones((n, columns), np.float32 if dtype == "float32" else np.uint16)
        inputs = {"row_offsets": offsets, "columns": nodes, "values": values, "x": x}
        return inputs, {"n": n, "k": columns, "nnz": len(nodes), "stride": columns, "shift": 0}

    return Case("spmm", dtype, lambda: len(parts()[1]), make)


def assembled(
    lists: Callable[[], Lists], *, pixels: bool, merged_nodes: int = 1 << 16, long_names: int = 4096
) -> Case:
    """The lists of both graphs to kappa, or those of features to their graph; per listed
    neighbour."""
    made = functools.cache(lists)

    def make():
        found = made()
        numbers = {"n": len(found.indices), "k": found.indices.shape[1], "clamp_min": 0,
                   "merged_nodes": merged_nodes, "long_names": long_names}  # fmt: skip
        inputs = {"indices": found.indices, "weights": found.weights}
        if not pixels:
            return inputs, numbers | {"take_union": 0}
        near = found.pixels.shape[1]
        return inputs | {"pixel_indices": found.pixels}, numbers | {
            "near": near, "alpha": 0.3, "padded": 0,
        }  # fmt: skip

    def listed() -> int:
        return made().indices.size + pixels * made().pixels.size

    return Case("kappa" if pixels else "normalized_adjacency", "int32", listed, make)


def differentiated(lists: Callable[[], Lists]) -> Case:
    """From the gradient of kappa's values to that of the lists' weights; per listed neighbour."""
    made = functools.cache(lists)

    def make():
        found = made()
        offsets, columns, values = graphs.adjacency(found)
        inputs = {"indices": found.indices, "weights": found.weights, "row_offsets": offsets,
                  "columns": columns, "gradient": values}  # fmt: skip
        numbers = {"n": len(found.indices), "k": found.indices.shape[1], "nnz": len(columns),
                   "clamp_min": 0, "take_union": 0}  # fmt: skip
        return inputs, numbers

    return Case("normalized_adjacency_backward", "int32", lambda: made().indices.size, make)


def summed(lists: Callable[[], Lists]) -> Case:
    """The graph of the lists and that of their pixels, per entry of both."""
    parts = functools.cache(lambda: _both_graphs(lists()))

    def make():
        inputs = {
            f"{name}_{which}": array
            for which, graph in zip("ab", parts(), strict=True)
            for name, array in zip(("row_offsets", "columns", "values"), graph, strict=True)
        }
        nnz = {f"nnz_{which}": len(g[1]) for which, g in zip("ab", parts(), strict=True)}
        return inputs, {"n": len(parts()[0][0]) - 1, "alpha": 0.3, **nnz}

    return Case("add", "add", lambda: sum(len(g[1]) for g in parts()), make)


def _both_graphs(lists: Lists) -> tuple:
    none = lists.indices[:, :0]
    return (
        graphs.adjacency(Lists(lists.indices, lists.weights, none)),
        graphs.adjacency(Lists(lists.pixels, lists.weights, none)),
    )


HUB_NODES = 2400


def photographs() -> Lists:
    """One of 20 x 20 patches: rows nearly as long as the paper's, among fewer nodes."""
    return graphs.photographs(1, 20, 200)


#: By name: the paper's shapes, of fewer rows and channels where that changes nothing for a row.
CASES: dict[str, Case | Other] = {
    "knn pixels, k = 10": neighbours(8, 900, 5, 10),
    "knn pixels, k = 5": neighbours(8, 900, 5, 5),
    "knn select, k = 10": neighbours(4, 14_400, 32, 10),
    "knn select, k = 256": neighbours(4, 14_400, 32, 256),
    "knn select, k = 600": neighbours(2, 14_400, 17, 600),
    "knn select, k = 2,048": neighbours(2, 14_400, 17, 2048),
    # As many and as good a threshold as set_thresholds asks of a sample.
    "knn select of 1,024, k = 40": neighbours(4, 1024, 32, 40),
    # At two widths of 384: products and re-rank grow evenly with channels.
    "knn fused, k = 256, 32 channels": fused(32),
    "knn fused, k = 256, 64 channels": fused(64),
    "knn fused, k = 256, 32 channels, alike": fused(32, PHOTOGRAPHS),
    "knn fused, k = 256, 64 channels, alike": fused(64, PHOTOGRAPHS),
    # Per entry of the graph.
    "spmm of photographs, float32": sparse(lambda: graphs.photographs(4, 30, 256), 256),
    "spmm of photographs, bfloat16": sparse(
        lambda: graphs.photographs(4, 30, 256), 256, dtype="bfloat16"
    ),
    "spmm of scattered clusters, float32": sparse(lambda: graphs.scattered(3600, 256), 256),
    # Per listed neighbour.
    "normalized_adjacency of photographs": assembled(photographs, pixels=False),
    "kappa of photographs": assembled(photographs, pixels=True),
    "kappa of photographs, sorted": assembled(photographs, pixels=True, merged_nodes=0),
    "kappa of a hub": assembled(lambda: graphs.with_hub(photographs()), pixels=True),
    # Beyond what is merged in shared memory, and begun before the others.
    "kappa of a hub of half the nodes": assembled(
        lambda: graphs.half_a_hub(HUB_NODES), pixels=True, long_names=HUB_NODES // 2
    ),
    "gradient of kappa's weights": differentiated(photographs),
    "gradient of kappa's weights, a hub": differentiated(lambda: graphs.with_hub(photographs())),
    # Per entry of both graphs.
    "add of photographs": summed(photographs),
}


def sectors(name: str) -> dict[str, Cost]:
    """Of a kernel that is not of csrc/cuda: sectors alone, the rest is not known."""
    found = other_costs.run()[name]
    read, written = found["sectors_read"], found["sectors_written"]
    return {name: Cost(0, 0, 0, read, read, written, 0, 0)}


@dataclass(frozen=True)
class Other:
    """A case of other_costs.py."""

    name: str

    def run(self) -> dict[str, Cost]:
        return sectors(self.name)


CASES |= {
    # Per entry, and per listed neighbour.
    "sddmm of photographs (Triton)": Other("sddmm"),
    "gradient of kappa's weights (PyTorch)": Other("kappa_backward"),
}


def costs(names: list[str] | None = None) -> dict[str, dict[str, Cost]]:
    return {name: case.run() for name, case in CASES.items() if not names or name in names}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.emulator.costs", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="as JSON instead of a table")
    parser.add_argument("--case", action="append", choices=CASES, help="only this one (repeatable)")
    options = parser.parse_args(arguments)
    found = costs(options.case)
    if options.json:
        plain = {
            case: {k: asdict(c) for k, c in kernels.items()} for case, kernels in found.items()
        }
        print(json.dumps(plain, indent=1))
        return
    fields = list(Cost.__dataclass_fields__)
    print(f"{'case: kernel':44}", *(f"{name:>18}" for name in fields))
    for case, kernels in found.items():
        for kernel, cost in kernels.items():
            numbers = (f"{getattr(cost, name):18,.1f}" for name in fields)
            print(f"{case + ': ' + kernel:44}", *numbers)


if __name__ == "__main__":
    sys.exit(main())
