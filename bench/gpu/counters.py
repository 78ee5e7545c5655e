"""Stage "counters": what ncu counts of the kernels that the model is least sure of.

These are the ones whose time, measured before, is furthest from the model's, by what it costs.
"""

from __future__ import annotations

import csv
import io
import math
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

from bench.gpu import process, tools
from bench.gpu.document import cases, read
from bench.gpu.plan import COUNTED, Settings
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
    "tensor cores": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "memory share": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "L2 share": "lts__t_sectors.avg.pct_of_peak_sustained_elapsed",
    "occupancy": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
}
#: Where nothing was measured: an operator's kernels that the estimates rest on most.
DOUBTFUL = ("knn cosine/cuda/float32", "spmm/cuda/float32",
            "linear_attention softmax/triton/bfloat16", "knn cosine/triton/float32")  # fmt: skip
LIMIT = 45.0  # seconds
REFUSED = ("ERR_NVGPUCTRPERM", "LibraryNotLoaded", "Failed to initialize", "No kernels were")
UNITS = {"n": 1e-9, "u": 1e-6, "m": 1e-3, "s": 1.0}


def run(case: str, settings: Settings) -> Iterator[dict[str, Any]]:
    """The rank of a call among those to look at, from "1"."""
    if settings.rehearsal:
        raise Skipped("a rehearsal has no GPU whose counters could be read")
    ncu = tools.find("ncu")
    if ncu is None:
        raise Skipped("no ncu on the PATH or in the CUDA toolkit")
    call = least_sure(read(settings.out), settings.size)[int(case) - 1]
    yield {"call": call}
    done = profiled(ncu, call, settings)
    if refused := next((word for word in REFUSED if word in done.output), None):
        said = next(line for line in done.output.splitlines() if refused in line)
        raise Skipped(f"ncu cannot read the counters: {said.strip()}")
    launches = counted(done.output)
    yield {"launches": launches}
    if not launches:
        yield {"output": process.tail(done.output)}
        raise RuntimeError("ncu: " + ("no table" if done.code is not None else f"{LIMIT:.0f} s"))


def profiled(ncu: str, call: str, settings: Settings) -> process.Finished:
    """Under ncu, without the metrics that this one does not know."""
    metrics, end = set(METRICS.values()), time.monotonic() + LIMIT
    while True:
        done = process.run(command(ncu, call, settings, metrics), end - time.monotonic())
        unknown = metrics & set(re.findall(r"Failed to find metric (?:regex:)?(\S+)", done.output))
        if not unknown or done.code is None:
            return done
        metrics -= unknown


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
    return [*known, *(name for name in others if name not in doubts)][: len(COUNTED)]


def command(ncu: str, case: str, settings: Settings, metrics: set[str]) -> list[object]:
    """One call under ncu, after one that compiles. The clocks are left alone: they are shared."""
    return [
        ncu, "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none",
        "--profile-from-start", "off", "--target-processes", "all",
        "--metrics", ",".join(sorted(metrics)),
        sys.executable, "-m", "bench.gpu.one_call", case, settings.size,
    ]  # fmt: skip


def counted(output: str) -> list[dict[str, Any]]:
    """Each launch's counters by their names in METRICS, from ncu's table of raw values."""
    begin = re.search(r'^"ID"', output, re.M)
    if begin is None:
        return []
    units, *rows = csv.DictReader(io.StringIO(output[begin.start() :]))
    unit = UNITS[(units.get(METRICS["seconds"]) or "n")[0]]
    found = []
    for row in rows:
        figures = {name: _number(row.get(metric)) for name, metric in METRICS.items()}
        if figures["seconds"] is not None:
            figures["seconds"] *= unit
        found.append({"kernel": row["Kernel Name"], **figures})
    return found


def _number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None
