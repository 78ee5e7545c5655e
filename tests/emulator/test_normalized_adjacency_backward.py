"""The CUDA gradient of κ's weights, emulated, against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nefkern import reference
from tests.emulator import emulated
from tests.ops.graph_common import random_lists

pytestmark = pytest.mark.long


def structure(indices, weights, *, symmetrize="mean", clamp_min=0.0, pixels=None):
    """Offsets and columns of the graph that the lists make; with ``pixels``, of κ."""
    n, wide = len(indices), weights.double()
    if pixels is None:
        graph = reference.normalized_adjacency(
            indices, wide, num_nodes=n, symmetrize=symmetrize, clamp_min=clamp_min
        )
    else:
        graph = reference.kappa(
            indices, wide, pixels, num_nodes=n, alpha=0.3, clamp_min=clamp_min
        )  # fmt: skip
    return graph[0], graph[1]


def emulate(folder, grad, indices, weights, offsets, columns, *, symmetrize="mean", clamp_min=0.0):
    n, k = indices.shape
    found = emulated.run(
        "normalized_adjacency_backward", "int32" if indices.dtype == torch.int32 else "int64",
        folder,
        inputs={
            "indices": indices.numpy(), "weights": weights.numpy(), "gradient": grad.numpy(),
            "row_offsets": offsets.numpy(), "columns": columns.numpy(),
        },
        outputs={"found": np.float32}, n=n, k=k, nnz=len(columns), clamp_min=clamp_min,
        take_union=int(symmetrize == "union"),
    )["found"]  # fmt: skip
    return torch.from_numpy(found).reshape(n, k)


def check(folder, indices, weights, *, pixels=None, symmetrize="mean", clamp_min=0.0):
    options = {"symmetrize": symmetrize, "clamp_min": clamp_min}
    graph = structure(indices, weights, pixels=pixels, **options)
    grad = torch.randn(len(graph[1]), generator=torch.Generator().manual_seed(0))
    found = emulate(folder, grad, indices, weights, *graph, **options)
    exact = reference.normalized_adjacency_backward(
        grad.double(), indices, weights.double(), *graph, symmetrize, clamp_min
    )
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)
    return found


@pytest.mark.parametrize("symmetrize", ["mean", "union"])
@pytest.mark.parametrize(("n", "k"), [(0, 3), (1, 1), (7, 3), (7, 0), (40, 5), (33, 70)])
def test_agrees_with_the_reference(tmp_path, n, k, symmetrize):
    check(tmp_path, *random_lists(n, k, seed=n), symmetrize=symmetrize)


@pytest.mark.parametrize("symmetrize", ["mean", "union"])
def test_wide_indices_equal_weights_and_a_lower_bound(tmp_path, symmetrize):
    """Edges of equal weight compete: duplicates in a list, and both directions of a union."""
    indices, weights = random_lists(30, 8, index_dtype=torch.int64)
    weights = (weights * 2).round() / 2
    check(tmp_path, indices, weights, symmetrize=symmetrize, clamp_min=0.5)


def test_places_that_only_the_pixel_graph_has(tmp_path):
    indices, weights = random_lists(40, 5)
    check(tmp_path, indices, weights, pixels=random_lists(40, 9, seed=1)[0])


@pytest.mark.parametrize("n", [300, 600])
def test_a_hub_and_rows_without_neighbours(tmp_path, n):
    """Of more entries than a block has threads, and a warp places; a third of the rows empty."""
    indices, weights = random_lists(n, 2, seed=3)
    indices[:, 0], weights[:, 0] = 5, 0.5
    indices[n // 3 : 2 * n // 3] = -1
    check(tmp_path, indices, weights)


def test_what_a_broken_graph_does_not_store_is_nan(tmp_path):
    """And nothing is read out of bounds: columns of no node, rows that fall or end too far."""
    indices, weights = random_lists(20, 4)
    weights = weights.abs() + 0.1
    offsets, columns = structure(indices, weights)
    grad = torch.ones(len(columns))
    for name, broken in {
        "a row that is gone": (offsets.clone().index_fill_(0, torch.tensor([1]), 0), columns),
        "rows that fall": (offsets.flip(0).contiguous(), columns),
        "rows beyond the end": (offsets + 1000, columns),
        "columns of no node": (offsets, torch.where(columns < 5, -7, columns + 2**30)),
    }.items():
        found = emulate(tmp_path, grad, indices, weights, *broken)
        listed = indices >= 0
        assert found[listed].isnan().any(), name
        assert (found[~listed] == 0).all(), name
    beyond = torch.where(indices == 3, 20, indices)
    found = emulate(tmp_path, grad, beyond, weights, offsets, columns)
    assert found[beyond == 20].isnan().all()
