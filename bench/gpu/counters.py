"""Stage "counters": what ncu counts of the kernels that the model is least sure of.

These are the ones whose time, measured before, is furthest from the model's, by what it costs.
"""

from __future__ import annotations

import csv
import io
import math
import re
import sys
from collections.abc import Iterator
from typing import Any

from bench.gpu import process, tools
from bench.gpu.document import cases, read
from bench.gpu.plan import Settings
from bench.gpu.worker import Skipped

#: The share of the model's resources that a kernel used, and why its warps waited.
METRICS = {
    "seconds": "gpu__time_duration.sum",
    "memory bytes": "dram__bytes.sum",
    "L2 bytes": "lts__t_bytes.sum",
    "shared wavefronts": "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",
    "bank conflicts": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
    "instructions": "smsp__inst_executed.sum",
    "issue slots": "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "tensor cores": "sm__inst_executed_pipe_tensor.sum",
    "memory share": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "L2 share": "lts__t_sectors.avg.pct_of_peak_sustained_elapsed",
    "occupancy": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
}
#: Where nothing was measured: an operator's kernels that the estimates rest on most.
DOUBTFUL = ("knn cosine/cuda/float32", "spmm/cuda/float32",
            "linear_attention softmax/triton/bfloat16", "knn cosine/triton/float32")  # fmt: skip
MOST, LIMIT = 4, 40.0
REFUSED = ("ERR_NVGPUCTRPERM", "LibraryNotLoaded", "Failed to initialize", "No kernels were")


def run(case: str, settings: Settings) -> Iterator[dict[str, Any]]:
    if settings.rehearsal:
        raise Skipped("a rehearsal has no GPU whose counters could be read")
    ncu = tools.find("ncu")
    if ncu is None:
        raise Skipped("no ncu on the PATH or in the CUDA toolkit")
    for doubtful in least_sure(read(settings.out), settings.size):
        done = process.run(command(ncu, doubtful, settings), LIMIT)
        if refused := next((word for word in REFUSED if word in done.output), None):
            said = next(line for line in done.output.splitlines() if refused in line)
            raise Skipped(f"ncu cannot read the counters: {said.strip()}")
        if done.code is None:
            yield {doubtful: f"ended after {LIMIT:.0f} s"}
            continue
        yield {doubtful: counted(done.output) or process.tail(done.output)}


def least_sure(content: dict[str, Any], size: str) -> list[str]:
    """Cases of stage "kernels", the most doubtful first: by |log(measured / predicted)| times the
    seconds measured."""
    doubts = {}
    for name, found in cases(content, "kernels").items():
        measured, predicted = found.get("device"), found.get("predicted")
        if measured and predicted:
            doubts[name] = abs(math.log(measured / predicted)) * measured
    known = sorted(doubts, key=lambda name: -doubts[name])
    others = [f"{name}/{size}" for name in DOUBTFUL]
    return [*known, *(name for name in others if name not in doubts)][:MOST]


def command(ncu: str, case: str, settings: Settings) -> list[object]:
    """One call under ncu, after one that compiles. The clocks are left alone: they are shared."""
    return [
        ncu, "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none",
        "--profile-from-start", "off", "--target-processes", "all",
        "--metrics", ",".join(METRICS.values()),
        sys.executable, "-m", "bench.gpu.one_call", case, settings.size,
    ]  # fmt: skip


def counted(output: str) -> list[dict[str, Any]]:
    """Each launch's counters by their names in METRICS, from ncu's table of raw values."""
    begin = re.search(r'^"ID"', output, re.M)
    if begin is None:
        return []
    rows = csv.DictReader(io.StringIO(output[begin.start() :]))
    found = []
    for row in rows:
        if not row["ID"]:  # the units
            continue
        figures = {name: _number(row.get(metric)) for name, metric in METRICS.items()}
        if figures["seconds"] is not None:
            figures["seconds"] /= 1e9  # base units: nanoseconds
        found.append({"kernel": row["Kernel Name"], **figures})
    return found


def _number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None
