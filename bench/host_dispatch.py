"""``python -m bench.host_dispatch``: what a call of a Triton operator costs the host.

No GPU is needed. Kernels are compiled for one ahead of time, and a stand-in takes the driver's
place: what would start a kernel notes it and returns. What is left of a call is the host's: checks,
allocations, and the choice of what was compiled. Each operator is timed with Triton's own launches
(``kernel[grid](...)``) and with those of nefkern.triton.configs in alternation.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from nefkern.backends import interpreting
from nefkern.runtime.errors import ArgumentParser, UserError, command

ARCH = 90


class Driver:
    """In place of Triton's: a GPU that notes what is started."""

    def __init__(self, started: list[tuple]):
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (None, 0, 32, 0, 1024),
            get_device_properties=lambda _: {"max_shared_mem": 227 << 10},
        )
        self.launcher_cls = lambda source, _: _Launcher(source.fn.__name__, started)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCH, 32)


class _Launcher:
    def __init__(self, name: str, started: list[tuple]):
        self.name, self.started = name, started

    def __call__(self, x: int, y: int, z: int, stream, function, packed, meta, enter, leave, *args):
        self.started.append((self.name, (x, y, z), args))


def addressed(started: tuple) -> tuple:
    """What was started, with addresses in place of tensors: launches may be given either."""
    name, grid, args = started
    return name, grid, tuple(x.data_ptr() if isinstance(x, torch.Tensor) else x for x in args)


@contextlib.contextmanager
def recording() -> Iterator[list[tuple]]:
    """Kernels of tensors on the processor are compiled and noted, not run."""
    if interpreting():
        raise UserError("TRITON_INTERPRET is set: expected it unset, to compile the kernels")
    from nefkern.triton import knn_estimates, spmm

    for tuned in (knn_estimates.tuned_score, spmm._tuned):
        tuned._timed = False  # there is nothing to time
    started: list[tuple] = []
    triton.runtime.driver.set_active(Driver(started))
    yield started
    with contextlib.suppress(RuntimeError):  # there may be no driver to go back to
        triton.runtime.driver.reset_active()


def calls() -> dict[str, Callable[[], Any]]:
    """The operators that wait for no result of a kernel, small: sizes cost the host nothing."""
    from nefkern.triton import kappa, knn, linear_attention, sddmm, spmm

    q, k, v = torch.randn(2, 900, 3, 18, 64, dtype=torch.bfloat16).permute(2, 0, 3, 1, 4)
    rest = (None, "softmax", 1e-6)
    kept = torch.zeros(2, 18, 64, 64), torch.ones(2, 18, 2, 64)
    offsets, columns = torch.arange(0, 65, 4), torch.zeros(64, dtype=torch.int32)
    graph, x = (offsets[:17], columns), torch.randn(16, 64)
    lists = torch.zeros(64, 8, dtype=torch.int32), torch.ones(64, 8)
    rows = torch.randn(256, 384)
    return {
        "linear_attention": lambda: linear_attention.linear_attention(q, k, v, *rest),
        "linear_attention_backward": lambda: linear_attention.linear_attention_backward(
            q, q, k, v, None, *kept, *rest[1:]
        ),
        "spmm": lambda: spmm.spmm(*graph, torch.ones(64), x, x.dtype),
        "sddmm": lambda: sddmm.sddmm(*graph, x, x),
        "kappa, padded": lambda: kappa.kappa(*lists, lists[0], 64, 0.3, 0.0, padded=True),
        "knn": lambda: knn.knn(rows, 16, "cosine", None, [0, 256], False),
    }


@contextlib.contextmanager
def tritons_own() -> Iterator[None]:
    """Launches as Triton makes them."""
    from nefkern.triton import configs

    kept, configs._launch = configs._launch, lambda kernel, grid, *a, **o: kernel[grid](*a, **o)
    try:
        yield
    finally:
        configs._launch = kept


def seconds_of(call: Callable[[], Any], times: int) -> float:
    """Of one call, the fastest of several turns."""
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        for _ in range(5):
            call()
        best = min(best, (time.perf_counter() - start) / 5)
    return best


def measured(times: int) -> list[dict[str, Any]]:
    """Each operator's launches, and microseconds of a call, by Triton and by this package."""
    found = []
    with recording() as started:
        for name, call in calls().items():
            call()
            started.clear()
            call()
            row = {"operator": name, "launches": len(started), "triton": 1e9, "nefkern": 1e9}
            for _ in range(times):
                with tritons_own():
                    row["triton"] = min(row["triton"], 1e6 * seconds_of(call, 2))
                row["nefkern"] = min(row["nefkern"], 1e6 * seconds_of(call, 2))
            found.append(row)
    return found


def table(found: list[dict[str, Any]]) -> str:
    lines = ["| operator | launches | Triton's, µs | these, µs |", "|---|---:|---:|---:|"]
    for row in found:
        numbers = f"{row['launches']} | {row['triton']:.0f} | {row['nefkern']:.0f}"
        lines.append(f"| {row['operator']} | {numbers} |")
    return "\n".join(lines)


@command
def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m bench.host_dispatch", description=__doc__.partition("\n\n")[2]
    )
    parser.add_argument("--turns", type=int, default=20, metavar="N", help="default: 20")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    found = measured(options.turns)
    print(json.dumps(found) if options.json else table(found))


if __name__ == "__main__":
    sys.exit(main())
