"""Defects planted in the kernels that ship are reported: missing barriers, steps too far."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nefkern.ops import CSRGraph
from tests.emulator import emulated
from tests.emulator.emulated import Planted
from tests.emulator.test_knn import TUNING
from tests.emulator.test_normalized_adjacency_backward import structure
from tests.emulator.test_spmm import neighbourhoods, rows_of
from tests.ops.graph_common import random_graph, random_lists

pytestmark = pytest.mark.long


def graph_inputs(graph, suffix=""):
    names = ("row_offsets", "columns", "values")
    return {f"{name}{suffix}": getattr(graph, name).numpy() for name in names}


def spmm(folder, graph, k=8, **options):
    x = np.ones((graph.num_nodes, k), dtype=np.float32)
    return emulated.run(
        "spmm", "float32", folder, inputs={**graph_inputs(graph), "x": x},
        outputs={"y": np.float32}, n=len(x), k=k, nnz=graph.nnz, stride=k, shift=0, **options,
    )  # fmt: skip


def kappa(folder, **options):
    indices, weights = random_lists(40, 5)
    return emulated.run(
        "kappa", "int32", folder,
        inputs={"indices": indices.numpy(), "weights": weights.numpy(),
                "pixel_indices": indices[:, :2].numpy()},
        outputs={"values": np.float32}, n=40, k=5, near=2, alpha=0.3, clamp_min=0, padded=0,
        merged_nodes=1 << 16, **{"long_names": 4096, **options},
    )  # fmt: skip


def a_heavy_row() -> CSRGraph:
    columns = torch.arange(600, dtype=torch.int32) % 3
    return CSRGraph(torch.tensor([0, 600, 600, 600]), columns, torch.ones(600), 3)


def add(folder, **options):
    a, b = random_graph(9, 3, seed=1), random_graph(9, 4, seed=2)
    return emulated.run(
        "add", "add", folder, inputs={**graph_inputs(a, "_a"), **graph_inputs(b, "_b")},
        outputs={"values": np.float32}, n=9, nnz_a=a.nnz, nnz_b=b.nnz, alpha=1.0, **options,
    )  # fmt: skip


def weights_gradient(folder, **options):
    indices, weights = random_lists(40, 5)
    offsets, columns = structure(indices, weights)
    return emulated.run(
        "normalized_adjacency_backward", "int32", folder,
        inputs={"indices": indices.numpy(), "weights": weights.numpy(),
                "row_offsets": offsets.numpy(), "columns": columns.numpy(),
                "gradient": np.ones(len(columns), dtype=np.float32)},
        outputs={"found": np.float32}, n=40, k=5, nnz=len(columns), take_union=0, clamp_min=0,
        **options,
    )  # fmt: skip


def knn(folder, **options):
    x = np.random.default_rng(0).standard_normal((130, 100), dtype=np.float32)
    return emulated.run(
        "knn", "knn", folder, inputs={"features": x, "offsets": np.array([0, 130])},
        outputs={"indices": np.int32}, n=130, channels=100, segments=1, k=4, metric=0,
        include_self=0, method=2, **TUNING, order="forward", **options,
    )  # fmt: skip


DEFECTS = {
    # name: (what runs, the defect, which variant must report it, what the report says)
    "spmm: partial sums without a barrier": (
        lambda folder, **options: spmm(folder, a_heavy_row(), **options),
        Planted("spmm_entries.cuh", "__syncthreads();\n  if (warp == 0", "if (warp == 0"),
        "races",
        "race: .* in shared memory",
    ),
    "spmm: an entry too many": (
        lambda folder, **options: spmm(folder, random_graph(9, 3), **options),
        Planted("spmm_entries.cuh", "first + lane < entries.end", "first + lane <= entries.end"),
        "checked",
        "heap-buffer-overflow",
    ),
    "spmm: rows of x used before all copies arrived": (
        lambda folder, **options: spmm(folder, neighbourhoods(40, 30), k=128, **options),
        Planted("spmm_shared.cuh", "__syncthreads();  // this half has arrived for all", "//"),
        "races",
        "race: .* in shared memory",
    ),
    "spmm: pieces of long rows read before all are found": (
        lambda folder, **options: spmm(folder, rows_of([2050, 0, 2100], 3), **options),
        Planted(
            "spmm_long.cuh",
            "if (!__syncthreads_or(own[0].row >= 0 || own[1].row >= 0)) return;",
            "",
        ),
        "races",
        "race: .* in shared memory",
    ),
    "spmm: a long row's last piece as long as the others": (
        lambda folder, **options: spmm(folder, rows_of([2050, 0, 2100], 3), **options),
        Planted("spmm_long.cuh", "min(begin + kPiece, row.end)", "begin + kPiece"),
        "checked",
        "heap-buffer-overflow",
    ),
    "kappa: neighbours counted before all are marked": (
        kappa,
        Planted(
            "merged_rows.cuh",
            "__syncthreads();\n  const int size = count",
            "const int size = count",
        ),
        "races",
        "race: .* in shared memory",
    ),
    "kappa: entries beyond their room": (
        kappa,
        Planted(
            "merged_rows.cuh", "number < row_offsets[row + 1]", "number <= row_offsets[row + 1]"
        ),
        "checked",
        "heap-buffer-overflow|SEGV on unknown address",
    ),
    "gradient of the weights: the largest is compared with before all are there": (
        weights_gradient,
        Planted(
            "normalized_adjacency_backward.cu",
            "__syncwarp();  // all of the row's weights are there",
            "",
        ),
        "races",
        "race: .* in global memory",
    ),
    "gradient of the weights: a place too many": (
        weights_gradient,
        Planted("normalized_adjacency_backward.cu", "place <= last;", "place <= last + 1;"),
        "checked",
        "heap-buffer-overflow",
    ),
    "add: a column too many": (
        add,
        Planted("add.cu", "bool mine = entry < row.size", "bool mine = entry <= row.size"),
        "checked",
        "heap-buffer-overflow",
    ),
    "knn: a stage used before all copies arrived": (
        knn,
        Planted("knn_fused.cuh", "__syncthreads();  // this stage has arrived for all", "//"),
        "races",
        "race: .* in shared memory",
    ),
    "re-rank: candidates' rows used before all lanes' copies arrived": (
        knn,
        Planted("knn_rerank.cuh", "__syncwarp();  // this stage has arrived for all lanes", "//"),
        "races",
        "race: .* in shared memory",
    ),
    "re-rank: candidates joined where scores are still read": (
        knn,
        Planted("knn_rerank.cuh", "__syncthreads();  // the scores are done with", "//"),
        "races",
        "race: .* in shared memory",
    ),
    "re-rank: a candidate too many": (
        knn,
        Planted(
            "knn_rerank.cuh",
            "at < listed ? piece_of(memory.row(at))",
            "at <= listed ? piece_of(memory.row(at))",
        ),
        "checked",
        "heap-buffer-overflow|SEGV on unknown address",
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_reported(tmp_path, name):
    call, planted, variant, report = DEFECTS[name]
    call(tmp_path, variants=(variant,))  # as it ships
    with pytest.raises(emulated.Failed, match=report):
        call(tmp_path, variants=(variant,), planted=planted)
