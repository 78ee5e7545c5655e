"""Stage "kernels": device time of every kernel of an operator's call, beside its prediction."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from bench import device_time, harness
from bench.gpu import inputs, operators, predictions, process
from bench.gpu.plan import Settings
from bench.gpu.rehearsal import measure_less
from bench.gpu.worker import Skipped
from nefkern import backends

CALLS, ROUNDS = 5, 5


def run(case: str, settings: Settings) -> Iterator[dict[str, Any]]:
    measure_less(settings)
    special = {"machine rates": machine_rates, "launches": launches}.get(case)
    yield from special(settings) if special else operator(case, settings)


def machine_rates(settings: Settings) -> Iterator[dict[str, Any]]:
    """Of the peaks of the data sheet, what the machine reaches."""
    found = harness.machine_rates()
    yield {"environment": {"rates": dataclasses.asdict(found)}}
    if settings.device == "cuda":
        sheet = predictions.rates()
        peaks = {"float32": sheet.float32, "tf32": sheet.tf32,
                 "bfloat16": sheet.half, "float16": sheet.half}  # fmt: skip
        yield {
            "data sheet": sheet.name,
            "of peak": {name: found.flops[name] / peak for name, peak in peaks.items()}
            | {"memory": found.bandwidth / sheet.memory},
        }


#: Operators whose launches can be recorded: the launcher and its sizes, those of the paper.
RECORDED = {
    "knn cosine": ("knn", {"n": 14400, "k": 256, "method": 2}),
    "kappa": ("kappa", {"n": 14400, "k": 256, "near": 15}),
    "kappa_padded": ("kappa", {"n": 14400, "k": 256, "near": 15, "padded": 1}),
    "normalized_adjacency mean": ("normalized_adjacency", {"n": 14400, "k": 256}),
    "weights_gradient": (
        "normalized_adjacency_backward",
        {"n": 14400, "k": 256, "nnz": 5_200_000},
    ),
    "add": ("add", {"n": 14400, "nnz": 4_550_000}),
    "spmm": ("spmm", {"n": 14400, "nnz": 5_200_000, "columns": 256}),
}


def launches(settings: Settings) -> Iterator[dict[str, Any]]:
    """Where no GPU is: whether every prediction finds its kernels among those that the launchers of
    csrc/cuda enqueue, seen on the recording runtime that their tests have built."""
    if not settings.rehearsal:
        raise Skipped("there is a GPU: the other cases have what ran on it")
    from tests.cuda import launchers

    recorder = launchers.BUILD / "recorded"
    newest = max(path.stat().st_mtime for path in (process.ROOT / "csrc" / "cuda").iterdir())
    if not recorder.is_file() or recorder.stat().st_mtime < newest:
        raise Skipped("no recording runtime of these sources: pytest tests/cuda builds it")
    for name, (launcher, sizes) in RECORDED.items():
        events = launchers.recorded(launcher, **sizes).launches
        ran = {event.kernel: device_time.Work(1) for event in events}
        kernels = predictions.kernels_of(name, "cuda", "float32")
        beside = predictions.compared(kernels, "cuda", ran, 1, predictions.rates())
        yield {name: {one.name: one.measured is not None for one in beside}}
        if lost := [one.name for one in beside if one.measured is None]:
            raise AssertionError(f"{name}: no kernel of its name is launched for {lost}")


def operator(case: str, settings: Settings) -> Iterator[dict[str, Any]]:
    """ "operator/backend/dtype/size": seconds a call by three clocks, then its kernels."""
    name, backend, dtype, size = case.split("/")
    if reason := backends.why_not(backend):
        raise Skipped(reason)
    check = operators.check_of(name, dtype, inputs.sizes_of(size, settings.size))
    call = check.forward or check.call
    with backends.backend(backend):
        try:
            for _ in range(3):
                call()
        except RuntimeError as error:
            if "cannot take this call" in str(error):
                raise Skipped(str(error)) from None
            raise
        yield {
            "device": min(harness.elapsed(call) for _ in range(ROUNDS)),
            "wall": min(harness.wall(call) for _ in range(ROUNDS)),
            "dispatch": harness.dispatch(call),
        }
        kinds = ("cpu_op",) if settings.rehearsal else device_time.DEVICE_WORK
        trace = device_time.traced(call, CALLS, kinds)
    yield profiled(trace)
    kernels = predictions.kernels_of(name, backend, dtype)
    if kernels and settings.size == "paper":
        gpu = predictions.rates()
        yield {
            "predicted": predictions.expected(kernels, gpu),
            "rates of": gpu.name,
            "compared": predictions.compared(kernels, backend, trace.work, CALLS, gpu),
        }


def profiled(trace: device_time.Trace) -> dict[str, Any]:
    """Figures of a call: its longest kernels and what it asks of the runtime."""
    longest = sorted(trace.work.items(), key=lambda item: -item[1].seconds)
    return {
        "kernels": {
            symbol: {"seconds": work.seconds / CALLS, "launches": work.count / CALLS}
            for symbol, work in longest[:20]
        },
        "busy": trace.busy / CALLS,
        "launches": trace.launches / CALLS,
        "waits": {request: count / CALLS for request, count in trace.waits.items()},
    }
