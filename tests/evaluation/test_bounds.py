"""Floors and ceilings, against pictures whose answer is known."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from nefkern.baselines.comparison import Comparison, Windows
from nefkern.data import VOID, Sample
from nefkern.evaluation.bounds import Bounds, random_segments, superpixels
from nefkern.segmentation.evaluation import match
from nefkern.segmentation.methods import METHODS
from nefkern.segmentation.metrics import scores


def halved(edge: int, size: int = 32) -> Sample:
    """Left of ``edge`` class 0, dark; the rest class 1, bright."""
    annotation = torch.zeros(size, size, dtype=torch.uint8)
    annotation[:, edge:] = 1
    return Sample("a", (annotation * 200)[None].repeat(3, 1, 1), annotation)


def ceiling(name: str, sample: Sample, patch: tuple[float, float] = (8, 8)) -> float:
    bounds = Bounds(4, 2)
    bounds.observe(sample, 3, patch)
    return scores(bounds.counts[name].total()).accuracy


def test_patches_cannot_be_right_on_both_sides_of_an_edge():
    """An edge 3 pixels into a column of patches of 8: the smaller side, 3 of 32, is wrong."""
    assert ceiling("patches", halved(11)) == pytest.approx(1 - 3 / 32)
    assert ceiling("patches", halved(16)) == 1


def test_superpixels_follow_the_edge():
    assert ceiling("superpixels", halved(11)) == 1
    assert ceiling("superpixels", halved(16)) == 1


def test_patches_of_resized_images_may_be_no_whole_pixels():
    """Cells of 6.4 pixels: middles below 12.8 are in the first two, so 12 begins the third."""
    assert ceiling("patches", halved(13), (6.4, 6.4)) == 1
    assert ceiling("patches", halved(14), (6.4, 6.4)) == pytest.approx(1 - 1 / 32)


def test_patches_of_a_strip_are_those_that_the_network_saw():
    """One that is enlarged to 16 times the shorter side in length, not to that in width."""
    network = SimpleNamespace(num_clusters=4)
    comparison = Comparison(network, [METHODS["ours"]], Windows(64, 64, shorter=64))
    comparison.patch = (8.0, 8.0)
    assert comparison.patch_of(torch.empty(3, 32, 50)) == (4, 4)
    assert comparison.patch_of(torch.empty(3, 4, 200)) == (1.6, 1.6)  # seen as 20 x 1024


def test_names_that_are_not_utf_8_draw_clusters_too():
    bounds = Bounds(4, 2)
    bounds.observe(replace(halved(11), name="b\udcff.png"), 3, (8, 8))
    assert bounds.counts["random-clusters"].total().sum() == 32 * 32


def test_void_pixels_say_nothing():
    sample = halved(11)
    sample.annotation[:, 8:11] = VOID
    assert ceiling("patches", sample) == 1


def test_a_floor_is_what_matching_makes_of_nothing():
    """Random clusters, 2 of them, on 20 images with 3/4 of class 0: that share and little more."""
    bounds = Bounds(2, 2)
    for n in range(20):
        sample = halved(24)
        bounds.observe(Sample(str(n), sample.image, sample.annotation), 5, (8, 8))
    for name in ("random-clusters", "random-segments"):
        found = match(bounds.counts[name].total())
        assert 0.75 <= scores(found.confusions["count"]).accuracy <= 0.85
        assert found.clusters_used == 2
    clusters = bounds.counts["random-clusters"].total().sum(1).double()
    assert (clusters / clusters.sum() - 0.5).abs().max() < 0.1


def test_an_image_s_floor_does_not_depend_on_the_others():
    first, second = Bounds(9, 2, seed=3), Bounds(9, 2, seed=3)
    names = ["x", "y", "z"]
    for bounds, order in ((first, names), (second, names[::-1])):
        for name in order:
            bounds.observe(Sample(name, halved(11).image, halved(11).annotation), 4, (8, 8))
    for name in ("random-clusters", "random-segments"):
        images = list(reversed(second.counts[name].images))
        for (a, pixels), (b, others) in zip(first.counts[name].images, images, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(pixels, others)
    one, other = (pixels for _, pixels in first.counts["random-clusters"].images[:2])
    assert not torch.equal(one, other), "each image has its own"


def test_random_segments_are_as_many_and_hang_together():
    noise = torch.Generator().manual_seed(0)
    found = random_segments((20, 30), 4, 1000, noise)
    assert found.shape == (600,)
    assert len(found.unique()) == 4, "1000 clusters: no two segments have the same"
    grid = found.view(20, 30)
    neighbours = (grid[:, 1:] == grid[:, :-1]).double().mean()
    assert neighbours > 0.9


def test_superpixels_of_a_plain_picture_are_the_patches():
    patches = torch.arange(4).view(2, 2).repeat_interleave(6, 0).repeat_interleave(6, 1)
    assert torch.equal(superpixels(torch.full((3, 12, 12), 90).byte(), patches, (2, 2)), patches)
