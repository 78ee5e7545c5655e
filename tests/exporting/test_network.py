"""The networks of plain operators against those that segment."""

from __future__ import annotations

import pytest
import torch

from nefkern.data import read_image
from nefkern.exporting.network import Network, of_whole_cells, pixel_matrix
from nefkern.images.graph import pixel_graph
from nefkern.images.loading import load_backbone
from nefkern.runtime.errors import UserError
from nefkern.segmentation.segmenter import Segmenter
from tests.exporting.conftest import KINDS, SIZES


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_logits(kind, run_of, pictures):
    segmenter = Segmenter.load(run_of(kind), "cpu")
    before = {k: v.clone() for k, v in vars(segmenter.head).items() if isinstance(v, torch.Tensor)}
    network = Network(segmenter)
    for name in SIZES:
        pixels = read_image(pictures / name)[None]
        expected = segmenter.cluster_logits(segmenter.maps(pixels))
        with torch.no_grad():
            found = network(segmenter.backbone.seen(pixels).float())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert expected.std() > 0.01, "nothing to compare"
    assert all(torch.equal(getattr(segmenter.head, k), v) for k, v in before.items())


@pytest.mark.parametrize("grid", [(5, 7), (1, 6), (1, 1), (3, 2)])
def test_the_dense_pixel_graph(grid):
    """Also where an image has fewer patches than the lists are long."""
    pairs = ((10, 2.0), (5, 0.1))
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, 3, *grid, generator=generator)
    expected = pixel_graph(images, grid, pairs).to_dense()
    found = torch.block_diag(*pixel_matrix(images, pairs))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


class Features(Network):
    """The part before the head."""

    def __init__(self, backbone, grid):
        torch.nn.Module.__init__(self)
        self.grid, self.backbone = grid, backbone if grid else of_whole_cells(backbone)


@pytest.mark.parametrize(
    ("name", "any_size"),
    [("levit_128s", False), ("tf_efficientnet_lite0", True), ("mobilevit_xxs", True)],
)
def test_backbones_of_other_families(name, any_size, images):
    """One of a fixed size, one that pads by the image's size, one of both kinds of layers."""
    backbone = load_backbone(name, "random")
    assert any_size == (not backbone.fixed and backbone.multiple == backbone.patch)
    grid, expected = backbone.grid(images.shape[-2:]), backbone(images)
    colours = backbone.seen(images).float() / 255
    for chosen in (grid, None) if any_size else (grid,):
        with torch.no_grad():
            found = Features(backbone, chosen)._features(colours, grid)
        torch.testing.assert_close(found.concat, expected.concat)
        torch.testing.assert_close(found.high, expected.high)


def test_strides_beyond_the_cells_are_found():
    """Its last stage is coarser than its grid, and pads by whether that is even."""
    backbone = load_backbone("tf_mobilenetv3_small_minimal_100", "random")
    with pytest.raises(UserError, match="--size HEIGHT WIDTH"):
        of_whole_cells(backbone)
