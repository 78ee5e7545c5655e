"""Logits averaged over an image and its mirror image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.testing import assert_close

from nefkern.segmentation.flip import flip_averaged

PATCH = 4


def pad(images):
    right, below = -images.shape[3] % PATCH, -images.shape[2] % PATCH
    padded = F.pad(images, (0, right, 0, below), mode="replicate")
    return padded, tuple(padded.shape[2:])


def lopsided(images):
    """Logits that look to the left of each patch: not the same from the other side."""
    images, extent = pad(images)
    cells = F.avg_pool2d(images, PATCH)
    left = F.pad(cells, (1, 0))[..., :-1]
    return torch.cat([cells, cells + 0.7 * left], 1), extent


def pictures(width):
    return torch.rand(2, 3, 8, width, generator=torch.Generator().manual_seed(0))


def test_a_mirrored_image_has_the_mirrored_logits():
    images = pictures(16)
    averaged = flip_averaged(lopsided, pad)
    (here, extent), (there, _) = averaged(images), averaged(images.flip(-1))
    assert extent == (8, 16)
    assert torch.equal(there.flip(-1), here)
    assert not torch.allclose(lopsided(images.flip(-1))[0].flip(-1), lopsided(images)[0])


def test_both_passes_see_the_same_patches_where_the_image_is_padded():
    """What a patch says of itself alone does not change by averaging."""
    images = pictures(13)
    logits, extent = flip_averaged(lopsided, pad)(images)
    assert extent == (8, 16)
    assert_close(logits[:, :3], lopsided(images)[0][:, :3])


def test_it_is_the_mean_of_both():
    images = pictures(12)
    mirrored = lopsided(images.flip(-1))[0].flip(-1)
    expected = (lopsided(images)[0] + mirrored) / 2
    assert_close(flip_averaged(lopsided, pad)(images)[0], expected)
    assert_close(flip_averaged(lambda x: lopsided(x)[0], pad)(images)[0], expected)
