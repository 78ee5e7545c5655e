"""The model of a kernel's time: its work, and the share of a GPU's peaks that it may reach."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from bench.harness import Rates, Work
from nefkern.triton.rates import Gpu

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
