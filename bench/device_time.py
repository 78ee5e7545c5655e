"""How long a call takes: on the device that does the work, and on the host that asks for it.

A call on a GPU returns when its kernels are enqueued. Events around it measure the host where it is
the slower of the two, so here the device is kept waiting until all of the call is enqueued. Calls
that themselves wait for the device cannot be enqueued ahead; of these the profiler's records of
what ran on the device are added up.
"""

from __future__ import annotations

import functools
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

#: What a device does, as categories of a Chrome trace; and who asks for it.
DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
REQUESTS = ("cuda_runtime", "cuda_driver")
#: Requests that may hold up the host until the device has come so far.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy",
         "cuStreamSynchronize", "cuCtxSynchronize", "cuEventSynchronize")  # fmt: skip
LONGEST_SPIN = 0.2  # seconds
_CALIBRATION = 20_000_000  # clock cycles


def device_seconds(function: Callable[[], object], repeats: int = 1) -> float:
    """Seconds of the GPU for a call, without what the host needs to ask for it."""
    host = 1e-3
    for _ in range(2):  # the first attempt tells how long the device has to wait
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(int(_cycles_a_second() * min(2 * host, LONGEST_SPIN)))
        start.record()
        began = time.perf_counter()
        for _ in range(repeats):
            function()
        host = time.perf_counter() - began
        enqueued_ahead = not start.query()
        end.record()
        end.synchronize()
        if enqueued_ahead:
            return start.elapsed_time(end) / 1e3 / repeats
        if 2 * host > LONGEST_SPIN:
            break
    return traced(function, repeats).busy / repeats


@functools.cache
def _cycles_a_second() -> float:
    """Of the counter that ``torch.cuda._sleep`` waits for."""
    torch.cuda._sleep(_CALIBRATION)  # warms up
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    torch.cuda._sleep(_CALIBRATION)
    end.record()
    end.synchronize()
    return _CALIBRATION / (start.elapsed_time(end) / 1e3)


def dispatch_seconds(function: Callable[[], object], rounds: int = 7) -> float:
    """Seconds until a call on an idle GPU returns, which ends before its work does unless it waits;
    the median."""
    found = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        began = time.perf_counter()
        function()
        found.append(time.perf_counter() - began)
    torch.cuda.synchronize()
    return statistics.median(found)


@dataclass
class Work:
    """What ran under one name."""

    count: int = 0
    seconds: float = 0.0


@dataclass
class Trace:
    """What a device did in a stretch of time.

    Attributes:
        work: kernels, copies and fills by name.
        busy: seconds in which at least one of them ran.
        span: seconds from the start of the first to the end of the last.
        requests: how often each function of the CUDA runtime or driver was called.
    """

    work: dict[str, Work] = field(default_factory=dict)
    busy: float = 0.0
    span: float = 0.0
    requests: Counter[str] = field(default_factory=Counter)

    @property
    def launches(self) -> int:
        return sum(one.count for one in self.work.values())

    @property
    def waits(self) -> dict[str, int]:
        """Requests that hold up the host, by name."""
        return {name: n for name, n in self.requests.items() if name in WAITS and n > 0}


def traced(function: Callable[[], object], repeats: int = 1, kinds=DEVICE_WORK) -> Trace:
    """Run ``function`` ``repeats`` times under PyTorch's profiler.

    Args:
        kinds: categories that count as work: "cpu_op" where there is no GPU.
    """
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as recorded:
        for _ in range(repeats):
            function()
        if on_gpu:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        found = read_trace(json.loads(path.read_text("utf-8"))["traceEvents"], kinds)
    if on_gpu:
        found.requests["cudaDeviceSynchronize"] -= 1  # the one above
    return found


def read_trace(events: Iterable[dict], kinds=DEVICE_WORK) -> Trace:
    """The trace of these events of a Chrome trace: microseconds under "ts" and "dur"."""
    trace, intervals = Trace(), []
    for event in events:
        category = event.get("cat")
        if category in REQUESTS:
            trace.requests[event["name"]] += 1
        if category not in kinds:
            continue
        one = trace.work.setdefault(event["name"], Work())
        one.count += 1
        one.seconds += event["dur"] / 1e6
        intervals.append((event["ts"], event["ts"] + event["dur"]))
    if intervals:
        trace.busy = covered(intervals) / 1e6
        trace.span = (max(end for _, end in intervals) - min(begin for begin, _ in intervals)) / 1e6
    return trace


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of the union of ``intervals`` (begin, end)."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
