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

from nefkern.triton.resources import LIMITS as triton_limits
from nefkern.triton.resources import occupancy

CSRC = Path(__file__).parents[2] / "csrc"
ARCHITECTURES = ("80", "86", "89", "90a", "100")  # the default of TORCH_CUDA_ARCH_LIST


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

    @property
    def tensor_cores(self) -> str:
        """The tensor cores' instruction, or ""."""
        found = re.search(r"\b(HMMA|HGMMA|UTC[A-Z]*MMA)\b", self.code)
        return found[1] if found else ""

    @property
    def widest_load(self) -> int:
        """Bits of the widest load from global to shared memory or registers."""
        widths = re.findall(r"\b(?:LDG|LDGSTS)\.E\S*?\.(64|128)\b", self.code)
        return max(map(int, widths), default=32 if "LDG" in self.code else 0)


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


@functools.cache
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


#: By the programming guide's table, as the Triton kernels' limits are.
LIMITS = {
    **triton_limits,
    "sm_90a": triton_limits["sm_90"],
}  # fmt: skip


def condensed(found: list[Resources], launched: dict[str, tuple[int, int]]) -> str:
    """Markdown, one row a kernel: the worst of its variants, one figure an architecture.

    Args:
        found: what every kernel needs.
        launched: by its mangled name, threads and dynamic shared memory of a block.
    """
    groups: dict[tuple[str, str], list[Resources]] = {}
    for one in found:
        name = readable(one.kernel).partition("<")[0]
        groups.setdefault((one.source, name), []).append(one)
    archs = list(dict.fromkeys(one.arch for one in found))
    lines = [
        f"| kernel | variants | threads | shared | registers: {', '.join(archs)} | occupancy: the "
        "same | spilled | widest load | tensor cores |",
        "|---|---:|---:|---:|---|---|---:|---:|---|",
    ]
    for (source, name), rows in sorted(groups.items()):
        threads, dynamic = zip(*(launched[one.kernel] for one in rows), strict=True)
        shared = [one.shared + bytes_ for one, bytes_ in zip(rows, dynamic, strict=True)]
        registers, shares = [], []
        for arch in archs:
            of_arch = [one for one in rows if one.arch == arch]
            registers.append(max(one.registers for one in of_arch))
            shares.append(min(
                occupancy(LIMITS[arch], one.registers, one.shared + launched[one.kernel][1],
                          launched[one.kernel][0])
                for one in of_arch
            ))  # fmt: skip
        cells = (
            f"{source} {name}", len({one.kernel for one in rows}), max(threads),
            f"{max(shared) / 1024:.1f} KiB", ", ".join(map(str, registers)),
            ", ".join(f"{share:.0%}" for share in shares),
            f"{max(one.spilled for one in rows)} B",
            f"{max(one.widest_load for one in rows)} bit",
            ", ".join(sorted({one.tensor_cores for one in rows} - {""})),
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(examine_all()))
    sys.exit()
