"""The CUDA kernel of ``spmm``, emulated, against the float64 reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nefkern import reference
from nefkern.ops import CSRGraph
from tests.emulator import emulated
from tests.ops.graph_common import assert_half_close, random_graph

pytestmark = pytest.mark.long

CASES = {
    "float32": (torch.float32, torch.float32),
    "float16": (torch.float16, torch.float16),
    "float16_wide": (torch.float16, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "bfloat16_wide": (torch.bfloat16, torch.float32),
}


def to_numpy(x: torch.Tensor) -> np.ndarray:
    """Any dtype: half precision as its bits."""
    return (x.view(torch.int16) if x.element_size() == 2 else x).numpy()


def emulate(folder, graph, x, case, *, stride=None, shift=0):
    """kappa x by the emulated kernel; rows ``stride`` apart, the first ``shift`` off alignment."""
    k, dtype = x.shape[1], CASES[case][1]
    stride = k if stride is None else stride
    padded = x.new_full((x.shape[0], stride), float("nan"))
    padded[:, :k] = x
    got = emulated.run(
        "spmm", case, folder,
        inputs={
            "row_offsets": graph.row_offsets.numpy(), "columns": graph.columns.numpy(),
            "values": graph.values.numpy(), "x": to_numpy(padded),
        },
        outputs={"y": np.float32 if dtype == torch.float32 else np.int16},
        n=x.shape[0], k=k, nnz=graph.nnz, stride=stride, shift=shift,
    )["y"]  # fmt: skip
    y = torch.from_numpy(got)
    return (y if dtype == torch.float32 else y.view(dtype)).reshape(x.shape)


def exact(graph: CSRGraph, x: torch.Tensor) -> torch.Tensor:
    return reference.spmm(*graph.tensors()[:2], graph.values.double(), x.double())


def operand(n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(k)).to(dtype)


def assert_close(got, expected, dtype):
    if dtype == torch.float32:
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    else:
        assert_half_close(got, expected, dtype)


@pytest.mark.parametrize("case", CASES)
# Narrow ones are shared by groups of lanes; 5 and 100 are no whole number of 16-byte loads in half
# precision; 264 and 520 need two tiles with a ragged one.
@pytest.mark.parametrize("k", [1, 5, 8, 64, 100, 264, 520])
def test_agrees_with_the_reference(tmp_path, case, k):
    graph = random_graph(37, 9, seed=k)
    x = operand(37, k, CASES[case][0])
    got = emulate(tmp_path, graph, x, case)
    assert_close(got, exact(graph, x), CASES[case][1])


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9])
def test_few_rows(tmp_path, n):
    graph, x = random_graph(n, 4, seed=n), operand(n, 12, torch.float32)
    assert_close(emulate(tmp_path, graph, x, "float32"), exact(graph, x), torch.float32)


@pytest.mark.parametrize(("k", "case"), [(20, "float32"), (13, "float32"), (300, "bfloat16_wide")])
def test_heavy_rows_are_the_whole_blocks(tmp_path, k, case):
    """Rows beyond what a warp takes alone, two in one block, the last block ragged."""
    n, generator = 13, torch.Generator().manual_seed(0)
    sizes = [{1: 512, 6: 900, n - 1: 2000, n - 2: 511}.get(i, 3) for i in range(n)]
    offsets = torch.tensor([0, *np.cumsum(sizes)])
    columns = torch.randint(n, (sum(sizes),), generator=generator, dtype=torch.int32)
    values = torch.randn(len(columns), generator=generator)
    graph = CSRGraph(offsets, columns, values, n)
    x = operand(n, k, CASES[case][0])
    got = emulate(tmp_path, graph, x, case)
    torch.testing.assert_close(got.double(), exact(graph, x), rtol=1e-4, atol=1e-4)


def rows_of(sizes: list[int], n: int, seed: int = 0) -> CSRGraph:
    """Rows of these sizes, of columns in no order."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randint(n, (sum(sizes),), generator=generator, dtype=torch.int32)
    values = torch.randn(len(columns), generator=generator)
    return CSRGraph(torch.tensor([0, *np.cumsum(sizes)]), columns, values, n)


@pytest.mark.parametrize(("k", "shift"), [(20, 0), (20, 1), (68, 0)])
def test_long_rows_are_taken_in_pieces(tmp_path, k, shift):
    """Of two and three pieces: one that begins where a chunk does, one in a chunk where another
    ends, one that is the last; one of just no more than a piece; the last chunk is not whole."""
    sizes = [2048, 2050, 0, 4100, 3, 2049]
    graph, x = rows_of(sizes, len(sizes)), operand(len(sizes), k, torch.float32)
    got = emulate(tmp_path, graph, x, "float32", stride=k, shift=shift)
    torch.testing.assert_close(got.double(), exact(graph, x), rtol=1e-4, atol=1e-3)


def test_a_row_in_pieces_does_not_depend_on_where_it_begins(tmp_path):
    long = rows_of([2500, *[0] * 6], 7)
    x = operand(7, 8, torch.float32)
    found = []
    for before in (0, 1, 2047):
        offsets = torch.tensor([0, before, before + 2500, *[before + 2500] * 5])
        columns = torch.cat([torch.zeros(before, dtype=torch.int32), long.columns])
        graph = CSRGraph(offsets, columns, torch.cat([torch.ones(before), long.values]), 7)
        found.append(emulate(tmp_path, graph, x, "float32")[1])
    assert all(torch.equal(one, found[0]) for one in found)


def neighbourhoods(n: int, width: int) -> CSRGraph:
    """Rows that share most of their columns with the rows beside them, ascending; some empty."""
    dense = torch.zeros(n, n)
    generator = torch.Generator().manual_seed(n)
    for i in range(n):
        if i % 7 != 3:
            first = max(0, i - width // 2)
            size = dense[i, first : first + width].numel()
            kept = torch.rand(size, generator=generator) < 0.7
            dense[i, first : first + width] = torch.randn(size, generator=generator) * kept
    return CSRGraph.from_torch(dense)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("n", "k"), [(70, 256), (45, 520), (33, 200)])
def test_shared_rows_have_the_bits_of_gathered_ones(tmp_path, case, n, k):
    """Sums in the order of the columns, whoever reads them: unaligned rows are not shared."""
    graph, x = neighbourhoods(n, 30), operand(n, k, CASES[case][0])
    got = emulate(tmp_path, graph, x, case)
    assert_close(got, exact(graph, x), CASES[case][1])
    assert torch.equal(got, emulate(tmp_path, graph, x, case, shift=1))


def test_rows_are_shared_only_where_that_is_right(tmp_path):
    """Columns in no order, twice or out of range: in one row of a block, and in the next none."""
    graph, x = neighbourhoods(70, 30), operand(70, 128, torch.float32)
    expected = exact(graph, x)
    for row, columns in ((5, [9, 3]), (5, [3, 3]), (64, [-1, 2]), (69, [0, 2**31 - 1])):
        begin = int(graph.row_offsets[row])
        changed = graph.columns.clone()
        changed[begin : begin + 2] = torch.tensor(columns, dtype=torch.int32)
        broken = CSRGraph(graph.row_offsets, changed, graph.values, 70)
        got = emulate(tmp_path, broken, x, "float32")
        kept = torch.arange(70) != row
        assert_close(got[kept], expected[kept], torch.float32)
        there = [i for i in range(begin, int(graph.row_offsets[row + 1])) if 0 <= changed[i] < 70]
        own = (graph.values[there, None].double() * x[changed[there].long()].double()).sum(0)
        assert_close(got[row], own, torch.float32)


def test_what_a_row_does_not_have_is_not_added_to_it(tmp_path):
    """A NaN or infinity of x among rows that are shared: 0 times them is not 0."""
    graph, x = neighbourhoods(64, 20), operand(64, 256, torch.float32)
    x[10], x[50] = float("nan"), float("inf")
    dense = graph.to_dense()
    got = emulate(tmp_path, graph, x, "float32")
    touched = (dense[:, 10] != 0) | (dense[:, 50] != 0)
    assert 0 < touched.sum() < 64
    assert torch.equal(~got.isfinite().all(1), touched)


@pytest.mark.parametrize("case", ["float32", "bfloat16"])
@pytest.mark.parametrize(("stride", "shift"), [(72, 0), (67, 0), (64, 1)])
def test_padded_rows_and_unaligned_memory(tmp_path, case, stride, shift):
    graph, x = random_graph(20, 5), operand(20, 64, CASES[case][0])
    got = emulate(tmp_path, graph, x, case, stride=stride, shift=shift)
    assert_close(got, exact(graph, x), CASES[case][1])


def test_what_a_broken_graph_names_is_not_read(tmp_path):
    """Columns out of range count as absent, rows that fall as empty: AddressSanitizer agrees."""
    columns = torch.tensor([0, 5, -1, 2, 1, 2**31 - 1], dtype=torch.int32)
    graph = CSRGraph(torch.tensor([0, 3, 2, 900]), columns, torch.ones(6), 3)
    x = operand(3, 8, torch.float32)
    got = emulate(tmp_path, graph, x, "float32")
    torch.testing.assert_close(got[0], x[0])
    assert (got[1:] == 0).all()


def test_nan_and_infinity_stay_in_their_rows(tmp_path):
    graph = CSRGraph.from_torch(torch.tensor([[0.0, 2, 0], [2, 0, 0], [0, 0, 1]]))
    x = torch.tensor([[float("nan")] * 4, [float("inf")] * 4, [1.0] * 4])
    got = emulate(tmp_path, graph, x, "float32")
    assert torch.equal(got[0], torch.full((4,), float("inf")))
    assert got[1].isnan().all()
    assert torch.equal(got[2], torch.ones(4))
