"""What kernels that are not of ``csrc/cuda`` ask of a GPU: Triton's ``sddmm``, and the gradient of
kappa's weights, which is PyTorch's there. Part of ``python -m tests.emulator.costs``.

Triton's programs run in its interpreter, whose loads and stores are counted in sectors of 32 bytes;
PyTorch's operations are counted as if each were a kernel that reads and writes its tensors once.
Wavefronts and instructions of either are not known.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import numpy as np

from tests.emulator import graphs

SECTOR = 32
NODES, NEIGHBOURS, COLUMNS = 225, 32, 256


@functools.cache
def run() -> dict[str, dict[str, float]]:
    """Counts by kernel, per entry (sddmm) and per listed neighbour; in a process of its own, since
    Triton decides at its import whether it interprets."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.emulator.other_costs"], check=True, capture_output=True,
        text=True, env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    return json.loads(done.stdout)


def sddmm() -> dict[str, float]:
    """Of one graph of photographs, in float32."""
    import torch
    from triton.runtime.interpreter import InterpreterBuilder

    from nefkern.triton.sddmm import sddmm as kernel

    counts = dict.fromkeys(("sectors_read", "sectors_written"), 0)

    def counting(method, name: str):
        def count(self, pointers, *rest):
            mask = next(r for r in reversed(rest) if getattr(r, "data", None) is not None
                        and r.data.dtype == np.bool_)  # fmt: skip
            places = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
            counts[name] += len(np.unique(places.astype(np.int64) // SECTOR))
            return method(self, pointers, *rest)

        return count

    builder = InterpreterBuilder
    for name, kind in (("create_masked_load", "sectors_read"),
                       ("create_masked_store", "sectors_written")):  # fmt: skip
        setattr(builder, name, counting(getattr(builder, name), kind))
    offsets, columns, _ = graphs.adjacency(graphs.photographs(1, 15, NEIGHBOURS))
    x = torch.ones(NODES, COLUMNS)
    kernel(torch.from_numpy(offsets), torch.from_numpy(columns), x, x)
    return {name: count / len(columns) for name, count in counts.items()}


def kappa_backward() -> dict[str, float]:
    """Of PyTorch's formula, on lists of photographs; ``launches`` of a whole call."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from nefkern import reference

    counts = dict.fromkeys(("sectors_read", "sectors_written", "launches"), 0)

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            outputs = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
            inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            known = {t.untyped_storage().data_ptr() for t in inputs}
            is_view = all(t.untyped_storage().data_ptr() in known for t in outputs)
            if outputs and not (is_view and not function._schema.is_mutable):
                counts["launches"] += 1
                counts["sectors_read"] += sum(t.nbytes for t in inputs) / SECTOR
                counts["sectors_written"] += sum(t.nbytes for t in outputs) / SECTOR
            return result

    lists = graphs.photographs(1, 15, NEIGHBOURS)
    indices, weights = torch.from_numpy(lists.indices), torch.from_numpy(lists.weights)
    offsets, columns, _ = graphs.adjacency(lists)
    grad = torch.ones(len(columns))
    with Counting():
        reference.normalized_adjacency_backward(
            grad,
            indices,
            weights,
            torch.from_numpy(offsets),
            torch.from_numpy(columns),
            "mean",
            0.0,
        )
    edges = indices.numel()
    return {name: n if name == "launches" else n / edges for name, n in counts.items()}


if __name__ == "__main__":
    print(json.dumps({"sddmm": sddmm(), "kappa_backward": kappa_backward()}))
