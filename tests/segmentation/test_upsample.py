from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from nefkern.segmentation.upsample import (
    interpolation,
    pixel_positions,
    spans,
    upsample,
    upsample_at,
)


def test_a_single_map_and_a_batch_agree():
    batch = torch.randn(2, 3, 4, 5)
    resized = upsample(batch, (9, 11))
    assert resized.shape == (2, 3, 9, 11)
    assert_close(upsample(batch[1], (9, 11)), resized[1])


def test_hand_made_row():
    """Corners not aligned: cell centres at pixels 0.5 and 2.5 of four, the rim is constant."""
    assert_close(
        upsample(torch.tensor([[[0.0, 1.0]]]), (1, 4)), torch.tensor([[[0.0, 0.25, 0.75, 1.0]]])
    )


@pytest.mark.parametrize("grid", [(1, 1), (3, 4), (7, 2), (20, 30)])
@pytest.mark.parametrize("extent", [(1, 1), (16, 9), (23, 31)])
def test_parts_make_up_the_whole(grid, extent):
    logits = torch.randn(3, *grid, dtype=torch.float64)
    whole = upsample(logits, extent)
    row_cuts = sorted({0, extent[0] // 3, extent[0]})
    col_cuts = sorted({0, extent[1] // 2, extent[1]})
    for rows in pairwise(row_cuts):
        for cols in pairwise(col_cuts):
            part = upsample_at(logits, extent, torch.arange(*rows), torch.arange(*cols))
            assert_close(part, whole[:, slice(*rows), slice(*cols)])


@pytest.mark.parametrize("extent", [(20, 30), (100, 77), (65, 31)])
def test_any_rows_and_columns(extent):
    logits = torch.randn(3, 20, 30, dtype=torch.float64)
    rows, cols = torch.tensor([0, 7, 8, 19]), torch.tensor([3, 29])
    part = upsample_at(logits, extent, rows, cols)
    assert_close(part, upsample(logits, extent)[:, rows][:, :, cols])


def test_part_keeps_the_dtype():
    part = upsample_at(torch.ones(1, 2, 2), (5, 5), torch.arange(1, 3), torch.arange(5))
    assert part.dtype == torch.float32


def test_spans_by_hand():
    """Two cells of four pixels: centres at the edges of pixels 2 and 6, the rims are constant."""
    assert spans(2, 8, torch.arange(8)).tolist() == [-1, -1, 0, 0, 0, 0, 1, 1]
    assert spans(1, 3, torch.arange(3)).tolist() == [-1, 0, 0]


@pytest.mark.parametrize("cells", [1, 2, 7, 30])
@pytest.mark.parametrize("extent", [1, 9, 23])
def test_any_pixels_of_an_axis(cells, extent):
    logits = torch.randn(1, 1, cells, dtype=torch.float64)
    whole = upsample(logits, (1, extent))[0, 0]
    pixels = torch.randint(extent, (12,))
    assert_close(interpolation(pixels, cells, extent) @ logits[0, 0], whole[pixels])


def test_positions_are_those_of_upsample():
    """A map of its own positions, resized, holds those of the new pixels, but for the rim."""
    positions = torch.arange(9, dtype=torch.float64).view(1, 1, 9)
    for size in (4, 9, 20):
        resized = upsample(positions, (1, size))[0, 0]
        assert_close(pixel_positions(size, 9).clamp(0, 8), resized)
