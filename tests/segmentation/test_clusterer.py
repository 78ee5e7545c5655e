import pytest
import torch
from torch.testing import assert_close

from nefkern.segmentation.clusterer import Clusterer
from nefkern.segmentation.methods import CONTINUOUS, METHODS
from nefkern.spectral.kmeans import KMeans


def batches(count=6, channels=5, size=(2, 4, 3), seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    b, h, w = size
    return [scale * torch.randn(b, channels, h, w, generator=generator) for _ in range(count)]


def rows_of(maps):
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


def test_outputs_of_psi_pass_through():
    logits = torch.randn(2, 7, 3, 3)
    clusterer = Clusterer(METHODS["ours"], 7)
    clusterer.observe({"logits": logits})
    assert clusterer.finish("cpu").logits({"logits": logits}) is logits
    assert_close(clusterer.probabilities(logits[0]), logits[0].softmax(0))


def test_sample_then_online_pass():
    """Batches of 24 rows, a sample of 50: K-means is fitted on three and sees the rest once."""
    data = batches()
    clusterer = Clusterer(METHODS["kmeans"], 4, seed=1, sample_rows=50)
    for maps in data:
        clusterer.observe({"graph": maps})
    clusterer.finish("cpu")
    rows = torch.cat([rows_of(maps) for maps in data])
    expected = KMeans(4, seed=1).fit(rows[:72])
    for maps in data[3:]:
        expected.partial_fit(rows_of(maps))
    assert_close(clusterer.kmeans.centers, expected.centers)
    assert clusterer.kmeans.counts.sum() == len(rows)


def test_little_data_is_all_sample():
    data = batches(2)
    clusterer = Clusterer(METHODS["kmeans"], 4)
    for maps in data:
        clusterer.observe({"graph": maps})
    clusterer.finish("cpu")
    expected = KMeans(4).fit(torch.cat([rows_of(maps) for maps in data]))
    assert_close(clusterer.kmeans.centers, expected.centers)


def test_logits_are_on_the_grid_of_the_maps():
    clusterer = Clusterer(METHODS["ours*"], 4)
    maps = batches(1)[0]
    clusterer.observe({"hidden": maps})
    logits = clusterer.finish("cpu").logits({"hidden": maps})
    assert logits.shape == (2, 4, 4, 3)
    expected = torch.cdist(rows_of(maps), clusterer.kmeans.centers).argmin(1)
    assert torch.equal(logits.argmax(1).flatten(), expected)


def test_normalised_features_are_standardised_then_layer_normed():
    """Channels of very different scale and offset, one of them constant."""
    data = [maps * torch.tensor([1.0, 100, 0.01, 5, 0]).view(5, 1, 1) + 3 for maps in batches(4)]
    clusterer = Clusterer(METHODS["kmeans-concat"], 4)
    for maps in data:
        clusterer.observe({"concat": maps})
    clusterer.finish("cpu")
    rows = torch.cat([rows_of(maps) for maps in data]).double()
    rows = rows - rows.mean(0)
    rows[:, :4] /= rows[:, :4].std(0)
    rows = rows - rows.mean(1, keepdim=True)
    rows = rows / (rows.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    expected = torch.cdist(rows, clusterer.kmeans.centers.double()).argmin(1)
    found = torch.cat([clusterer.logits({"concat": maps}).argmax(1).flatten() for maps in data])
    assert torch.equal(found, expected)


def test_probabilities_are_the_gaussian_posterior():
    clusterer = Clusterer(METHODS["kmeans"], 3)
    maps = batches(3)[0]
    clusterer.observe({"graph": maps})
    clusterer.finish("cpu")
    rows, kmeans = rows_of(maps).double(), clusterer.kmeans
    squared = torch.cdist(rows, kmeans.centers.double()).square()
    expected = (-squared / (2 * kmeans.variance)).softmax(1).T.float()
    logits = clusterer.logits({"graph": maps}).movedim(1, 0).flatten(1)
    assert_close(clusterer.probabilities(logits), expected, atol=1e-4, rtol=1e-3)


def test_too_few_patches_are_refused():
    clusterer = Clusterer(METHODS["kmeans"], 30)
    clusterer.observe({"graph": torch.randn(1, 5, 2, 2)})
    with pytest.raises(ValueError, match=r"n >= 30 .* got \(4, 5\)"):
        clusterer.finish("cpu")


def test_no_patches_at_all_are_refused():
    with pytest.raises(ValueError, match="n >= 3"):
        Clusterer(METHODS["kmeans"], 3).finish("cpu")


def test_continuous_outputs_are_clustered_as_in_spectral_clustering():
    """Columns of one norm over the training images, unit rows; one function is dead."""
    data = [maps * torch.tensor([1.0, 50, 0.1, 3, 1e-6]).view(5, 1, 1) for maps in batches(4)]
    clusterer = Clusterer(CONTINUOUS, 4)
    for maps in data:
        clusterer.observe({"logits": maps})
    clusterer.finish("cpu")
    rows = torch.cat([rows_of(maps) for maps in data]).double()
    norms = rows.square().mean(0).sqrt()
    columns = rows / norms.clamp(min=1e-2 * norms.max())
    unit = columns / columns.norm(dim=1, keepdim=True)
    assert columns[:, 4].abs().max() < 1e-4, "noise stays noise"
    expected = torch.cdist(unit, clusterer.kmeans.centers.double()).argmin(1)
    found = torch.cat([clusterer.logits({"logits": maps}).argmax(1).flatten() for maps in data])
    assert torch.equal(found, expected)
    flipped = [clusterer.logits({"logits": -maps}).argmax(1).flatten() for maps in data]
    assert not torch.equal(torch.cat(flipped), found), "signs tell clusters apart"


def test_state_makes_the_same_clusters():
    data = batches(3)
    clusterer = Clusterer(CONTINUOUS, 4)
    for maps in data:
        clusterer.observe({"logits": maps})
    state = clusterer.finish("cpu").state()
    again = Clusterer(CONTINUOUS, 4).load(state)
    assert again.fitted
    maps = {"logits": data[0]}
    assert torch.equal(again.logits(maps), clusterer.logits(maps))
    assert torch.equal(
        again.probabilities(again.logits(maps)[0]), clusterer.probabilities(again.logits(maps)[0])
    )


def test_segments_of_different_images_are_not_one():
    """Equal rows of an image are one segment; a batch changes neither number nor order."""
    one = torch.arange(3.0)[torch.tensor([[2, 2, 0], [1, 0, 2]])].expand(1, 5, 2, 3)
    apart, together = (Clusterer(METHODS["deep-spectral"], 3) for _ in range(2))
    for image in (one, one + 0.5, one):
        apart.observe({"segments": image})
    together.observe({"segments": torch.cat([one, one + 0.5, one])})
    centers = [c.finish("cpu").kmeans for c in (apart, together)]
    assert torch.equal(centers[0].centers, centers[1].centers)
    assert centers[1].counts.sum() == 9
