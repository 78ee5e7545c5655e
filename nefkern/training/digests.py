"""What a recorded step says of its tensors: hashes, and numbers that survive rounding.

Images, options and weights before a step are exact: they have a hash. So do κ and all that comes
from the kernels, which give the same bits at any number of threads, wherever their input does. What
a matrix product of PyTorch has made may differ in its last bits between threads, processors and
versions. Beside its hash it therefore has eight numbers aᵀ X b / |X|, with random signs a and b: an
entry that changes by ε changes each of them by ε/|X|, rounding changes them by about its relative
size. Whoever compares takes the hash, and where that differs, the numbers within a tolerance.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from nefkern.ops import CSRGraph, spmm

Digest = dict[str, Any]

#: Hexadecimal digits of a SHA-256 that are kept: 128 bits.
_DIGITS = 32
_PROBES = 8

#: How far numbers may be apart where hashes differ: in float32, and where products are done in
#: bfloat16 or TF32. Measured between 1 and 2 threads they are apart by 1e-6 and 1e-3 at most.
TOLERANCE = {"float32": 1e-3, "rounded": 3e-2}


def content_hash(*tensors: Tensor) -> str:
    """SHA-256 of tensors' types, shapes and bytes, its first 128 bits in hexadecimal."""
    found = hashlib.sha256()
    for tensor in tensors:
        on_host = tensor.detach().cpu().contiguous()
        found.update(f"{on_host.dtype} {tuple(on_host.shape)};".encode())
        found.update(on_host.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:_DIGITS]


def image_hashes(images: Tensor) -> list[str]:
    """Of each image's pixels, ``[B, 3, H, W]``."""
    return [content_hash(image) for image in images]


def state_hashes(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Of every tensor of a module."""
    return {name: content_hash(tensor) for name, tensor in state.items()}


def digest(tensor: Tensor) -> Digest:
    """Of a tensor that products have made, ``[..., C]``."""
    rows = tensor.detach().float()
    rows = rows.reshape(-1, rows.shape[-1]) if rows.ndim else rows.reshape(1, 1)
    probes = _signs(len(rows), 0, rows.device) * (rows @ _signs(rows.shape[1], 1, rows.device))
    return {"sha256": content_hash(tensor), **_numbers(probes, rows)}


def joint_digest(tensors: Iterable[Tensor]) -> Digest:
    """Of several tensors together, as of all gradients: one norm, and the sums of their numbers."""
    tensors = [t.detach() for t in tensors]
    parts = [digest(t) for t in tensors]
    norm = sum(part["norm"] ** 2 for part in parts) ** 0.5
    sums = [sum(p["probes"][i] * p["norm"] for p in parts) for i in range(_PROBES)]
    probes = [_rounded(one / norm) if norm else 0.0 for one in sums]
    return {"sha256": content_hash(*tensors), "norm": _rounded(norm), "probes": probes}


def graph_digest(graph: CSRGraph) -> Digest:
    """Of a sparse graph: whatever it was padded by does not count."""
    entries, nodes = int(graph.row_offsets[-1]), graph.num_nodes
    columns, values = graph.columns[:entries], graph.values.detach()[:entries]
    own = CSRGraph(graph.row_offsets, columns, values, nodes, symmetric=graph.symmetric)
    probes = spmm(own, _signs(nodes, 1, graph.device).to(graph.dtype))
    probes = _signs(nodes, 0, graph.device) * probes
    return {"sha256": content_hash(*own.tensors()), "entries": entries, **_numbers(probes, values)}


def difference(recorded: Digest, found: Digest, tolerance: float) -> str:
    """What is different between two digests, in words; "" if nothing is."""
    if recorded["sha256"] == found["sha256"]:
        return ""
    norms = abs(recorded["norm"] - found["norm"]) / max(recorded["norm"], 1e-30)
    pairs = zip(recorded["probes"], found["probes"], strict=True)
    apart = max([norms, *(abs(a - b) for a, b in pairs)])
    if apart <= tolerance:
        return ""
    return f"differs by {apart:.2g} of its norm (up to {tolerance:g} is rounding)"


def is_exact(recorded: Digest, found: Digest) -> bool:
    """Whether two digests are of the same bits."""
    return recorded["sha256"] == found["sha256"]


def _numbers(probes: Tensor, of: Tensor) -> Digest:
    norm = float(of.double().square().sum().sqrt())
    sums = probes.double().sum(0).tolist()
    return {
        "norm": _rounded(norm),
        "probes": [_rounded(one / norm) if norm else 0.0 for one in sums],
    }


def _rounded(number: float) -> float:
    return float(f"{number:.7g}")


@functools.lru_cache(maxsize=16)
def _signs(count: int, which: int, device: torch.device) -> Tensor:
    """Eight columns of random signs, float32 ``[count, 8]``: the same everywhere."""
    generator = torch.Generator().manual_seed(2 * count + which)
    return (torch.randint(0, 2, (count, _PROBES), generator=generator) * 2.0 - 1).to(device)
