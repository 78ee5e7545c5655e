from itertools import product

import pytest
import torch
from torch.testing import assert_close

from nefkern.baselines.deep_spectral import DeepSpectral, diagonal_blocks
from nefkern.images.graph import GraphConfig, image_kappa
from nefkern.segmentation.clusterer import Clusterer
from nefkern.segmentation.methods import METHODS
from nefkern.segmentation.upsample import upsample

GRID = (12, 15)
COLOURS = torch.tensor([[220, 30, 40], [40, 200, 60], [60, 60, 230], [240, 240, 250]])


def region_map(number: int) -> torch.Tensor:
    """Four regions of different shapes and sizes on the grid, shifted from image to image."""
    h, w = GRID
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    regions = torch.zeros(h, w, dtype=torch.int64)
    regions[:, 8 - number :] = 1
    regions[y + x > 19 + number] = 2
    regions[(y - 4) ** 2 + (x - 4) ** 2 < 8] = 3
    return regions


def batch(count: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features ``[B, C, h, w]``, images of 4 pixels a patch, and regions ``[B, h, w]``."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, 24, generator=generator)
    regions = torch.stack([region_map(number) for number in range(count)])
    noise = torch.randn(*regions.shape, 24, generator=generator)
    features = (centres[regions] + 0.5 * noise).movedim(-1, 1)
    images = COLOURS[regions].movedim(-1, 1).byte()
    return features, images.repeat_interleave(4, 2).repeat_interleave(4, 3), regions


def graph_of(features: torch.Tensor, images: torch.Tensor, k: int = 25):
    return image_kappa(features.movedim(1, -1).flatten(0, 2), images, GRID, GraphConfig(), k)


def agree(found: torch.Tensor, truth: torch.Tensor) -> bool:
    """Whether two labellings are the same partition."""
    pairs = set(zip(found.flatten().tolist(), truth.flatten().tolist(), strict=True))
    return len(pairs) == len(truth.unique()) == len(found.unique())


def test_known_segments_are_found():
    features, images, regions = batch()
    method = DeepSpectral(4)
    for block, truth in zip(diagonal_blocks(graph_of(features, images), 3), regions, strict=True):
        assert agree(method.segments(block), truth)


def test_more_segments_than_regions_divide_them_and_cross_no_border():
    features, images, regions = batch()
    block = diagonal_blocks(graph_of(features, images), 3)[0]
    found = DeepSpectral(15).segments(block)
    assert found.unique().tolist() == list(range(15))
    for segment in range(15):
        assert len(regions[0].flatten()[found == segment].unique()) == 1


def test_means_are_over_the_segments():
    features, images, regions = batch()
    means = DeepSpectral(4).segment_means(graph_of(features, images), features)
    assert means.shape == features.shape
    for b, region in product(range(3), range(4)):
        inside = regions[b] == region
        expected = features[b][:, inside].mean(1)
        assert_close(means[b][:, inside], expected[:, None].expand(-1, int(inside.sum())))
        assert len(means[b][:, inside].unique(dim=1).T) == 1, "equal to the bit"


def test_an_image_does_not_depend_on_its_batch():
    features, images, _ = batch()
    together = DeepSpectral(6).segment_means(graph_of(features, images), features)
    for b in range(3):
        f, i = features[b : b + 1], images[b : b + 1]
        assert torch.equal(DeepSpectral(6).segment_means(graph_of(f, i), f)[0], together[b])


def test_the_seed_decides():
    """Ten segments of four regions are arbitrary, so that another seed shows."""
    features, images, _ = batch(1)
    graph = graph_of(features, images)
    first, again, other = (DeepSpectral(10, seed=s).segments(graph) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_clusters_across_images_are_the_regions():
    """Every segment counts once: a region of few patches weighs as much as one of many."""
    features, images, regions = batch()
    means = DeepSpectral(4).segment_means(graph_of(features, images), features)
    clusterer = Clusterer(METHODS["deep-spectral"], 4)
    clusterer.observe({"segments": means})
    clusterer.finish("cpu")
    assert clusterer.kmeans.counts.tolist() == [3, 3, 3, 3]
    assert agree(clusterer.logits({"segments": means}).argmax(1), regions)


def test_no_other_cluster_between_two_segments():
    """Up-sampled *scores* would show the middle centre where the outer two meet."""
    rows = torch.tensor([[-4.0, 0.0], [0.0, 0.5], [4.0, 0.0]])
    clusterer = Clusterer(METHODS["deep-spectral"], 3)
    clusterer.observe({"segments": rows.T[None, :, None]})
    clusterer.finish("cpu")
    outer = {"segments": rows[[0, 0, 2, 2]].T[None, :, None]}
    logits = upsample(clusterer.logits(outer), (8, 32))[0]
    clusters, shares = logits.argmax(0), clusterer.probabilities(logits)
    left, right = clusterer.kmeans.predict(rows[[0, 2]]).tolist()
    assert clusters.eq(left).logical_or(clusters.eq(right)).all()
    torch.testing.assert_close(shares, logits)  # sums to 1, as a CRF takes it
    torch.testing.assert_close(shares.sum(0), torch.ones(8, 32))
    without = torch.cat([shares[:1] * 0 - torch.inf, shares[1:]])  # a class without a cluster
    assert clusterer.probabilities(without)[0].eq(0).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 2)])
def test_fewer_patches_than_segments(size):
    features = torch.randn(2, 5, *size, generator=torch.Generator().manual_seed(0))
    images = torch.zeros(2, 3, *size).byte()
    rows = features.movedim(1, -1).flatten(0, 2)
    graph = image_kappa(rows, images, size, GraphConfig(), 9)
    means = DeepSpectral().segment_means(graph, features)
    assert means.shape == features.shape
    assert means.isfinite().all()


def test_features_without_any_similarity():
    """All zero, as of a dead network: the pixel graph alone is cut."""
    _, images, regions = batch(1)
    features = torch.zeros(1, 24, *GRID)
    graph = graph_of(features, images)
    assert agree(DeepSpectral(4).segments(graph), regions[0])


def test_blocks_are_the_diagonals():
    features, images, _ = batch()
    graph = graph_of(features, images)
    dense, n = graph.to_dense(), GRID[0] * GRID[1]
    for b, block in enumerate(diagonal_blocks(graph, 3)):
        at = slice(b * n, (b + 1) * n)
        assert torch.equal(block.validate().to_dense(), dense[at, at])
    with pytest.raises(ValueError, match=f"divisor of {3 * n} nodes, got 7"):
        diagonal_blocks(graph, 7)


def test_no_segments_are_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        DeepSpectral(0)
