"""What three GPUs can do by NVIDIA's data sheets; estimates are made of these, nothing measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Gpu:
    """Peak rates of one GPU: flop/s and bytes/s; tensor cores without sparsity.

    Attributes:
        half: float16 and bfloat16 on tensor cores, summed in float32.
        tf32: TF32 on tensor cores.
        float32: the ordinary cores.
        float64: the same, or tensor cores where they have it.
        memory: of the device memory.
        cache: of the L2 cache. The A100's white paper gives 5,120 bytes a clock; there is no such
            figure for the others: the same is taken for the H100, 2,048 for the RTX 3090.
        cache_bytes: the size of the L2 cache.
    """

    name: str
    half: float
    tf32: float
    float32: float
    float64: float
    memory: float
    cache: float
    cache_bytes: float


GPUS = {
    "sm_80": Gpu("A100", 312e12, 156e12, 19.5e12, 19.5e12, 1.555e12, 5120 * 1.41e9, 40 << 20),
    "sm_90": Gpu("H100", 989e12, 495e12, 67e12, 67e12, 3.35e12, 5120 * 1.755e9, 50 << 20),
    "sm_86": Gpu("RTX 3090", 71e12, 35.6e12, 35.6e12, 0.56e12, 0.936e12, 2048 * 1.7e9, 6 << 20),
}


def rates_of(device: torch.device) -> Gpu:
    """The rates that stand for ``device``: its own, else the A100's."""
    if device.type != "cuda":
        return GPUS["sm_80"]
    major, minor = torch.cuda.get_device_capability(device)
    return GPUS.get(f"sm_{major}{minor}", GPUS["sm_90" if major >= 9 else "sm_80"])
