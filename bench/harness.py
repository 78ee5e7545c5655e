"""Races: contestants run in turn, so that what disturbs the machine disturbs all of them alike."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import gc
import importlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch

from bench import device_time
from nefkern import backends

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
#: Calls of a round at most. A GPU's queue holds about a thousand kernels; more would wait for it.
MOST_REPEATS = {"cpu": 1000, "cuda": 20}


@dataclass
class Entry:
    """One contestant's measurement in one race."""

    case: str
    contestant: str
    sizes: dict[str, int]
    seconds: float  # median over the rounds; of the device, where it is a GPU
    ratio: float | None  # median over the rounds of contestant's time / first contestant's time
    rounds: int
    peak_bytes: int | None = None  # memory above the start, result included
    floor: float | None = None  # seconds that the machine needs at least: see Work
    dispatch: float | None = None  # seconds until a call for a GPU returns to the host


@dataclass(frozen=True)
class Work:
    """The least work a case can be done with, whoever does it.

    Attributes:
        bytes: read and written, every operand and result once.
        flops: floating-point operations by the dtype they may be done in ("float32", "bfloat16").
        seconds: that pass beside all this on any machine.
    """

    bytes: float = 0.0
    flops: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def floor(self, rates: Rates) -> float:
        """Seconds: the longest of moving the bytes, doing the operations, and waiting."""
        compute = sum(count / rates.flops[dtype] for dtype, count in self.flops.items())
        return max(compute, self.bytes / rates.bandwidth, self.seconds)


@dataclass(frozen=True)
class Rates:
    """What the machine was measured to do: flop/s of a matrix product by dtype, bytes/s."""

    flops: dict[str, float]
    bandwidth: float


#: Rows of the square products, and bytes of the copy, that measure a device: each takes a GPU long
#: enough to reach its clock and to fill it, and the copy is many times the size of its caches.
PRODUCT_ROWS = {"cpu": 2048, "cuda": 8192}
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}


@functools.cache
def machine_rates() -> Rates:
    """Measure matrix products and a copy on the device of the benchmarks.

    On a GPU also "float16" and "tf32", float32 operands rounded to TF32."""
    n, flops = PRODUCT_ROWS[DEVICE.type], {}
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if DEVICE.type == "cuda":
        kinds |= {"float16": torch.float16, "tf32": torch.float32}
    for name, dtype in kinds.items():
        a, b = (torch.randn(n, n, device=DEVICE).to(dtype) for _ in range(2))
        product = functools.partial(torch.mm, a, b, out=torch.empty_like(a))
        with tf32(name == "tf32"):
            flops[name] = 2 * n**3 / _best(product)
    source = torch.ones(COPY_BYTES[DEVICE.type] // 4, device=DEVICE)
    target = torch.empty_like(source)
    return Rates(flops, 2 * source.nbytes / _best(lambda: target.copy_(source)))


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Float32 products on a GPU's tensor cores, rounded to TF32, or exactly so not."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _best(function: Callable[[], object], rounds: int = 7) -> float:
    function()
    return min(elapsed(function) for _ in range(rounds))


def race(
    case: str,
    contestants: dict[str, Callable[[], object]],
    *,
    sizes: dict[str, int],
    work: Work | None = None,
    rounds: int = 7,
    clock: str = "device",
) -> list[Entry]:
    """Time contestants in alternation, and each one's peak memory in a run of its own.

    Args:
        contestants: ours first; each is called without arguments.
        rounds: timed rounds after one that warms up. Each turn starts with a call that isn't
            timed, unless calls take seconds; a run shorter than a millisecond is repeated until it
            is not.
        work: gives ours its floor.
        clock: "device": what a GPU, where one is in use, needs for its work; "wall": until all is
            done, for what the host has a part in.
    """
    timed = CLOCKS[clock]
    repeats, peaks = {}, {}
    for name, function in contestants.items():
        repeats[name], peaks[name] = _first_calls(function, timed)
    times = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, function in contestants.items():
            if repeats[name]:  # find caches and pages as a loop finds them, not as others left them
                function()
            times[name].append(timed(function, repeats[name] or 1))
    ours = next(iter(times.values()))
    entries = []
    for name in contestants:
        ratios = [theirs / own for theirs, own in zip(times[name], ours, strict=True)]
        entries.append(
            Entry(
                case=case,
                contestant=name,
                sizes=sizes,
                seconds=statistics.median(times[name]),
                ratio=None if times[name] is ours else statistics.median(ratios),
                rounds=rounds,
                peak_bytes=peaks[name],
                floor=work.floor(machine_rates()) if work and times[name] is ours else None,
                dispatch=dispatch(contestants[name]) if clock == "device" else None,
            )
        )
    return entries


def elapsed(function: Callable[[], object], repeats: int = 1) -> float:
    """Seconds a call: of a GPU that works, where one is in use, else by the wall clock."""
    if torch.cuda.is_available():
        return device_time.device_seconds(function, repeats)
    return wall(function, repeats)


def wall(function: Callable[[], object], repeats: int = 1) -> float:
    """Seconds a call by the wall clock, until a GPU has done its part too."""
    _synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    _synchronize()
    return (time.perf_counter() - start) / repeats


CLOCKS = {"device": elapsed, "wall": wall}


def dispatch(function: Callable[[], object]) -> float | None:
    """Seconds that the host needs for a call; None where it does the work itself."""
    return device_time.dispatch_seconds(function) if torch.cuda.is_available() else None


def _first_calls(
    function: Callable[[], object], timed: Callable[[Callable[[], object]], float]
) -> tuple[int, int | None]:
    """Warms up; returns how often to repeat a short function, and a call's peak memory.

    A call of seconds is its own warm-up: 0 times.
    """
    start = time.perf_counter()
    peak = peak_memory(function)
    if time.perf_counter() - start > 2:
        return 0, peak
    most = MOST_REPEATS[DEVICE.type]
    return max(1, min(most, int(1e-3 / max(timed(function), 1e-6)))), peak_memory(function)


def finished(function: Callable[[], object]) -> Callable[[], object]:
    """The same call, which returns when a GPU has done its work: for the wall clocks of others."""

    def run():
        result = function()
        _synchronize()
        return result

    return run


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


#: Opponents that were left out, and how to have them.
absent: dict[str, str] = {}


def opponent(module: str, package: str) -> ModuleType | None:
    """A package that ours is held against, or None: its part of a race is then left out, and told
    of, but not the race."""
    try:
        return importlib.import_module(module)
    except ImportError:
        absent[package] = f"pip install {package}"
        return None


def on_reference(function: Callable[[], object]) -> Callable[[], object]:
    """The same call on the reference backend."""

    def run():
        with backends.backend("reference"):
            return function()

    return run


def peak_memory(function: Callable[[], object]) -> int | None:
    """Bytes that a call needs above what is in use before it; None where it can't be measured."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator kept would hide what is needed
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
        before = _status("VmRSS")
        result = function()
        after = _status("VmHWM")
        del result
        return max(0, after - before)
    except (OSError, AttributeError):  # not Linux, or another libc
        return None


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {name} in /proc/self/status")


def environment(*, rates: bool = True) -> dict[str, object]:
    """Machine, versions and commit that results belong to.

    Args:
        rates: measure the machine for it.
    """
    native = backends.native_module()
    root = Path(__file__).parents[1]
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "rates": dataclasses.asdict(machine_rates()) if rates else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "build": native if isinstance(native, str) else dict(native.build_info()),
        "commit": _git(root, "rev-parse", "HEAD"),
        "changed": bool(_git(root, "status", "--porcelain", "--untracked-files=no")),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
