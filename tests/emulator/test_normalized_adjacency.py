"""The CUDA assembly of ``normalized_adjacency``, emulated, against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nefkern import reference
from nefkern.ops import CSRGraph
from tests.emulator import emulated
from tests.ops.graph_common import dense_adjacency, random_lists

pytestmark = pytest.mark.long

OUTPUTS = {
    "row_offsets": np.int64, "columns": np.int32, "values": np.float32, "valid": np.int32,
}  # fmt: skip


#: Of the assembly: up to so many nodes rows are merged, of more all edges are sorted.
MERGED, SORTED = 1 << 16, 0
#: And a node that so many others name is a hub, whose row has another block: most, here.
HUBS = 3


@pytest.fixture(
    params=[(MERGED, 4096), (MERGED, HUBS), (SORTED, 4096)], ids=["merged", "hubs", "sorted"],
    autouse=True,
)  # fmt: skip
def way(request, monkeypatch):
    merged, long = request.param
    monkeypatch.setattr(emulated, "usual", {"merged_nodes": merged, "long_names": long})


def emulate(folder, indices, weights, symmetrize="mean", clamp_min=0.0):
    """The graph, or None where the kernels call an index invalid."""
    n, k = indices.shape
    got = emulated.run(
        "normalized_adjacency", "int32" if indices.dtype == torch.int32 else "int64", folder,
        inputs={
            "indices": indices.numpy(), "weights": None if weights is None else weights.numpy(),
        },
        outputs=OUTPUTS, n=n, k=k, clamp_min=clamp_min, take_union=int(symmetrize == "union"),
        **emulated.usual,
    )  # fmt: skip
    valid = got.pop("valid")[0]
    return CSRGraph(*map(torch.from_numpy, got.values()), n, True) if valid else None


def assert_agrees(got, indices, weights, symmetrize="mean", clamp_min=0.0):
    n = len(indices)
    wide = torch.ones(indices.shape, dtype=torch.float64) if weights is None else weights.double()
    expected = reference.normalized_adjacency(
        indices, wide, num_nodes=n, symmetrize=symmetrize, clamp_min=clamp_min
    )
    got.validate()
    assert torch.equal(got.row_offsets, expected[0])
    assert torch.equal(got.columns, expected[1])
    torch.testing.assert_close(got.values.double(), expected[2], rtol=1e-6, atol=0)


@pytest.mark.parametrize("symmetrize", ["mean", "union"])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 2), (40, 5), (33, 70)])
def test_agrees_with_the_reference(tmp_path, n, k, weighted, symmetrize):
    indices, weights = random_lists(n, k, seed=n)
    weights = weights if weighted else None
    got = emulate(tmp_path, indices, weights, symmetrize)
    assert_agrees(got, indices, weights, symmetrize)


def test_wide_indices_and_a_lower_bound(tmp_path):
    indices, weights = random_lists(40, 5, index_dtype=torch.int64)
    assert_agrees(
        emulate(tmp_path, indices, weights, clamp_min=0.2), indices, weights, clamp_min=0.2
    )


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (4, 0)])
def test_nothing_listed(tmp_path, shape):
    got = emulate(tmp_path, torch.zeros(shape, dtype=torch.int32), None)
    assert got.nnz == 0
    assert torch.equal(got.row_offsets, torch.zeros(shape[0] + 1, dtype=torch.int64))


def test_only_padding(tmp_path):
    got = emulate(tmp_path, torch.full((5, 3), -1, dtype=torch.int32), None)
    assert got.nnz == 0


def test_a_hub_that_all_list(tmp_path):
    """A row of many chunks, every other node twice in it."""
    n = 70
    indices = torch.stack([torch.zeros(n), torch.arange(n), torch.zeros(n)], 1).to(torch.int32)
    weights = torch.rand(n, 3, generator=torch.Generator().manual_seed(0))
    assert_agrees(emulate(tmp_path, indices, weights), indices, weights)


def test_a_nan_stays_visible(tmp_path):
    indices = torch.tensor([[1], [0], [1]], dtype=torch.int32)
    got = emulate(tmp_path, indices, torch.tensor([[-float("nan")], [1.0], [1.0]]))
    assert got.values[got.row_offsets[0]].isnan()
    assert not torch.signbit(got.values).any()


@pytest.mark.parametrize("symmetrize", ["mean", "union"])
@pytest.mark.parametrize("weight", [2.0**-149, 1e-39, 1e20, 3e38])
def test_equal_weights_of_any_size(tmp_path, weight, symmetrize):
    indices = torch.tensor([[1, 2], [0, 2], [0, 1]], dtype=torch.int32)
    got = emulate(tmp_path, indices, torch.full((3, 2), weight), symmetrize)
    torch.testing.assert_close(got.values, torch.full((6,), 0.5), rtol=2e-7, atol=0)


@pytest.mark.parametrize("symmetrize", ["mean", "union"])
def test_weights_of_all_sizes_side_by_side(tmp_path, symmetrize):
    indices, weights = random_lists(50, 5, seed=3)
    size = torch.linspace(-146, 127.9, 50, dtype=torch.float64).exp2()[:, None]
    weights = (weights.double().abs().clamp(0.1, 1) * size).float()
    got = emulate(tmp_path, indices, weights, symmetrize).validate()
    exact = dense_adjacency(indices, weights, 50, symmetrize)
    torch.testing.assert_close(got.to_dense().double(), exact, rtol=5e-7, atol=2.0**-149)


@pytest.mark.parametrize("index", [-2, 3, 2**31 - 1])
def test_an_index_out_of_range_is_told(tmp_path, index):
    indices = torch.tensor([[0], [index], [2]], dtype=torch.int32)
    assert emulate(tmp_path, indices, None) is None
