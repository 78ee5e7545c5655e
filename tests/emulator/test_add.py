"""The CUDA kernels of ``add``, emulated, against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nefkern import reference
from nefkern.ops import CSRGraph
from tests.emulator import emulated
from tests.ops.graph_common import random_graph

OUTPUTS = {
    "row_offsets": np.int64, "columns": np.int32, "values": np.float32, "valid": np.int32,
}  # fmt: skip


def emulate(folder, a, b, alpha):
    """The sum, or None where the kernels call a graph's offsets invalid."""
    inputs = {}
    for name, graph in (("a", a), ("b", b)):
        for part in ("row_offsets", "columns", "values"):
            inputs[f"{part}_{name}"] = getattr(graph, part).numpy()
    got = emulated.run(
        "add", "add", folder, inputs=inputs, outputs=OUTPUTS,
        n=a.num_nodes, nnz_a=a.nnz, nnz_b=b.nnz, alpha=alpha,
    )  # fmt: skip
    valid = got.pop("valid")[0]
    return CSRGraph(*map(torch.from_numpy, got.values()), a.num_nodes) if valid else None


@pytest.mark.parametrize(("n", "per_row"), [(0, 0), (1, 1), (9, 3), (70, 40)])
@pytest.mark.parametrize("alpha", [0.3, 0.0, -1.0])
def test_agrees_with_the_reference(tmp_path, n, per_row, alpha):
    a, b = random_graph(n, per_row, seed=1), random_graph(n, 4, seed=2)
    got = emulate(tmp_path, a, b, alpha)
    doubles = [t.double() if t.is_floating_point() else t for t in (*a.tensors(), *b.tensors())]
    # alpha as the kernel sees it, in float32
    expected = reference.add(*doubles, float(np.float32(alpha)))
    assert torch.equal(got.row_offsets, expected[0])
    assert torch.equal(got.columns, expected[1])
    assert torch.equal(got.values, expected[2].float())  # one rounding of the exact sum
    CSRGraph(*got.tensors(), n, True).validate()


def test_either_graph_may_be_empty(tmp_path):
    a = random_graph(20, 5)
    nothing = CSRGraph.from_torch(torch.zeros(20, 20))
    for left, right, alpha in ((a, nothing, 0.5), (nothing, a, 1.0)):
        got = emulate(tmp_path, left, right, alpha)
        assert torch.equal(got.to_dense(), a.to_dense())


@pytest.mark.parametrize(
    "offsets", [[0, 2, 1, 3], [0, 1, 2, 4], [1, 1, 2, 3], [0, 1, 2, 2], [0, -1, 2, 3]]
)
def test_offsets_that_make_no_sense_are_told(tmp_path, offsets):
    good = CSRGraph.from_torch(torch.eye(3))
    bad = CSRGraph(torch.tensor(offsets), good.columns, good.values, 3)
    assert emulate(tmp_path, bad, good, 1.0) is None
    assert emulate(tmp_path, good, bad, 1.0) is None


@pytest.mark.parametrize("columns", [[1, 0, 2], [0, 0, 2], [0, 3, 2], [-1, 1, 2]])
def test_columns_that_make_no_sense_are_told(tmp_path, columns):
    """Sizes of rows rest on ascending columns: written all the same, they would overflow."""
    good = CSRGraph.from_torch(torch.ones(3, 3))
    bad = CSRGraph(
        torch.tensor([0, 2, 2, 3]), torch.tensor(columns, dtype=torch.int32), torch.ones(3), 3
    )
    assert emulate(tmp_path, bad, good, 1.0) is None
    assert emulate(tmp_path, good, bad, 1.0) is None
