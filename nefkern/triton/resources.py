"""``python -m nefkern.triton.resources``: what every Triton kernel needs of a GPU, without one.

Each kernel that ships is compiled ahead of time for the architectures asked for, and the result is
read with the tools of the triton package: registers, spills, shared memory, the share of an SM's
threads that fit at a time (occupancy), and which tensor-core instruction multiplies.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from nefkern.runtime.errors import ArgumentParser, UserError, command


@dataclass(frozen=True)
class Limits:
    """What one streaming multiprocessor has."""

    shared_a_block: int  # bytes
    shared: int  # bytes
    threads: int
    blocks: int = 32
    registers: int = 65536


#: From the CUDA programming guide's table of technical specifications.
LIMITS = {
    "sm_80": Limits(163 << 10, 164 << 10, 2048),
    "sm_86": Limits(99 << 10, 100 << 10, 1536, blocks=16),
    "sm_89": Limits(99 << 10, 100 << 10, 1536, blocks=24),
    "sm_90": Limits(227 << 10, 228 << 10, 2048),
    "sm_100": Limits(227 << 10, 228 << 10, 2048),
}
#: What the kernels are proved for: the tests compile all that ships for these.
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
#: Tensor-core instructions by generation; HFMA2.MMA is none.
_TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|UTC[A-Z]*MMA|IMMA|IGMMA)\b")


@dataclass(frozen=True)
class Resources:
    """One kernel on one architecture."""

    name: str
    arch: str
    registers: int  # a thread
    spilled: int  # bytes of a thread's local memory
    shared: int  # bytes a block
    occupancy: float  # share of the SM's threads
    instruction: str  # of the tensor cores, or ""
    product: bool  # whether it should have one


def shipped() -> Iterator:
    """Every :class:`~nefkern.triton.configs.Shipped` of every module of this package."""
    import nefkern.triton

    for module in pkgutil.iter_modules(nefkern.triton.__path__):
        if module.name != "resources":
            found = importlib.import_module(f"nefkern.triton.{module.name}")
            if function := getattr(found, "shipped", None):
                yield from function()


def source_of(kernel, ones: Sequence[str] = ()):
    """A Shipped's source as Triton specialises it; pointers are aligned to 16 bytes, as torch's.

    Sizes and strides are any numbers, but for the Shipped's ``multiples`` and those of ``ones``,
    which are 1: Triton takes them for constants.
    """
    from triton.compiler import ASTSource

    constants = kernel.constexprs | dict.fromkeys(ones, 1)
    types = {
        name: "constexpr" if name in constants else kernel.signature.get(name)
        for name in kernel.kernel.arg_names
    }
    if missing := [name for name, kind in types.items() if kind is None]:
        raise ValueError(f"{kernel.name}: neither signature nor constexprs has {missing}")
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, kind) in enumerate(types.items())
        if kind.startswith("*") or name in kernel.multiples
    }
    return ASTSource(fn=kernel.kernel, signature=types, constexprs=constants, attrs=aligned)


def compile_for(kernel, arch: str):
    """Compile a Shipped ahead of time, as :func:`source_of` has it."""
    import triton

    return triton.compile(source_of(kernel), target=_target(arch), options=_options(kernel))


def front_end(kernel, arch: str, ones: Sequence[str] = ()) -> str:
    """A Shipped as Triton's own intermediate code: all errors of types, in a tenth of a second."""
    from triton._C.libtriton import ir
    from triton.compiler.compiler import make_backend

    target = _target(arch)
    backend = make_backend(target)
    options = backend.parse_options(_options(kernel))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions = backend.get_codegen_implementation(options)
    modules = backend.get_module_map()
    return str(source_of(kernel, ones).make_ir(target, options, functions, modules, context))


def _target(arch: str):
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


def _options(kernel) -> dict[str, int]:
    return {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}


def examine(kernel, arch: str) -> Resources:
    """Compile a Shipped and read what it needs."""
    return read(kernel, arch, compile_for(kernel, arch))


def read(kernel, arch: str, compiled) -> Resources:
    """What a Shipped that was compiled needs."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", cubin)
        code = _tool("nvdisasm", "-c", cubin) if kernel.product else ""
    registers, stack, local = (
        int(re.search(rf"\b{what}:(\d+)", usage)[1]) for what in ("REG", "STACK", "LOCAL")
    )
    threads, shared = 32 * compiled.metadata.num_warps, compiled.metadata.shared
    instruction = _TENSOR_CORE.search(code)
    return Resources(
        kernel.name,
        arch,
        registers,
        stack + local,
        shared,
        occupancy(LIMITS[arch], registers, shared, threads),
        instruction[1] if instruction else "",
        kernel.product,
    )


def _examine(job: tuple[int, str]) -> Resources:
    """Kernels themselves cannot be sent to another process; their places can."""
    place, arch = job
    return examine(list(shipped())[place], arch)


def examine_all(architectures: Sequence[str], only: str = "") -> list[Resources]:
    """Every kernel whose name holds ``only``, on every core of this machine.

    Raises:
        UserError: the interpreter is on, which compiles nothing.
    """
    from nefkern.backends import interpreting

    if interpreting():
        raise UserError("TRITON_INTERPRET is set: expected it unset, to compile the kernels")
    jobs = [
        (place, arch)
        for place, kernel in enumerate(shipped())
        for arch in architectures
        if only in kernel.name and arch in (kernel.architectures or architectures)
    ]
    with ProcessPoolExecutor() as pool:
        return list(pool.map(_examine, jobs))


def occupancy(limits: Limits, registers: int, shared: int, threads: int) -> float:
    """The share of an SM's threads that blocks of these needs can fill."""
    # Registers are given to warps in units of 256, and a block keeps 1 KiB of shared memory more.
    a_warp = -(-registers * 32 // 256) * 256
    blocks = min(
        limits.registers // (a_warp * threads // 32),
        limits.shared // (shared + 1024),
        limits.threads // threads,
        limits.blocks,
    )
    return blocks * threads / limits.threads


def _tool(name: str, *arguments) -> str:
    import triton

    path = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([path, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr.strip()}")
    return done.stdout


def table(found: Sequence[Resources]) -> str:
    """Markdown, one row a kernel and architecture."""
    lines = [
        "| kernel | arch | registers | spilled | shared | occupancy | tensor cores |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in found:
        cells = (r.name, r.arch, r.registers, f"{r.spilled} B", f"{r.shared / 1024:.1f} KiB",
                 f"{r.occupancy:.0%}", r.instruction)  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


@command
def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m nefkern.triton.resources", description=__doc__.partition("\n\n")[2]
    )
    parser.add_argument(
        "--arch", nargs="+", choices=list(LIMITS), default=list(LIMITS), help="default: all"
    )
    parser.add_argument("--only", default="", help="kernels whose name holds this")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    found = examine_all(options.arch, options.only)
    print(json.dumps([asdict(r) for r in found]) if options.json else table(found))


if __name__ == "__main__":
    sys.exit(main())
