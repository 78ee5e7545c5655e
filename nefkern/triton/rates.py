"""What GPUs can do by NVIDIA's data sheets; estimates are made of these, nothing measured."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Gpu:
    """Peak rates of one GPU: flop/s and bytes/s; tensor cores without sparsity.

    Attributes:
        name: as :func:`torch.cuda.get_device_name` has it among other words.
        arch: what kernels are compiled for.
        half: float16 and bfloat16 on tensor cores, summed in float32.
        tf32: TF32 on tensor cores.
        float32: the ordinary cores.
        float64: the same, or tensor cores where they have it.
        memory: of the device memory.
        cache: of the L2 cache. The A100's white paper gives 5,120 bytes a clock; there is no such
            figure for the others: the same is taken for H100, H200 and B200, 2,048 for the RTX
            3090 and 4090.
        cache_bytes: the size of the L2 cache.
        multiprocessors, clock: how many, and their boost clock in Hz. In every clock each serves
            one wavefront of shared memory (128 bytes) and starts four instructions of a warp.
    """

    name: str
    arch: str
    half: float
    tf32: float
    float32: float
    float64: float
    memory: float
    cache: float
    cache_bytes: float
    multiprocessors: int
    clock: float

    @property
    def shared(self) -> float:
        """Wavefronts of shared memory a second."""
        return self.multiprocessors * self.clock

    @property
    def issue(self) -> float:
        """Instructions of warps a second."""
        return 4 * self.shared


A100 = Gpu(
    "A100", "sm_80", 312e12, 156e12, 19.5e12, 19.5e12, 1.555e12, 5120 * 1.41e9, 40 << 20,
    108, 1.41e9,
)  # fmt: skip
H100 = Gpu(
    "H100", "sm_90", 989e12, 495e12, 67e12, 67e12, 3.35e12, 5120 * 1.755e9, 50 << 20,
    132, 1.755e9,
)  # fmt: skip
# The H100's chip with other memory.
H200 = Gpu(
    "H200", "sm_90", 989e12, 495e12, 67e12, 67e12, 4.8e12, 5120 * 1.755e9, 50 << 20,
    132, 1.755e9,
)  # fmt: skip
RTX_3090 = Gpu(
    "RTX 3090", "sm_86", 71e12, 35.6e12, 35.6e12, 0.56e12, 0.936e12, 2048 * 1.7e9, 6 << 20,
    82, 1.7e9,
)  # fmt: skip
RTX_4090 = Gpu(
    "RTX 4090", "sm_89", 165e12, 82.6e12, 82.6e12, 1.29e12, 1.008e12, 2048 * 2.52e9, 72 << 20,
    128, 2.52e9,
)  # fmt: skip
B200 = Gpu(
    "B200", "sm_100", 2.25e15, 1.1e15, 75e12, 37e12, 7.7e12, 5120 * 1.85e9, 126 << 20,
    148, 1.85e9,
)  # fmt: skip
GPUS = (A100, H100, H200, RTX_3090, RTX_4090, B200)


def rates_of(device: torch.device) -> Gpu:
    """The rates that stand for ``device``: its own, else an older one's."""
    if device.type != "cuda":
        return A100
    name = torch.cuda.get_device_name(device)
    return by_name(name) or by_capability(torch.cuda.get_device_capability(device))


def by_name(device_name: str) -> Gpu | None:
    """The GPU named in "NVIDIA H100 80GB HBM3" or the like; a GH200 is no H200."""
    return next((gpu for gpu in GPUS if re.search(rf"\b{gpu.name}\b", device_name)), None)


def by_capability(capability: tuple[int, int]) -> Gpu:
    """The first GPU of that compute capability, else the H100 from 9.0 on and the A100 below."""
    arch = "sm_{}{}".format(*capability)
    newer = H100 if capability[0] >= 9 else A100
    return next((gpu for gpu in GPUS if gpu.arch == arch), newer)
