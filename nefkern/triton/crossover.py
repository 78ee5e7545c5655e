"""When a product with κ should go through a dense κ: the one place where this is decided.

Half precision promises float32 sums, rounded once. κ rounded to bfloat16 breaks it: 2^-8 of every
term, as much as the result's own rounding, and any multiple of it where terms cancel. So the dense
way splits each entry into two bfloat16 numbers, whose sum has 16 significant bits (2^-16 of a term,
1/256 of the result's rounding), and both are summed by one product:

    kappa x = [hi | lo] [x]
                        [x]

float32 operands would need three such terms and three of x, float16 ones a scale that keeps the
second term in range; both stay with gathered rows.
"""

from __future__ import annotations

import torch

from nefkern.triton.rates import A100, Gpu

#: Bytes of the dense rows that exist at a time, unless a single one takes more.
WORKSPACE = 256 << 20
BYTES_AN_ENTRY = 4  # hi and lo
#: What writing one entry into dense rows moves: a sector of 32 bytes read and written, hi and lo.
SCATTERED = 128
#: Shares of the peaks that a library's product, memory and gathers reach (see docs/gpu.md).
PRODUCT, MEMORY, CACHE = 0.65, 0.8, 0.6
#: Both times are estimates, so that the dense way must be this much shorter.
MARGIN = 2.0


def prefers_dense(
    num_nodes: int, nnz: int, width: int, dtype: torch.dtype, gpu: Gpu = A100
) -> bool:
    """Whether kappa x, x [num_nodes, width] of ``dtype``, should be a dense product.

    A function of shapes alone: nothing is read back from the device. Only ever for bfloat16.
    """
    if dtype != torch.bfloat16 or not nnz or not width:
        return False
    return MARGIN * dense_seconds(num_nodes, nnz, width, gpu) < gathered_seconds(
        num_nodes, nnz, width, gpu
    )


def gathered_seconds(num_nodes: int, nnz: int, width: int, gpu: Gpu) -> float:
    """A row of x for every entry, through the L2 cache as far as x fits it."""
    gathered, x = 2.0 * nnz * width, 2.0 * num_nodes * width
    missed = gathered * max(0.0, 1 - gpu.cache_bytes / x)
    return max(gathered / (gpu.cache * CACHE), missed / (gpu.memory * MEMORY))


def dense_seconds(num_nodes: int, nnz: int, width: int, gpu: Gpu) -> float:
    """Dense rows cleared, filled, and multiplied (the product reads them as it goes)."""
    bytes_ = float(BYTES_AN_ENTRY * num_nodes**2)
    scattered = min(SCATTERED * nnz, 2 * bytes_)  # where entries are near, they share sectors
    filled = (bytes_ + scattered) / (gpu.memory * MEMORY)
    product = 2 * 2.0 * num_nodes**2 * width / (gpu.half * PRODUCT)
    return filled + max(product, bytes_ / (gpu.memory * MEMORY))


def dense_rows(num_nodes: int) -> int:
    """How many dense rows fit the workspace; at least one."""
    return max(1, min(num_nodes, WORKSPACE // (BYTES_AN_ENTRY * num_nodes)))
