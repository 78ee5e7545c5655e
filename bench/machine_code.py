"""What a compiled kernel asks of a multiprocessor, counted in its machine code.

``nvdisasm``'s listing is taken as blocks between labels; a branch back to a label is a loop, whose
instructions count as often as the loop is run, which the caller knows. What is counted is what a
warp issues: wavefronts of shared memory as if no two lanes met in a bank, bytes of global memory as
if no lane were masked, products by their kind and precision.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

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
