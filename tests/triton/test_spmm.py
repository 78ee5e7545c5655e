"""What Triton's spmm does with a graph whose content breaks its promises, which nothing checks on a
GPU."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton")
from nefkern import backends
from nefkern.triton import spmm as kernels
from tests.ops.graph_common import moved

needs_triton = pytest.mark.skipif(
    backends.why_not("triton") is not None, reason=str(backends.why_not("triton"))
)


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    monkeypatch.setattr(kernels, "check_content", lambda *graph: None)


@needs_triton
def test_a_node_out_of_range_counts_as_absent():
    offsets, columns = torch.tensor([0, 2, 3]), torch.tensor([0, 2, -1], dtype=torch.int32)
    graph = moved("triton", offsets, columns, torch.ones(3), torch.ones(2, 4).bfloat16())
    y = kernels.spmm(*graph, torch.float32)
    assert torch.equal(y.cpu(), torch.tensor([[1.0], [0.0]]).expand(2, 4))


@needs_triton
@pytest.mark.parametrize("offsets", [[0, 3, 2], [0, 9, 2], [-1, 1, 2], [2, 1, 2]])
def test_a_row_whose_offsets_make_no_sense_counts_as_empty(offsets):
    """What stands beyond the entries would show."""
    columns, values = torch.zeros(20, dtype=torch.int32), torch.full((20,), 7.0)
    graph = moved("triton", torch.tensor(offsets), columns[4:6], values[4:6])
    y = kernels.spmm(*graph, *moved("triton", torch.ones(2, 4).bfloat16()), torch.float32).cpu()
    ends = itertools.pairwise(offsets)
    sums = [7.0 * (b - a) if 0 <= a <= b <= 2 else 0.0 for a, b in ends]
    assert torch.equal(y, torch.tensor(sums)[:, None].expand(2, 4))


@needs_triton
def test_entries_behind_the_last_row_are_not_read():
    """The room of a padded graph."""
    offsets, columns = torch.tensor([0, 1, 2]), torch.tensor([1, 0, 1, 99], dtype=torch.int32)
    values = torch.tensor([2.0, 3.0, float("nan"), float("nan")])
    y = kernels.spmm(*moved("triton", offsets, columns, values, torch.eye(2)), torch.float32)
    assert torch.equal(y.cpu(), torch.tensor([[0.0, 2.0], [3.0, 0.0]]))
