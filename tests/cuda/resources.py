"""``python -m tests.cuda.resources``: what every CUDA kernel needs of a GPU, without one.

Each source of ``csrc/cuda`` is compiled by nvcc, with warnings and spills as errors, and what ptxas
and the machine code say is read. CUB's kernels (``primitives.cu``) are left out.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).parents[2] / "csrc"
ARCHITECTURES = ("80", "90a", "100")


@dataclass(frozen=True)
class Resources:
    """One kernel on one architecture."""

    source: str
    kernel: str  # mangled
    arch: str
    registers: int  # a thread
    shared: int  # bytes a block, static
    stack: int  # bytes a thread
    spilled: int  # bytes stored and loaded
    code: str  # its machine instructions


def sources() -> list[Path]:
    return [path for path in sorted((CSRC / "cuda").glob("*.cu")) if path.stem != "primitives"]


@functools.cache
def nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


@functools.cache
def architectures() -> tuple[str, ...]:
    """Those of :data:`ARCHITECTURES` that this nvcc knows."""
    done = subprocess.run([nvcc(), "--list-gpu-code"], capture_output=True, text=True, check=True)
    known = done.stdout.split()  # without 90a, which comes with 90
    return tuple(arch for arch in ARCHITECTURES if f"sm_{arch.rstrip('a')}" in known)


def examine(source: Path, arch: str) -> list[Resources]:
    """Compile one source; RuntimeError with nvcc's output where it warns or spills."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / f"{source.stem}.cubin"
        done = subprocess.run(
            [
                nvcc(), "-cubin", f"-arch=sm_{arch}", "-O3", f"-I{CSRC}",
                "-Xptxas", "-v,-warn-spills", "-Werror", "all-warnings", "-o", cubin, source,
            ],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{source.name} for sm_{arch}:\n{done.stderr}")
        code = _code_of(cubin)
    return [
        Resources(source.stem, name, f"sm_{arch}", registers, shared, stack, spilled, code[name])
        for name, registers, shared, stack, spilled in _parse(done.stderr)
    ]


def _parse(report: str):
    """(kernel, registers, shared, stack, spilled) from what ``ptxas -v`` says."""
    for part in report.split("Compiling entry function ")[1:]:
        name = re.match(r"'(\w+)'", part)[1]
        stack, stores, loads = map(
            int, re.search(r"(\d+) bytes stack frame, (\d+) .*?, (\d+) ", part).groups()
        )
        shared = re.search(r"(\d+) bytes smem", part)
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        yield name, registers, int(shared[1]) if shared else 0, stack, stores + loads


def _code_of(cubin: Path) -> dict[str, str]:
    """Kernel name to machine code, by the cuobjdump of the toolkit or of the triton package."""
    done = subprocess.run([cuobjdump(), "-sass", cubin], capture_output=True, text=True, check=True)
    parts = re.split(r"^\s*Function : (\w+)\s*$", done.stdout, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


@functools.cache
def cuobjdump() -> str | None:
    if found := shutil.which("cuobjdump"):
        return found
    try:
        import triton
    except ImportError:
        return None
    path = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(path) if path.exists() else None


def examine_all() -> list[Resources]:
    with ThreadPoolExecutor(2) as pool:
        jobs = [(source, arch) for source in sources() for arch in architectures()]
        return [row for rows in pool.map(lambda job: examine(*job), jobs) for row in rows]


def readable(kernel: str) -> str:
    """The kernel's name and template arguments, if c++filt is there."""
    if not shutil.which("c++filt"):
        return kernel
    done = subprocess.run(["c++filt", kernel], capture_output=True, text=True, check=True)
    name = re.sub(r"nefkern::cuda::|\(anonymous namespace\)::|^void ", "", done.stdout.strip())
    return name.partition("(")[0]


def table(found: list[Resources]) -> str:
    """Markdown, one row a kernel and architecture."""
    lines = [
        "| kernel | arch | registers | shared | stack | spilled |",
        "|---|---|---|---|---|---|",
    ]
    for r in sorted(found, key=lambda r: (r.source, r.kernel, r.arch)):
        cells = readable(r.kernel), r.arch, r.registers, r.shared, r.stack, r.spilled
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(examine_all()))
    sys.exit()
