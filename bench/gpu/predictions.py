"""Which kernels of the model (bench/roofline/, docs/gpu.md) an operator's call consists of.

The symbols are patterns of the names that kernels have in a profile; together they tell which
measured kernels a prediction is of. Two predictions of one kernel are added up.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from bench.device_time import Work
from bench.roofline import training_step
from bench.roofline.cuda import cuda_kernels, spmm_kernels
from bench.roofline.model import Kernel
from nefkern.triton.rates import Gpu

#: By part and name of the model's kernels of csrc/cuda.
CUDA_SYMBOLS = {
    ("knn, fused", "rows: unit length, centred, float16"): "prepare_rows|find_centre|pack_rows|"
    "find_largest",
    ("knn, fused", "scores of the sample"): "estimate_tiles",
    ("knn, fused", "thresholds"): "set_thresholds",
    ("knn, fused", "scores, candidates"): "estimate_tiles",
    ("knn, fused", "re-rank, sort"): "rerank_rows",
    ("knn, fused", "rows left open: none"): "exact_tile|select_rows|DeviceSelect|Compact",
    ("knn of pixels", "knn of pixels"): "direct_rows",
    ("kappa", "names counted"): "count_names",
    ("kappa", "names written"): "write_names",
    ("kappa", "rows merged"): "merge_rows",
    ("kappa", "filled"): "fill_both_merged|Scan|note_nnz|clear_last",
    ("normalized_adjacency", "names counted"): "count_names",
    ("normalized_adjacency", "names written"): "write_names",
    ("normalized_adjacency", "rows merged"): "merge_rows",
    ("normalized_adjacency", "filled"): "fill_merged|Scan|note_nnz|clear_last",
    ("gradient of κ's weights", "listed"): "list_places",
    ("gradient of κ's weights", "joined"): "join_places",
    ("gradient of κ's weights", "scales"): "find_scales",
    ("gradient of κ's weights", "pulls"): "find_pulls",
    ("gradient of κ's weights", "written"): "write_gradients",
    ("add", "counted"): "count_union|Scan|note_nnz|clear_last",
    ("add", "filled"): "fill_union",
    ("spmm", "spmm, float32, scattered clusters"): "spmm_rows|spmm_shared_rows|join_pieces",
    ("spmm", "spmm, bfloat16, photographs"): "spmm_rows|spmm_shared_rows|join_pieces",
}
#: By name of the model's kernels, Triton's.
TRITON_SYMBOLS = {
    "knn: scores": "score",
    "knn: selection": "select",
    "knn: re-rank": "rerank",
    "knn: rows rounded": "pack|unpack|elementwise|reduce",
    "knn: sort, results": "sort|Sort|gather|scatter",
    "spmm, float32": "spmm|multiply",
    "spmm, bfloat16": "spmm|multiply",
}


@dataclass(frozen=True)
class Comparison:
    """One prediction, or several of the same kernels, beside what ran.

    Attributes:
        predicted: seconds a call.
        measured: the same; None: no kernel of such a name ran.
    """

    name: str
    predicted: float
    measured: float | None


def kernels_of(operator: str, backend: str, dtype: str) -> list[Kernel]:
    """What the model says a call launches; empty where it has nothing on it."""
    key = f"{operator}/{dtype}"
    attention = [_halved(training_step.attention(dtype == "bfloat16"))]
    mixed = training_step.sparse(dtype, 4 if dtype == "float32" else 2)
    objective = [
        k for k in training_step.objective_kernels() if k.name.startswith(("R =", "dL/dU"))
    ]
    # What is timed has clusters whose rows stand in no order.
    products = {kernel.name: kernel for kernel in spmm_kernels()}
    product = products["spmm, float32, scattered clusters"]
    cuda = {
        "spmm/float32": [product],
        "spmm/bfloat16": [products["spmm, bfloat16, photographs"]],
        "neuralef_loss/float32": [product, *objective],
        "knn cosine/float32": _part("knn, fused"),
        "knn segments/float32": list(map(_halved, _part("knn of pixels"))),
        "kappa/float32": _part("kappa"),
        "kappa_padded/float32": _part("kappa"),
        "normalized_adjacency mean/float32": _part("normalized_adjacency"),
        "add/float32": _part("add"),
        "weights_gradient/float32": _part("gradient of κ's weights"),
    }
    triton = {
        "spmm/float32": [mixed],
        "spmm/bfloat16": [mixed],
        "neuralef_loss/float32": [mixed, *objective],
        "knn cosine/float32": [
            k for k in training_step.graph_kernels() if k.name.startswith("knn:")
        ],
        "normalized_adjacency mean/float32": _graph("normalized_adjacency"),
        "add/float32": _graph("add"),
        "weights_gradient/float32": [
            k for k in training_step.gradient_kernels() if k.name.startswith("gradient")
        ],
        **{f"linear_attention {m}/{dtype}": attention for m in ("elu", "softmax")},
    }
    return (cuda if backend == "cuda" else triton).get(key, [])


def _part(name: str) -> list[Kernel]:
    return [kernel for kernel in cuda_kernels() if kernel.part == name]


def _graph(name: str) -> list[Kernel]:
    return [kernel for kernel in training_step.graph_kernels() if kernel.name == name]


def _halved(kernel: Kernel) -> Kernel:
    """One of two calls that the model counts together: blocks of ψ, graphs of pixels."""
    share = 0.5
    return Kernel(
        kernel.part, kernel.name, kernel.kind,
        {name: count * share for name, count in kernel.flops.items()},
        kernel.moved * share, kernel.cached * share, kernel.resident,
        round(kernel.launches * share), kernel.shared * share, kernel.issued * share,
        code={arch: (a * share, b * share) for arch, (a, b) in kernel.code.items()},
    )  # fmt: skip


def symbols_of(kernel: Kernel, backend: str) -> str | None:
    if backend == "cuda":
        return CUDA_SYMBOLS.get((kernel.part, kernel.name))
    return TRITON_SYMBOLS.get(kernel.name)


def expected(kernels: Sequence[Kernel], gpu: Gpu) -> float | None:
    return sum(kernel.expected(gpu) for kernel in kernels) if kernels else None


def compared(
    kernels: Sequence[Kernel], backend: str, ran: Mapping[str, Work], calls: int, gpu: Gpu
) -> list[Comparison]:
    """Predictions beside what ran in ``calls`` calls, by the symbols."""
    groups: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        if symbols := symbols_of(kernel, backend):
            groups.setdefault(symbols, []).append(kernel)
    found = []
    for symbols, members in groups.items():
        seconds = [work.seconds for name, work in ran.items() if re.search(symbols, name)]
        found.append(
            Comparison(
                "; ".join(kernel.name for kernel in members),
                sum(kernel.expected(gpu) for kernel in members),
                sum(seconds) / calls if seconds else None,
            )
        )
    return found


def rates() -> Gpu:
    """Of the GPU in use; in a rehearsal those of the one that the model is most often asked of."""
    from nefkern.triton.rates import H200, rates_of

    return rates_of(torch.device("cuda")) if torch.cuda.is_available() else H200
