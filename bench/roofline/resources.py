"""What the compiled kernels need, as it stands in docs/gpu.md."""

from __future__ import annotations

import re
from collections.abc import Sequence

from bench.roofline.tables import table_row
from nefkern.runtime.errors import UserError


def condensed(found: Sequence) -> str:
    """One row a kernel and architecture: the worst of its configurations.

    Args:
        found: :class:`nefkern.triton.resources.Resources` of every kernel that ships.
    """
    groups: dict[tuple[str, str], list] = {}
    for row in found:
        groups.setdefault((_kernel_of(row.name), row.arch), []).append(row)
    lines = [
        "| kernel | arch | variants | registers | shared | occupancy | spilled | tensor cores |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for (name, arch), rows in sorted(groups.items(), key=lambda g: (g[0][0], int(g[0][1][3:]))):
        lines.append(
            table_row(
                name, arch, str(len(rows)),
                str(max(r.registers for r in rows)),
                f"{max(r.shared for r in rows) / 1024:.1f} KiB",
                f"{min(r.occupancy for r in rows):.0%}",
                f"{max(r.spilled for r in rows)} B",
                ", ".join(sorted({r.instruction or "**none**" for r in rows if r.product})),
            )
        )  # fmt: skip
    return "\n".join(lines)


def _kernel_of(name: str) -> str:
    """Operator and kernel without the variant: no word with a digit or a comma is a kernel."""
    return re.match(r"\w+( [a-z_]+\b(?!,))?", name)[0]


def triton_resources() -> str:
    from nefkern.triton.resources import ARCHITECTURES, examine_all

    return condensed(examine_all(ARCHITECTURES))


def cuda_resources() -> str:
    """The kernels of csrc/cuda; threads and shared memory as they are launched at this size."""
    from tests.cuda import launchers, resources

    if missing := launchers.missing_tool() or (not resources.cuobjdump() and "no cuobjdump"):
        raise UserError(f"{missing}: expected the CUDA toolkit, and cmake and g++")
    return resources.condensed(resources.examine_all(), launchers.launched())
