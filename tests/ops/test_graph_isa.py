"""The graph kernels' copies for lesser processors than the one that runs the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nefkern import backends, reference
from nefkern.ops import add, kappa, neuralef_loss, normalized_adjacency, registry, sddmm, spmm
from tests.ops.graph_common import (
    assert_half_close,
    dense_adjacency,
    random_graph,
    random_lists,
)

ROOT = Path(__file__).resolve().parents[2]
LEVELS = ("baseline", "avx2", "avx512", "avx512bf16")


def check_kernels() -> None:
    """Every graph kernel against dense float64 formulas, over widths around the vectors' sizes."""
    for n, k in [(1, 1), (40, 7), (130, 33)]:
        indices, weights = random_lists(n, k)
        for symmetrize in ("mean", "union"):
            graph = normalized_adjacency(indices, weights, num_nodes=n, symmetrize=symmetrize)
            exact = dense_adjacency(indices, weights, n, symmetrize)
            found = graph.validate().to_dense().double()
            torch.testing.assert_close(found, exact, rtol=1e-6, atol=0)
        near = random_lists(n, 5, seed=7)[0]
        exact = dense_adjacency(indices, weights, n) + 0.3 * dense_adjacency(near, None, n, "union")
        found = kappa(indices, weights, near, num_nodes=n).validate().to_dense().double()
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-9)
    check_backward()
    graph = random_graph(90, 9, seed=1)
    other = random_graph(90, 3, seed=2)
    total = add(graph, other, 0.3).validate()
    exact = graph.to_dense().double() + 0.3 * other.to_dense().double()
    torch.testing.assert_close(total.to_dense().double(), exact, rtol=1e-6, atol=1e-7)
    for width in (1, 3, 4, 5, 8, 15, 16, 17, 63, 100, 129, 257):
        x = torch.randn(90, width, generator=torch.Generator().manual_seed(width))
        torch.testing.assert_close(
            spmm(graph, x).double(), graph.to_dense().double() @ x.double(), rtol=1e-5, atol=1e-5
        )
        values = (x.double() @ x.double().T)[graph.to_dense() != 0]
        torch.testing.assert_close(sddmm(graph, x, x).double(), values, rtol=1e-5, atol=1e-5)
        half = x.bfloat16()
        exact = graph.to_dense().double() @ half.double()
        assert_half_close(spmm(graph, half), exact, torch.bfloat16)
        loss, r = neuralef_loss(half, graph, 0.3, 0.5)
        torch.testing.assert_close(r.double(), half.double().T @ exact, rtol=1e-5, atol=1e-3)
        assert loss.isfinite()
    special = torch.tensor([[float("nan"), float("inf"), -0.0, 3e38] * 8] * 90).bfloat16()
    path = normalized_adjacency(torch.arange(90)[:, None].flip(0), num_nodes=90)
    torch.testing.assert_close(spmm(path, special), special, equal_nan=True)


def check_backward() -> None:
    """The gradients of weights and of a sum's values against the float64 reference."""
    indices, weights = random_lists(130, 33)
    for symmetrize in ("mean", "union"):
        own = normalized_adjacency(indices, weights, num_nodes=130, symmetrize=symmetrize)
        total = add(own, random_graph(130, 3), 0.3)
        structure = total.tensors()[:2]
        grad = torch.randn(total.nnz, generator=torch.Generator().manual_seed(0))
        found = registry.call(
            "normalized_adjacency_backward", grad, indices, weights, *structure, symmetrize, 0.0
        )
        exact = reference.normalized_adjacency_backward(
            grad.double(), indices, weights.double(), *structure, symmetrize, 0.0
        )
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)
        found = registry.call("add_backward", grad, *structure, *own.tensors()[:2])
        assert torch.equal(found, reference.add_backward(grad, *structure, *own.tensors()[:2]))


@pytest.mark.skipif(backends.why_not("cpu") is not None, reason=str(backends.why_not("cpu")))
@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set(level):
    best = backends.native_module().build_info()["isa"]
    expected = LEVELS[min(LEVELS.index(level), LEVELS.index(best))]
    code = (
        "from nefkern import backend, backends\n"
        f"assert backends.native_module().build_info()['isa'] == {expected!r}\n"
        "from tests.ops.test_graph_isa import check_kernels\n"
        "with backend('cpu'): check_kernels()\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "NEFKERN_ISA": level},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
