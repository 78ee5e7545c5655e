"""The compiled launchers of ``csrc/cuda`` on a runtime that records instead of running.

``examples/cpp`` is built with CMake, as any C++ project would; its library ``nefkern::kernels`` is
then linked to ``recording_runtime.cpp`` in place of NVIDIA's runtime.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.cuda.resources import CSRC, nvcc

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "example"
LAUNCH_FAILURE, INVALID_VALUE, INVALID_CONFIGURATION = 719, 1, 9  # of cudaError_t


@dataclass(frozen=True)
class Event:
    """One thing that a launcher enqueued."""

    what: str  # launch, memset, copy, synchronize; between: the two steps of an assembly
    kernel: str  # mangled; "-" where there is none
    grid: tuple[int, int, int]
    threads: int  # a block
    bytes: int  # dynamic shared memory of a launch; of a memset or copy
    asked: int  # the dynamic shared memory that was asked for
    on_stream: bool  # whether the caller's stream was used


@dataclass(frozen=True)
class Recorded:
    events: list[Event]
    workspace: int  # bytes that the launcher wants; 0 where it needs none
    returned: int  # cudaError_t

    @property
    def launches(self) -> list[Event]:
        return [event for event in self.events if event.what == "launch"]


def missing_tool() -> str | None:
    """Which program the build lacks, if any."""
    if nvcc() is None:
        return "no nvcc"
    return next((f"no {name}" for name in ("cmake", "g++") if not shutil.which(name)), None)


def architecture() -> str:
    """Of the GPU here; without one, the oldest there are kernels for, with what later GPUs can
    compile from: one architecture, since each takes its time."""
    if not torch.cuda.is_available() or (here := torch.cuda.get_device_capability()) < (8, 0):
        return "8.0+PTX"
    return f"{here[0]}.{here[1]}{'a' * (here == (9, 0))}"


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """One process at a time: two that build into one folder leave files half-written."""
    BUILD.parent.mkdir(exist_ok=True)
    with open(BUILD.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@functools.cache
def build_example() -> tuple[Path, str]:
    """The folder that the example was built in, and what cmake said."""
    configure = ["cmake", "-S", ROOT / "examples" / "cpp", "-B", BUILD, "-DNEFKERN_WERROR=ON"]
    configure += [f"-DNEFKERN_CUDA={'require' if nvcc() else '0'}"]
    build = ["cmake", "--build", BUILD, "--parallel", "2"]
    environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": architecture()}
    said = ""
    with alone():
        for command in (configure, build):
            done = subprocess.run(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            said += done.stdout
            assert done.returncode == 0, said
    return BUILD, said


@functools.cache
def program() -> Path:
    """``recorded.cpp``, linked to the example's kernels and to the recording runtime."""
    folder, _ = build_example()
    path = folder / "recorded"
    done = subprocess.run(
        [
            nvcc(), "-std=c++20", "-O1", "-cudart=none", "-Xcompiler=-Wall,-Wextra,-Werror",
            f"-I{CSRC}", HERE / "recorded.cpp", HERE / "recording_runtime.cpp",
            folder / "nefkern" / "libnefkern_kernels.a", "-o", path,
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return path


def recorded(op: str, **numbers: float) -> Recorded:
    """What launcher ``op`` enqueues for these sizes; ``fail=i``: call i returns an error."""
    arguments = [f"{name}={value}" for name, value in numbers.items()]
    done = subprocess.run([program(), op, *arguments], capture_output=True, text=True, check=True)
    events, workspace, returned = [], 0, 0
    for line in done.stdout.splitlines():
        what, *rest = line.split()
        if what == "workspace":
            workspace = int(rest[0])
        elif what == "returned":
            returned = int(rest[0])
        else:
            kernel, (*grid, threads, size, asked, on_stream) = rest[0], map(int, rest[1:])
            events.append(Event(what, kernel, tuple(grid), threads, size, asked, bool(on_stream)))
    return Recorded(events, workspace, returned)


#: Every kernel runs in one of these, at the paper's size: N = 14,400, k = 256, K = 256; those that
#: are for more nodes at 100,000.
FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2
BASELINE, FUSED = 1, 2
COSINE, EUCLIDEAN, INNER_PRODUCT = METRICS = 0, 1, 2
PAPER = [
    *(("knn", {"n": 14400, "k": 256, "method": m, "metric": e})
      for m in (BASELINE, FUSED) for e in METRICS),
    *(("knn", {"n": 14400, "k": 10, "channels": 5, "segments": 16, "metric": e})
      for e in METRICS),
    *(("normalized_adjacency", {"n": n, "k": 256}) for n in (14400, 100_000)),
    *(("kappa", {"n": n, "k": 256, "near": 15}) for n in (14400, 100_000)),
    ("normalized_adjacency_backward", {"n": 14400, "k": 256, "nnz": 5_200_000}),
    ("add", {"n": 14400, "nnz": 4_550_000}),
    *(("spmm", {"n": 14400, "nnz": 5_200_000, "columns": c, "shift": s, "storage": x, "wide_y": y})
      for x, y in ((FLOAT32, 1), (FLOAT16, 0), (FLOAT16, 1), (BFLOAT16, 0), (BFLOAT16, 1))
      for c, s in ((256, 0), (512, 0), (128, 0), (64, 0), (256, 4))),
    *(("spmm", {"n": 100_000, "nnz": 5_200_000, "columns": 512, "storage": x, "wide_y": y})
      for x, y in ((FLOAT32, 1), (FLOAT16, 0), (FLOAT16, 1), (BFLOAT16, 0), (BFLOAT16, 1))),
]  # fmt: skip

#: A number of neighbours for every way of selecting, of rows kept as scores or scored on the way.
SELECTIONS = [
    ("knn", {"n": 14400, "k": k, "method": m, "metric": e, **more})
    for k in (10, 256, 600, 1500) for m in (BASELINE, FUSED) for e in METRICS
    for more in ({}, {"channels": 5, "segments": 16}, {"channels": 5}, {"sample_share": 2})
]  # fmt: skip


def launched() -> dict[str, tuple[int, int]]:
    """Every kernel's block: threads, most dynamic shared memory. At the paper's size; of kernels
    that it has no use for, at sizes that have one."""
    return _blocks(SELECTIONS) | _blocks(PAPER)


def _blocks(calls: list[tuple[str, dict[str, int]]]) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for op, sizes in calls:
        for event in recorded(op, **sizes).launches:
            found[event.kernel] = max(found.get(event.kernel, (0, 0)), (event.threads, event.bytes))
    return found
