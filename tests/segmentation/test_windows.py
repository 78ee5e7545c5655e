import gc
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from nefkern.segmentation.windows import (
    sliding_clusters,
    sliding_tiles,
    sliding_windows,
    window_starts,
)


def pointwise(crops):
    """Logits that depend on the pixel alone, so windows can't matter."""
    r, g, b = crops.float().unbind(1)
    return torch.stack([r, g - b, (r * g).sin(), b], 1)


def by_definition(predict, image, window, stride):
    """Sum and count over the whole image."""
    _, height, width = image.shape
    h, w = min(window, height), min(window, width)
    total, count = 0.0, torch.zeros(height, width, dtype=image.dtype)
    for top in window_starts(height, window, stride):
        for left in window_starts(width, window, stride):
            crop = predict(image[None, :, top : top + h, left : left + w])
            pixels = F.interpolate(crop, (h, w), mode="bilinear", align_corners=False)[0]
            place = (left, width - left - w, top, height - top - h)
            total = total + F.pad(pixels, place)
            count += F.pad(torch.ones(h, w, dtype=image.dtype), place)
    return total / count


@given(st.integers(1, 300), st.integers(1, 100), st.data())
def test_windows_cover_every_pixel_and_stay_inside(length, window, data):
    stride = data.draw(st.integers(1, window))
    starts = window_starts(length, window, stride)
    side = min(window, length)
    covered = {p for start in starts for p in range(start, start + side)}
    assert covered == set(range(length))
    assert starts == sorted(set(starts))


@pytest.mark.parametrize(("window", "stride"), [(0, 1), (4, 0), (4, 5)])
def test_gaps_are_refused(window, stride):
    with pytest.raises(ValueError, match=f"window {window}, stride {stride}"):
        window_starts(10, window, stride)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 25), st.data())
def test_pointwise_predictor_gives_the_full_prediction(height, width, window, data):
    stride = data.draw(st.integers((window + 3) // 4, window))
    image = torch.randn(3, height, width, generator=torch.Generator().manual_seed(0))
    full = pointwise(image[None])[0]
    assert_close(sliding_windows(pointwise, image, window, stride), full)
    assert torch.equal(sliding_clusters(pointwise, image, window, stride), full.argmax(0))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 25), st.data())
def test_tiles_are_disjoint_and_complete(height, width, window, data):
    stride = data.draw(st.integers((window + 3) // 4, window))
    seen = torch.zeros(height, width, dtype=torch.int64)
    image = torch.zeros(3, height, width)
    for tile in sliding_tiles(pointwise, image, window, stride, max_pixels=7):
        assert tile.logits[0].numel() <= max(7, tile.cols[1] - tile.cols[0])
        seen[slice(*tile.rows), slice(*tile.cols)] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize(("size", "window", "stride"), [((37, 52), 16, 11), ((9, 40), 16, 16)])
def test_coarse_grid_equals_sum_over_count(size, window, stride):
    """A predictor that looks at its whole crop and answers on a coarser grid."""

    def predict(crops):
        centred = crops - crops.mean((2, 3), keepdim=True)
        return F.adaptive_avg_pool2d(pointwise(centred), (4, 3))

    image = torch.randn(3, *size, dtype=torch.float64)
    expected = by_definition(predict, image, window, stride)
    assert_close(sliding_windows(predict, image, window, stride), expected, check_dtype=False)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(6, 20), st.data())
def test_another_size_is_the_average_resized(height, width, window, data):
    """Larger, smaller, of another shape: as if the whole average were made first."""
    stride = data.draw(st.integers(3, window))
    size = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))

    def predict(crops):  # looks at its whole crop, on a coarser grid
        return F.adaptive_avg_pool2d(pointwise(crops - crops.mean((2, 3), keepdim=True)), (3, 2))

    image = torch.randn(3, height, width, dtype=torch.float64)
    whole = by_definition(predict, image, window, stride)
    expected = F.interpolate(whole[None], size, mode="bilinear", align_corners=False)[0]
    found = sliding_windows(predict, image, window, stride, size=size)
    assert_close(found, expected, check_dtype=False)
    clusters = sliding_clusters(predict, image, window, stride, size=size)
    assert torch.equal(clusters, found.argmax(0))
    seen = torch.zeros(size, dtype=torch.int64)
    for tile in sliding_tiles(predict, image, window, stride, size=size, max_pixels=7):
        assert tile.logits[0].numel() <= max(7, tile.cols[1] - tile.cols[0])
        seen[slice(*tile.rows), slice(*tile.cols)] += 1
    assert (seen == 1).all()


def test_a_padding_predictor_is_cropped_back():
    """Crops of 10 pixels padded to 12: a grid of 6 x 6 cells of 2 pixels."""

    def predict(crops):
        return F.avg_pool2d(F.pad(crops, (0, 2, 0, 2)), 2), (12, 12)

    image = torch.randn(3, 10, 10, dtype=torch.float64)
    grid, _ = predict(image[None])
    whole = F.interpolate(grid, (12, 12), mode="bilinear", align_corners=False)[0, :, :10, :10]
    assert_close(sliding_windows(predict, image, 10, 10), whole)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_batches_hold_the_row_in_order(batch_size):
    sizes = []

    def predict(crops):
        sizes.append(len(crops))
        return pointwise(crops)

    image = torch.randn(3, 8, 30)
    result = sliding_windows(predict, image, 8, 5, batch_size=batch_size)
    assert_close(result, pointwise(image[None])[0])
    assert max(sizes) <= batch_size
    assert sum(sizes) == len(window_starts(30, 8, 5))


def test_every_window_is_predicted_once():
    calls = []

    def predict(crops):
        calls.append(len(crops))
        return pointwise(crops)

    sliding_clusters(predict, torch.randn(3, 50, 50), 20, 7)
    assert sum(calls) == len(window_starts(50, 20, 7)) ** 2


@pytest.mark.parametrize(("size", "bound"), [(None, 4), ((500, 40), 5), ((50, 20), 5)])
def test_predictions_out_of_reach_are_freed(size, bound):
    """A window row is 30 pixels high every 10: never more than three rows, of seven, are held; one
    more where the result's pixels lie between those of two of them."""
    alive = most = 0

    def predict(crops):
        nonlocal alive, most
        memory = np.zeros((len(crops), 2, 3, 3), np.float32)
        weakref.finalize(memory, freed)
        alive += 1
        most = max(most, alive)
        return torch.from_numpy(memory)

    def freed():
        nonlocal alive
        alive -= 1

    image = torch.zeros(3, 90, 30)
    gc.disable()  # references alone must free them
    try:
        sliding_clusters(predict, image, 30, 10, size=size)
    finally:
        gc.enable()
    assert 3 <= most <= bound  # three in reach, perhaps the one that just left it
