"""The CUDA assembly of ``kappa``, emulated, against the reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nefkern import reference
from nefkern.ops import CSRGraph
from tests.emulator import emulated, test_add, test_normalized_adjacency
from tests.emulator.test_normalized_adjacency import way  # noqa: F401
from tests.ops.graph_common import random_lists

pytestmark = pytest.mark.long

OUTPUTS = {
    "row_offsets": np.int64, "columns": np.int32, "values": np.float32, "valid": np.int32,
}  # fmt: skip


def emulate(folder, indices, weights, pixels, *, alpha=0.3, clamp_min=0.0, padded=False, **more):
    """The graph, or None where the kernels call an index invalid."""
    n, k = indices.shape
    got = emulated.run(
        "kappa", "int32" if indices.dtype == torch.int32 else "int64", folder,
        inputs={
            "indices": indices.numpy(), "weights": None if weights is None else weights.numpy(),
            "pixel_indices": pixels.numpy(),
        },
        outputs=OUTPUTS, n=n, k=k, near=pixels.shape[1], alpha=alpha, clamp_min=clamp_min,
        padded=int(padded), **emulated.usual, **more,
    )  # fmt: skip
    valid = got.pop("valid")[0]
    return CSRGraph(*map(torch.from_numpy, got.values()), n, True) if valid else None


def assert_agrees(got, indices, weights, pixels, *, alpha=0.3, clamp_min=0.0):
    n = len(indices)
    wide = torch.ones(indices.shape, dtype=torch.float64) if weights is None else weights.double()
    expected = reference.kappa(
        indices, wide, pixels, num_nodes=n, alpha=float(np.float32(alpha)), clamp_min=clamp_min
    )
    got.validate()
    assert torch.equal(got.row_offsets, expected[0])
    assert torch.equal(got.columns, expected[1])
    torch.testing.assert_close(got.values.double(), expected[2], rtol=1e-6, atol=1e-8)


def lists(n, k, near, seed=0, **options):
    indices, weights = random_lists(n, k, seed, **options)
    return indices, weights, random_lists(n, near, seed + 1)[0]


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(
    ("n", "k", "near"),
    [(0, 3, 2), (1, 1, 1), (1, 0, 0), (7, 3, 0), (7, 0, 3), (40, 5, 3), (33, 70, 9)],
)
def test_agrees_with_the_reference(tmp_path, n, k, near, weighted):
    indices, weights, pixels = lists(n, k, near, seed=n)
    weights = weights if weighted else None
    assert_agrees(emulate(tmp_path, indices, weights, pixels), indices, weights, pixels)


@pytest.mark.parametrize("alpha", [0.0, -0.5])
def test_wide_indices_a_lower_bound_and_alpha(tmp_path, alpha):
    indices, weights, pixels = lists(40, 5, 4, index_dtype=torch.int64)
    options = {"alpha": alpha, "clamp_min": 0.2}
    got = emulate(tmp_path, indices, weights, pixels, **options)
    assert_agrees(got, indices, weights, pixels, **options)


def test_weights_of_all_sizes_side_by_side(tmp_path):
    """From subnormals to the largest float, and a row of nothing but that."""
    indices, weights, pixels = lists(40, 5, 3)
    size = torch.linspace(-146, 127.9, 40, dtype=torch.float64).exp2()[:, None]
    weights = (weights.double().abs().clamp(0.1, 1) * size).float()
    weights[-1] = torch.finfo(torch.float32).max
    got = emulate(tmp_path, indices, weights, pixels)
    assert_agrees(got, indices, weights, pixels)


def test_equals_the_sum_of_both_graphs_bit_for_bit(tmp_path):
    indices, weights, pixels = lists(40, 9, 4)
    features = test_normalized_adjacency.emulate(tmp_path, indices, weights)
    near = test_normalized_adjacency.emulate(tmp_path, pixels, None, "union")
    total = test_add.emulate(tmp_path, features, near, 0.3)
    got = emulate(tmp_path, indices, weights, pixels)
    for one, two in zip(got.tensors(), total.tensors(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(("n", "k", "near"), [(0, 3, 2), (7, 3, 0), (40, 9, 4)])
def test_with_room_for_all_that_there_can_be(tmp_path, n, k, near):
    """The same entries, behind which there is room, and nothing that the host reads between."""
    indices, weights, pixels = lists(n, k, near)
    exact = emulate(tmp_path, indices, weights, pixels)
    padded = emulate(tmp_path, indices, weights, pixels, padded=True)
    assert len(padded.columns) == len(padded.values) == 2 * n * (k + near)
    assert torch.equal(padded.row_offsets, exact.row_offsets)
    assert torch.equal(padded.columns[: exact.nnz], exact.columns)
    assert torch.equal(padded.values[: exact.nnz], exact.values)


def test_with_room_an_index_out_of_range_counts_as_none(tmp_path):
    weights, pixels = torch.ones(3, 2), torch.full((3, 1), -1, dtype=torch.int32)
    wrong = torch.tensor([[1, 3], [2, -2], [0, 7]], dtype=torch.int32)
    left_out = torch.where((wrong < 0) | (wrong > 2), -1, wrong)
    got = emulate(tmp_path, wrong, weights, pixels, padded=True)
    expected = emulate(tmp_path, left_out, weights, pixels)
    assert torch.equal(got.row_offsets, expected.row_offsets)
    assert torch.equal(got.columns[: expected.nnz], expected.columns)


def test_a_hub_of_both_graphs(tmp_path):
    """More entries than fit shared memory: neighbours by either graph or by both."""
    if emulated.usual["merged_nodes"] == test_normalized_adjacency.SORTED:
        pytest.skip("a sort has no such limit")
    n = 1050
    indices, weights, pixels = lists(n, 1, 1)
    indices[:, 0], pixels[::3, 0] = 0, 0
    got = emulate(tmp_path, indices, weights, pixels, order="random")
    assert_agrees(got, indices, weights, pixels)


def test_a_node_that_one_graph_leaves_alone(tmp_path):
    indices = torch.tensor([[1], [-1], [-1], [-1]], dtype=torch.int32)
    pixels = torch.tensor([[-1], [-1], [3], [-1]], dtype=torch.int32)
    got = emulate(tmp_path, indices, torch.full((4, 1), 0.5), pixels, alpha=0.25)
    expected = torch.zeros(4, 4)
    expected[0, 1] = expected[1, 0] = 1
    expected[2, 3] = expected[3, 2] = 0.25
    torch.testing.assert_close(got.to_dense(), expected)


def test_a_nan_stays_visible_and_does_not_reach_the_pixel_graph(tmp_path):
    weights = torch.tensor([[-math.nan], [math.nan], [1.0], [1.0]])
    indices = torch.tensor([[1], [0], [3], [2]], dtype=torch.int32)
    pixels = torch.tensor([[1], [2], [3], [0]], dtype=torch.int32)
    found = emulate(tmp_path, indices, weights, pixels).to_dense()
    alone = emulate(tmp_path, indices, torch.ones(4, 1), pixels).to_dense()
    nan = torch.zeros(4, 4, dtype=torch.bool)
    nan[0, 1] = nan[1, 0] = True
    assert torch.equal(found.isnan(), nan)
    assert torch.equal(found[~nan], alone[~nan])


@pytest.mark.parametrize("which", [0, 2])
@pytest.mark.parametrize("index", [-2, 3])
def test_an_index_out_of_range_is_told(tmp_path, which, index):
    arguments = [torch.tensor([[0], [1], [2]], dtype=torch.int32), None]
    arguments.append(arguments[0].clone())
    arguments[which][1] = index
    assert emulate(tmp_path, *arguments) is None
