"""What the atlas says of clusters, against the segmenter's own answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from nefkern.data import open_dataset
from nefkern.naming.survey import (
    IMAGES,
    LEAST,
    PATCHES,
    SEGMENTS,
    TILE,
    Segment,
    _Cells,
    _leading,
    _Seen,
    _segment_tile,
    connected,
    pictures,
    survey,
)
from nefkern.runtime.errors import UserError
from nefkern.segmentation.segmenter import Segmenter


@pytest.fixture(scope="module")
def surveyed(run, pictures):
    segmenter, dataset = Segmenter.load(run, "cpu"), open_dataset("folder", root=pictures)
    return segmenter, dataset, survey(segmenter, dataset, range(3), 3)


def test_every_patch_is_counted_once(surveyed):
    """Of an image that is one window."""
    segmenter, dataset, _ = surveyed
    index = dataset.names.index("large")
    predict, pixels, window, _ = segmenter.at_training_scale(dataset.image(index))
    assert max(pixels.shape[1:]) <= window
    logits, extent = predict(pixels[None])
    rows, cols = logits.shape[2:]
    y = (torch.arange(rows) + 0.5) * extent[0] / rows < pixels.shape[1]
    x = (torch.arange(cols) + 0.5) * extent[1] / cols < pixels.shape[2]
    winner = logits[0].argmax(0)[y][:, x]
    found = survey(segmenter, dataset, [index], 1)
    total = winner.flatten().bincount(minlength=6).tolist()
    assert [cluster.patches for cluster in found.clusters] == total
    assert [cluster.images for cluster in found.clusters] == [int(n > 0) for n in total]


def test_maps_of_images_that_are_not_shown_are_let_go():
    seen, nothing = _Seen(1, 1), np.zeros((1, 1), int)
    cells = _Cells(0, 0, (8, 8), (8.0, 8.0), nothing, nothing, nothing + 1.0, torch.ones(2, 1, 1))
    for index in range(100):
        seen.add(index, torch.empty(3, 8, 8), [cells])
    assert len(seen.maps) <= 2 * IMAGES
    found = seen.result()
    assert found.images == 100
    assert set(found.maps) == {index for index, _ in found.clusters[0].where}


def test_patches_lie_in_their_cluster(surveyed):
    """The typical ones at least: at their centre the up-sampled map has their cluster."""
    segmenter, dataset, found = surveyed
    maps = {index: segmenter(dataset.image(index)) for index in range(3)}
    right, wrong = 0, 0
    for number, cluster in enumerate(found.clusters):
        assert len(cluster.typical) == len(cluster.doubtful) == min(PATCHES, len(cluster.typical))
        assert bool(cluster.patches) == bool(cluster.typical)
        for patch in cluster.typical:
            top, left, bottom, right_side = patch.box
            height, width = maps[patch.image].shape
            y = min(int((top + bottom) / 2), height - 1)
            x = min(int((left + right_side) / 2), width - 1)
            hit = maps[patch.image][y, x] == number
            right, wrong = right + int(hit), wrong + int(not hit)
        assert all(patch.rival != number for patch in cluster.doubtful)
        assert cluster.where == sorted(cluster.where, key=lambda place: -place[1])
    assert right > 5 * wrong


def test_segments_are_those_that_the_patches_of_a_map_make():
    winner = np.array([[1, 1, 2, 1], [2, 1, 2, 1], [2, 2, 1, 0]])
    inside = np.ones((3, 4), bool)
    inside[:, 3] = False
    label, count = connected(winner, inside)
    assert count == 4
    assert label.tolist() == [[0, 0, 1, -1], [2, 0, 1, -1], [2, 2, 3, -1]], "corners do not join"


def test_segments_lie_in_their_cluster_and_the_largest_of_an_image_is_typical(surveyed):
    segmenter, dataset, found = surveyed
    maps = {index: segmenter(dataset.image(index)) for index in range(3)}
    right, wrong, met = 0, 0, 0
    for number, cluster in enumerate(found.clusters):
        for segment in [*cluster.typical_segments, *cluster.doubtful_segments]:
            met += 1
            assert segment.mask.sum() >= LEAST
            sides = (segment.mask[0], segment.mask[-1], segment.mask[:, 0], segment.mask[:, -1])
            assert all(side.any() for side in sides), "the box is no larger than it must be"
            assert segment.rival != number
            top, left, bottom, right_side = segment.box
            (rows, cols), (height, width) = segment.mask.shape, maps[segment.image].shape
            for row, col in np.argwhere(segment.mask).tolist():
                y = min(int(top + (row + 0.5) * (bottom - top) / rows), height - 1)
                x = min(int(left + (col + 0.5) * (right_side - left) / cols), width - 1)
                hit = maps[segment.image][y, x] == number
                right, wrong = right + int(hit), wrong + int(not hit)
        assert len(cluster.typical_segments) == len(cluster.doubtful_segments) <= SEGMENTS
    assert met
    assert right > 5 * wrong


def test_all_but_the_segment_is_dark(photograph):
    bright = Image.new("RGB", (100, 80), (200, 200, 200))
    mask = np.array([[True, False], [True, True]])
    tile = np.array(_segment_tile(bright, Segment(0, (20, 30, 60, 70), mask, 1)))[..., 0]
    assert set(np.unique(tile)) == {60, 200}
    # The box is 40 pixels of the 48 shown; a patch of it, a quarter.
    assert abs((tile == 200).mean() - 3 / 4 * (40 / 48) ** 2) < 0.02
    middle = TILE // 2
    lit = [tile[y, x] == 200 for y in (middle - 9, middle + 9) for x in (middle - 9, middle + 9)]
    assert lit == [True, False, True, True]


def test_maps_show_the_clusters(surveyed):
    segmenter, dataset, found = surveyed
    for index, chart in found.maps.items():
        clusters = segmenter(dataset.image(index)).numpy()
        y = ((np.arange(chart.shape[0]) + 0.5) * clusters.shape[0] / chart.shape[0]).astype(int)
        x = ((np.arange(chart.shape[1]) + 0.5) * clusters.shape[1] / chart.shape[1]).astype(int)
        assert (chart == clusters[np.ix_(y, x)]).mean() > 0.6


def test_similarity_is_that_of_centres(surveyed):
    *_, found = surveyed
    used = [cluster.patches > 0 for cluster in found.clusters]
    assert np.allclose(np.diag(found.similarity)[used], 1, atol=1e-5)
    assert np.allclose(found.similarity, found.similarity.T, atol=1e-6)
    assert not found.similarity[~np.array(used)].any()


def test_sheets_and_thumbnails(surveyed):
    _, dataset, found = surveyed
    sheets, thumbnails = pictures(found, dataset)
    assert set(sheets) == {k for k, cluster in enumerate(found.clusters) if cluster.patches}
    assert set(thumbnails) == set(found.maps)
    for number, sheet in sheets.items():
        assert sheet.size == (PATCHES * TILE, 3 * TILE)
        tile = np.array(sheet)[:TILE, :TILE]
        assert found.clusters[number].typical
        assert (tile == [255, 255, 0]).all(-1).any(), "the patch is outlined"


def test_leading_of_every_winner():
    winner = np.array([2, 0, 2, 0, 2, 5])
    score = np.array([0.1, 0.5, 0.9, 0.7, 0.8, 0.2])
    assert _leading(winner, score, 1).tolist() == [3, 2, 5]
    assert _leading(winner, score, 2).tolist() == [3, 1, 2, 4, 5]


def test_long_images_and_bad_ones(run, photograph, tmp_path, caplog):
    photograph(400, 40, 1).save(tmp_path / "strip.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    segmenter, dataset = Segmenter.load(run, "cpu"), open_dataset("folder", root=tmp_path)
    found = survey(segmenter, dataset, range(2), 2)
    assert "left out: " in caplog.text
    assert found.images == 1
    (chart,) = found.maps.values()
    assert chart.shape == (6, 64)
    clusters = segmenter(tmp_path / "strip.png").numpy()
    x = ((np.arange(64) + 0.5) * 400 / 64).astype(int)
    assert (chart[3] == clusters[23][x]).mean() > 0.5
    Image.new("RGB", (3, 3)).save(tmp_path / "strip.png")
    with pytest.raises(UserError, match="none of the images could be read"):
        survey(segmenter, dataset, range(2), 2)
