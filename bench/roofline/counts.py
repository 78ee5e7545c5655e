"""What the emulator and the machine code say that kernels ask of a GPU."""

from __future__ import annotations

import functools
import json
from pathlib import Path

#: What ``python -m tests.emulator.costs --json`` printed.
COUNTS = Path(__file__).parents[1] / "counts.json"
#: What ``python -m bench.machine_code`` printed.
ATTENTION = Path(__file__).parents[1] / "attention.json"

SECTOR = 32  # bytes of a cache's sector


@functools.cache
def counts() -> dict[str, dict[str, dict[str, float]]]:
    return json.loads(COUNTS.read_text("utf-8"))


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


def attention_code(amp: bool) -> dict[str, tuple[float, float]]:
    """Of a block's linear attention at this size, both passes, "softmax": wavefronts of shared
    memory and instructions by architecture, counted in the machine code."""
    found = {}
    for arch, by_dtype in json.loads(ATTENTION.read_text("utf-8")).items():
        kernels = by_dtype["bfloat16" if amp else "float32"].values()
        found[arch] = tuple(1e6 * sum(k[what] for k in kernels) for what in ("shared", "issued"))
    return found
