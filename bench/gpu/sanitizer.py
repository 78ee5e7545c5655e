"""Stage "sanitizer": compute-sanitizer on a program without torch, and on the operators.

The program is ``examples/cpp``: neighbours, κ and spmm by the launchers of ``csrc/cuda``.
"""

from __future__ import annotations

import fcntl
import re
import sys
from collections.abc import Iterator
from typing import Any

from bench.gpu import process, tools
from bench.gpu.plan import Settings
from bench.gpu.worker import Skipped

BUILD = process.ROOT / "build" / "gpu_check_example"
LIMIT, BUILD_LIMIT = 60.0, 80.0
#: The operators that csrc/cuda has, at sizes of seconds under a checker.
OPERATORS = ("knn cosine", "knn segments", "kappa", "weights_gradient", "add", "spmm")


def run(case: str, settings: Settings) -> Iterator[dict[str, Any]]:
    """ "operators", or the name of a tool of compute-sanitizer."""
    if settings.rehearsal:
        raise Skipped("compute-sanitizer watches a GPU; tests/emulator does this on a processor")
    checker = tools.find("compute-sanitizer")
    if checker is None:
        raise Skipped("no compute-sanitizer on the PATH or in the CUDA toolkit")
    if case == "operators":
        yield from judged([*tools.sanitizer(checker, "memcheck"), *small_operators()])
    else:
        yield from judged([*tools.sanitizer(checker, case), example()])


def example() -> str:
    """The program, built once; cases that run beside each other wait for one another."""
    from bench.gpu.build import architecture, first_error  # costs the import of torch

    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        configure = ["cmake", "-S", process.ROOT / "examples" / "cpp", "-B", BUILD, "-G", "Ninja",
                     "-DNEFKERN_CUDA=require"]  # fmt: skip
        for step in (configure, ["cmake", "--build", BUILD]):
            done = process.run(
                step, BUILD_LIMIT, environment={"TORCH_CUDA_ARCH_LIST": architecture()}
            )
            if done.code != 0:
                raise RuntimeError(f"examples/cpp is not built: {first_error(done)}")
    return str(BUILD / "kappa")


def small_operators() -> list[str]:
    code = "import sys; from bench.gpu import sanitizer; sanitizer.call_operators(sys.argv[1:])"
    return [sys.executable, "-c", code, *OPERATORS]


def call_operators(names: list[str]) -> None:
    """Each once on the ragged size, by the CUDA kernels; runs under the checker."""
    import torch

    from bench.gpu import inputs, operators
    from nefkern import backends

    sizes = inputs.sizes_of("ragged", "small")
    with backends.backend("cuda"):
        for name in names:
            check = operators.check_of(name, "float32", sizes)
            (check.forward or check.call)()
            torch.cuda.synchronize()


def judged(command: list[str]) -> Iterator[dict[str, Any]]:
    """Run it; raises what the checker found."""
    done = process.run(command, LIMIT, environment=tools.UNCACHED)
    if "Device not supported" in done.output:
        raise Skipped("compute-sanitizer: Device not supported")
    summary = re.findall(r"=========\s+(?:ERROR|RACECHECK) SUMMARY: (.*)", done.output)
    yield {"summary": summary[-1] if summary else None}
    if done.code is None:
        raise TimeoutError(f"ended after {LIMIT:.0f} s")
    if done.code != 0:
        yield {"output": process.tail(done.output)}
        raise AssertionError(summary[-1] if summary else f"exit code {done.code}")
