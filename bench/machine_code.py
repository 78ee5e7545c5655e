"""``python -m bench.machine_code``: what compiled kernels ask, counted in their machine code.

``nvdisasm``'s listing is taken as blocks between labels; a branch back to a label is a loop, whose
instructions count as often as the loop is run, which the caller knows. What is counted is what a
warp issues: wavefronts of shared memory as if no two lanes met in a bank, bytes of global memory as
if no lane were masked, products by their kind and precision.

The command prints JSON of ``linear_attention``'s kernels at the paper's size, by architecture and
dtype, as bench/attention.json keeps it for docs/gpu.md.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from nefkern.runtime.errors import ArgumentParser, UserError, command

_LABEL = re.compile(r"^\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)([^;]*);")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
#: Bytes that a lane moves, by the instruction's suffix.
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


@dataclass
class Counts:
    """Of one warp, or of whatever it was multiplied by.

    Attributes:
        issued: instructions.
        shared: wavefronts of shared memory, 128 bytes each, and shuffles.
        global_bytes: read or written by loads, asynchronous copies and stores.
        flops: of tensor cores, by the precision of their factors ("BF16", "F16", "TF32").
    """

    issued: float = 0.0
    shared: float = 0.0
    global_bytes: float = 0.0
    flops: Counter = field(default_factory=Counter)

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.issued + other.issued,
            self.shared + other.shared,
            self.global_bytes + other.global_bytes,
            self.flops + other.flops,
        )

    def __mul__(self, times: float) -> Counts:
        flops = Counter({kind: times * n for kind, n in self.flops.items()})
        return Counts(times * self.issued, times * self.shared, times * self.global_bytes, flops)


def of_instruction(name: str) -> Counts:
    """One instruction of one warp."""
    first, *suffixes = name.split(".")
    lane = next((_WIDTHS[s] for s in suffixes if s in _WIDTHS), 4)
    counts = Counts(issued=1)
    if first in ("LDS", "STS", "LDGSTS"):
        counts.shared = max(1, 32 * lane // 128)
    elif first in ("LDSM", "STSM"):
        counts.shared = float(suffixes[-1]) if suffixes[-1] in ("2", "4") else 1
    elif first == "SHFL":
        counts.shared = 1
    if first in ("LDG", "STG", "LDGSTS"):
        counts.global_bytes = 32 * lane
    if first in ("HMMA", "HGMMA"):
        counts += _product(first, suffixes)
    return counts


def _product(first: str, suffixes: Sequence[str]) -> Counts:
    """A product of a warp; of four warps together a quarter, with what it reads of B in shared
    memory (A may be in registers: it is taken to be)."""
    kind = next((s for s in suffixes if s in ("BF16", "TF32")), "F16")
    if first == "HGMMA":
        m, n, k = map(int, suffixes[0].split("x"))
        bytes_ = 4 if kind == "TF32" else 2
        return Counts(shared=n * k * bytes_ / 128 / 4, flops=Counter({kind: 2 * m * n * k / 4}))
    k = int(suffixes[0][3:] if suffixes[0].startswith("168") else suffixes[0])
    return Counts(flops=Counter({kind: 2 * 16 * 8 * k}))


def of_listing(listing: str, trips: Sequence[float]) -> Counts:
    """A warp's way through a kernel; ``trips``: how often loops run, the outermost first."""
    labels, instructions, pending = {}, [], []
    for line in listing.splitlines():
        if found := _LABEL.match(line):
            pending.append(found[1])
        elif found := _INSTRUCTION.search(line):
            labels |= dict.fromkeys(pending, len(instructions))
            pending = []
            instructions.append((found[2], found[3]))
    depth = [0] * len(instructions)
    for place, (name, operands) in enumerate(instructions):
        target = _TARGET.search(operands)
        if name.startswith("BRA") and target and labels.get(target[1], place) < place:
            for inside in range(labels[target[1]], place + 1):
                depth[inside] += 1
    total = Counts()
    for (name, _), level in zip(instructions, depth, strict=True):
        if name in ("NOP",):
            continue
        times = 1.0
        for trip in trips[:level]:
            times *= trip
        total += of_instruction(name) * times
    return total


# ---- linear_attention ----

#: B x H heads of so many tokens, of 64 channels; "softmax".
ATTENTION_HEADS, TOKENS, CHANNELS = 16 * 18, 900, 64
PRODUCTS = ("sum_keys", "answer_queries", "query_gradients", "key_gradients")


def attention_of(arch: str, dtype: str) -> dict[str, dict[str, float]]:
    """Of the kernels that multiply, launched once as ψ does: registers, spills, shared memory, and
    millions of instructions, of wavefronts and of bytes."""
    from nefkern.triton.linear_attention import shipped

    title = f" softmax {dtype} D = {CHANNELS}, multiples of 16"
    found = {}
    for kernel in shipped():
        name = kernel.kernel.__name__
        if name in PRODUCTS and title in kernel.name and arch in kernel.architectures:
            found[name] = _launched(kernel, arch)
    return found


def _launched(kernel, arch: str) -> dict[str, float]:
    from nefkern.triton.linear_attention import _chunks
    from nefkern.triton.resources import _tool, compile_for, read

    compiled = compile_for(kernel, arch)
    resources = read(kernel, arch, compiled)
    with TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        listing = _tool("nvdisasm", "-c", cubin)
    chunk, parts = _chunks(TOKENS, CHANNELS, CHANNELS)
    tile = kernel.constexprs["BT"]
    tiles = sum(-(-min(chunk, TOKENS - part * chunk) // tile) for part in range(parts)) / parts
    counts = of_listing(listing, (tiles,)) * (kernel.num_warps * parts * ATTENTION_HEADS)
    return {
        "tokens": tile,
        "registers": resources.registers,
        "spilled": resources.spilled,
        "shared_bytes": resources.shared,
        "issued": round(counts.issued / 1e6, 1),
        "shared": round(counts.shared / 1e6, 1),
        "megabytes": round(counts.global_bytes / 1e6),
    }


@command
def main(arguments: list[str] | None = None) -> None:
    from nefkern.backends import interpreting
    from nefkern.triton.resources import LIMITS

    parser = ArgumentParser(prog="python -m bench.machine_code", description=__doc__)
    parser.add_argument(
        "--arch", nargs="+", choices=list(LIMITS), default=list(LIMITS), help="default: all"
    )
    options = parser.parse_args(arguments)
    if interpreting():
        raise UserError("TRITON_INTERPRET is set: expected it unset, to compile the kernels")
    dtypes = ("float32", "bfloat16")
    jobs = [(arch, dtype) for arch in options.arch for dtype in dtypes]
    with ProcessPoolExecutor() as pool:
        found = list(pool.map(attention_of, *zip(*jobs, strict=True)))
    by_arch = {arch: {} for arch in options.arch}
    for (arch, dtype), kernels in zip(jobs, found, strict=True):
        by_arch[arch][dtype] = kernels
    print(json.dumps(by_arch, indent=1))


if __name__ == "__main__":
    sys.exit(main())
