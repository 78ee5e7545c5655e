"""spmm by dense rows: when it is chosen, and that it keeps what half precision promises."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton")
from nefkern import backend, backends, ops
from nefkern.ops import CSRGraph
from nefkern.triton import crossover
from nefkern.triton import spmm as kernels
from nefkern.triton.crossover import dense_rows, dense_seconds, gathered_seconds, prefers_dense
from nefkern.triton.rates import GPUS, H100
from tests.ops.graph_common import assert_half_close, moved, on_backend_device, random_graph

spmm, neuralef_loss = on_backend_device(ops.spmm), on_backend_device(ops.neuralef_loss)

N, ENTRIES, K = 14_400, 5_200_000, 256

needs_triton = pytest.mark.skipif(
    backends.why_not("triton") is not None, reason=str(backends.why_not("triton"))
)


@pytest.fixture
def dense(monkeypatch):
    """Every bfloat16 product goes by dense rows, 50 at a time; yields the blocks' sizes."""
    blocks = []
    product = kernels._product

    def counted(a, b):
        blocks.append(len(a))
        return product(a, b)

    monkeypatch.setattr(kernels, "prefers_dense", lambda n, nnz, k, dtype, gpu: True)
    monkeypatch.setattr(kernels, "dense_rows", lambda n: 50)
    monkeypatch.setattr(kernels, "_product", counted)
    return blocks


def signed(rows: int, width: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(3)).bfloat16()


@needs_triton
@pytest.mark.parametrize("n", [1, 50, 120])
def test_dense_rows_are_rounded_once(n, dense):
    graph, x = random_graph(n, 30, symmetric=False), signed(n, 33)
    with backend("triton"):
        y = spmm(graph, x)
    assert sum(dense) == n
    assert max(dense) <= 50
    assert y.dtype == torch.bfloat16
    assert_half_close(y, graph.to_dense().double() @ x.double(), torch.bfloat16)


@needs_triton
def test_both_ways_agree_before_rounding(dense, monkeypatch):
    graph, x = moved("triton", random_graph(120, 30), signed(120, 20))
    by_rows = kernels.spmm(*graph.tensors(), x, torch.float32)
    assert dense
    monkeypatch.setattr(kernels, "prefers_dense", prefers_dense)
    gathered = kernels.spmm(*graph.tensors(), x, torch.float32)
    bound = 2**-15 * (graph.to_dense().abs() @ x.float().abs())
    assert ((by_rows - gathered).abs() <= bound).all()


@needs_triton
def test_loss_and_strides(dense):
    graph, x = moved("triton", random_graph(120, 30), signed(240, 40))
    x = x[::2, 3:20]
    with backend("triton"):
        loss, r = neuralef_loss(x, graph, 0.1)
        assert torch.equal(spmm(graph, x), spmm(graph, x.contiguous()))
    with backend("reference"):
        expected, expected_r = neuralef_loss(x.cpu(), graph.to("cpu"), 0.1)
    torch.testing.assert_close(r, expected_r, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


@needs_triton
def test_a_node_out_of_range_counts_as_absent(dense):
    offsets, columns = torch.tensor([0, 2, 3]), torch.tensor([0, 2, -1], dtype=torch.int32)
    graph = moved("triton", offsets, columns, torch.ones(3), torch.ones(2, 4).bfloat16())
    y = kernels._dense_spmm(*graph)
    assert torch.equal(y.cpu(), torch.tensor([[1.0], [0.0]]).expand(2, 4))


@needs_triton
@pytest.mark.parametrize("offsets", [[0, 3, 2], [0, 9, 2], [-1, 1, 2], [2, 1, 2]])
@pytest.mark.parametrize("by_rows", [False, True])
def test_a_row_whose_offsets_make_no_sense_counts_as_empty(offsets, by_rows, dense, monkeypatch):
    """Nothing checks them on a GPU. (What stands beyond the entries would show.)"""
    monkeypatch.setattr(kernels, "check_content", lambda *graph: None)
    monkeypatch.setattr(kernels, "prefers_dense", lambda *args: by_rows)
    columns, values = torch.zeros(20, dtype=torch.int32), torch.full((20,), 7.0)
    graph = moved("triton", torch.tensor(offsets), columns[4:6], values[4:6])
    y = kernels.spmm(*graph, *moved("triton", torch.ones(2, 4).bfloat16()), torch.float32).cpu()
    ends = itertools.pairwise(offsets)
    sums = [7.0 * (b - a) if 0 <= a <= b <= 2 else 0.0 for a, b in ends]
    assert torch.equal(y, torch.tensor(sums)[:, None].expand(2, 4))


def test_one_bfloat16_term_would_break_the_promise():
    graph, x = random_graph(120, 30), signed(120, 33)
    exact = graph.to_dense().double() @ x.double()
    rounded = (graph.to_dense().bfloat16().double() @ x.double()).bfloat16()
    with pytest.raises(AssertionError, match="largest excess"):
        assert_half_close(rounded, exact, torch.bfloat16)


@pytest.mark.parametrize("gpu", GPUS, ids=[gpu.name for gpu in GPUS])
def test_chosen_where_it_should_take_half_as_long(gpu):
    assert not prefers_dense(N, ENTRIES, K, torch.bfloat16, gpu), "the paper's size"
    assert not prefers_dense(N, 0, K, torch.bfloat16, gpu)
    assert not prefers_dense(N, N * N, 0, torch.bfloat16, gpu)
    chosen = [prefers_dense(N, share * N * N // 100, K, torch.bfloat16, gpu)
              for share in range(1, 101)]  # fmt: skip
    assert chosen == sorted(chosen), "once dense enough, always"
    assert chosen[-1], "a full matrix"
    for dtype in (torch.float32, torch.float16, torch.float64):
        assert not prefers_dense(N, N * N, K, dtype, gpu), "never"


def test_seconds_by_hand():
    gpu = H100
    gathered = 2 * ENTRIES * K / (gpu.cache * crossover.CACHE)
    assert gathered_seconds(N, ENTRIES, K, gpu) == pytest.approx(gathered)
    written = (4 * N * N + 128 * ENTRIES) / (3.35e12 * crossover.MEMORY)
    product = 4 * N * N * K / (989e12 * crossover.PRODUCT)
    assert dense_seconds(N, ENTRIES, K, gpu) == pytest.approx(written + product)


@pytest.mark.parametrize("n", [1, 100, N, 10**6, 10**8])
def test_memory_is_bounded(n):
    rows = dense_rows(n)
    assert 1 <= rows <= n
    assert rows == 1 or 4 * n * rows <= crossover.WORKSPACE


@needs_triton
def test_a_nan_in_the_graph_is_not_hidden(dense):
    nan = torch.tensor([[0x7FFFFFFF]], dtype=torch.int32).view(torch.float32)
    graph, x = moved("triton", CSRGraph.from_torch(nan, symmetric=True), torch.ones(1, 2))
    assert kernels.spmm(*graph.tensors(), x.bfloat16(), torch.float32).isnan().all()
