"""Device times: the profiler's records, and calls that are enqueued while the device waits."""

from __future__ import annotations

import time
from collections import deque

import pytest
import torch

from bench import device_time, harness
from bench.device_time import Trace, Work, covered, read_trace


@pytest.mark.parametrize(
    ("intervals", "length"),
    [
        ([], 0),
        ([(0, 2), (5, 6)], 3),
        ([(5, 6), (0, 2), (1, 4)], 5),
        ([(0, 10), (2, 3), (4, 12)], 12),
        ([(0, 1), (1, 2)], 2),
    ],
)
def test_overlapping_work_is_counted_once(intervals, length):
    assert covered(intervals) == length


def event(category, name, ts, dur):
    return {"ph": "X", "cat": category, "name": name, "ts": ts, "dur": dur}


def test_a_trace_holds_the_devices_work_and_the_hosts_requests():
    trace = read_trace(
        [
            {"ph": "M", "name": "process_name", "ts": 0},
            event("kernel", "spmm_rows", 100, 10),
            event("kernel", "spmm_rows", 120, 20),
            event("gpu_memset", "Memset (Device)", 105, 10),
            event("gpu_user_annotation", "Optimizer.step", 0, 1000),
            event("cuda_runtime", "cudaLaunchKernel", 1, 2),
            event("cuda_runtime", "cudaLaunchKernel", 4, 2),
            event("cuda_runtime", "cudaStreamSynchronize", 8, 90),
            event("cuda_driver", "cuLaunchKernelEx", 8, 90),
        ]
    )
    assert trace.work["spmm_rows"] == Work(2, pytest.approx(30e-6))
    assert trace.launches == 3
    assert trace.busy == pytest.approx(35e-6)
    assert trace.span == pytest.approx(40e-6)
    assert trace.requests["cudaLaunchKernel"] == 2
    assert trace.waits == {"cudaStreamSynchronize": 1}


def test_the_profiler_on_a_processor():
    trace = device_time.traced(lambda: torch.ones(100).add_(1), 3, kinds=("cpu_op",))
    assert trace.work["aten::add_"].count == 3
    assert 0 < trace.busy <= trace.span


class Gpu:
    """A GPU with a queue, of which time passes on the host's clock."""

    def __init__(self, monkeypatch):
        self.now, self.free = 0.0, 0.0  # the host's clock; when the device is done with its queue
        self.spins: deque[float] = deque()
        outer = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = max(outer.free, outer.now)

            def query(self):
                return outer.now >= self.at

            def synchronize(self):
                outer.now = max(outer.now, self.at)

            def elapsed_time(self, end):
                return (end.at - self.at) * 1e3

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", self.wait)
        monkeypatch.setattr(torch.cuda, "_sleep", self.spin)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        device_time._cycles_a_second.cache_clear()

    def work(self, seconds, host):
        self.now += host
        self.free = max(self.free, self.now) + seconds

    def wait(self):
        self.now = max(self.now, self.free)

    def spin(self, cycles):
        self.spins.append(cycles / 2e9)
        self.work(cycles / 2e9, 0.0)


@pytest.fixture
def gpu(monkeypatch):
    yield Gpu(monkeypatch)
    device_time._cycles_a_second.cache_clear()


@pytest.mark.parametrize("host", [1e-5, 4e-3])
def test_a_device_time_has_no_part_of_the_hosts(gpu, host):
    """Also where the host is the slower one, and more than the first wait was for."""

    def call():
        for _ in range(5):
            gpu.work(1e-4, host / 5)

    assert harness.elapsed(call, 2) == pytest.approx(5e-4)
    assert harness.dispatch(call) == pytest.approx(host)


def test_a_call_that_waits_is_left_to_the_profiler(gpu, monkeypatch):
    def call():
        gpu.work(1e-4, 1e-5)
        gpu.wait()

    asked = []

    def traced(function, repeats):
        asked.append(repeats)
        return Trace(busy=2e-4)

    monkeypatch.setattr(device_time, "traced", traced)
    assert harness.elapsed(call, 2) == pytest.approx(1e-4)
    assert asked == [2]
    assert harness.dispatch(call) == pytest.approx(1.1e-4)
    assert harness.wall(call, 2) == pytest.approx(1.1e-4)


def test_a_race_has_both_times(gpu, monkeypatch):
    monkeypatch.setattr(harness, "peak_memory", lambda function: function() and None)
    contestants = {
        "nefkern": lambda: gpu.work(1e-3, 1e-4),
        "theirs": lambda: gpu.work(2e-3, 3e-3),
    }
    ours, theirs = harness.race("a case", contestants, sizes={}, rounds=3)
    assert (ours.seconds, ours.dispatch) == (pytest.approx(1e-3), pytest.approx(1e-4))
    assert (theirs.ratio, theirs.dispatch) == (pytest.approx(2.0), pytest.approx(3e-3))
    ours, theirs = harness.race("a case", contestants, sizes={}, rounds=3, clock="wall")
    assert (ours.seconds, ours.dispatch) == (pytest.approx(1.1e-3), None)
    assert theirs.ratio == pytest.approx(5 / 1.1)


def test_tf32_is_as_it_was_afterwards():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    for allowed, inside in ((True, "tf32"), (False, "ieee")):
        with harness.tf32(allowed):
            assert matmul.fp32_precision == inside
        assert matmul.fp32_precision == before


def test_machine_rates_have_a_size_for_each_device(monkeypatch):
    """A GPU's peak is not reached in 20 microseconds: 8192 rows take it a millisecond."""
    asked = []

    def best(function):
        function()
        return 0.5

    monkeypatch.setattr(harness, "_best", best)
    monkeypatch.setattr(harness, "PRODUCT_ROWS", {"cpu": 4, "cuda": 8192})
    monkeypatch.setattr(harness, "COPY_BYTES", {"cpu": 64, "cuda": 1 << 31})
    monkeypatch.setattr(torch, "mm", lambda a, b, out: asked.append((len(a), a.dtype)))
    harness.machine_rates.cache_clear()
    rates = harness.machine_rates()
    harness.machine_rates.cache_clear()
    assert asked == [(4, torch.float32), (4, torch.bfloat16)]
    assert rates.flops == {"float32": 2 * 4**3 / 0.5, "bfloat16": 2 * 4**3 / 0.5}
    assert rates.bandwidth == 2 * 64 / 0.5
