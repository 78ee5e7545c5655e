import pytest
import torch
from torch.testing import assert_close

from nefkern.segmentation.upsample import interpolation, pixel_positions, upsample


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
