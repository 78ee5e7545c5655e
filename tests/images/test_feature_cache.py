"""Features that are kept: what is read is what was written, and its key is all that decides it."""

from __future__ import annotations

import pytest
import torch

from nefkern.images.backbone import Backbone
from nefkern.images.feature_cache import FeatureCache
from nefkern.images.loading import load_backbone
from nefkern.images.weights import digest


@pytest.fixture
def backbone() -> Backbone:
    return load_backbone("test_vit", "random")


def test_cache_gives_what_it_was_given(backbone, images, tmp_path):
    plain = backbone(images)
    cache = FeatureCache(tmp_path / "cache", backbone)
    first, second = cache(images), cache(images)
    assert (cache.hits, cache.misses) == (2, 2)
    assert torch.equal(first.concat, second.concat)
    assert torch.equal(first.high, second.high)
    assert first.grid == second.grid == plain.grid
    # Half precision on disk: 11 bits.
    torch.testing.assert_close(second.concat, plain.concat, rtol=2**-11, atol=1e-6)
    torch.testing.assert_close(second.high, plain.high, rtol=2**-11, atol=1e-6)
    mixed = torch.stack([images[1], images[0].flip(-1), images[0]])
    out = cache(mixed)
    assert (cache.hits, cache.misses) == (4, 3)
    torch.testing.assert_close(out.concat, backbone(mixed).concat, rtol=2**-10, atol=1e-4)


def test_cache_computes_a_broken_entry_again(backbone, images, tmp_path):
    cache = FeatureCache(tmp_path, backbone)
    first = cache(images)
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 2
    files[0].write_bytes(files[0].read_bytes()[:100])
    files[1].write_bytes(b"")
    torch.testing.assert_close(cache(images).concat, first.concat, rtol=2**-10, atol=1e-4)
    assert cache.misses == 4
    assert cache(images).concat.isfinite().all()
    assert cache.hits == 2, "and wrote it anew"
    assert not [p for p in tmp_path.rglob("*") if "part" in p.name]


def test_cache_key_changes_with_pixels_weights_and_options(backbone, images, tmp_path):
    def path(backbone=backbone, image=images[0], amp=False, tf32=True):
        return FeatureCache(tmp_path, backbone, amp=amp, tf32=tf32)._path(image)

    other = images[0].clone()
    other[0, 0, 0] ^= 1
    with torch.random.fork_rng():
        changed = load_backbone("test_vit", "random")
        changed.model.norm.bias.data[0] += 1
        changed.identity = digest(changed.model)
    statistics = load_backbone("test_vit", "random")
    statistics.mean += 0.1
    stages = load_backbone("test_vit", "random")
    stages.stages = [0, 2]
    paths = [
        path(),
        path(image=other),
        path(image=images[0].reshape(3, 100, 70)),
        path(image=images[0].float()),
        path(amp=True),
        path(tf32=False),
        path(backbone=load_backbone("test_vit", "random", high="keys")),
        path(backbone=load_backbone("test_vit", "random", high="keys:4")),
        path(backbone=load_backbone("test_vit", "random", high="block:5")),
        path(backbone=load_backbone("test_vit", "random", high="block:4,block:5")),
        path(backbone=load_backbone("test_vit", "random", input_size="native")),
        path(backbone=load_backbone("test_vit", "random", input_size=80)),
        path(backbone=changed),
        path(backbone=statistics),
        path(backbone=stages),
        path(backbone=load_backbone("test_vit2", "random")),
    ]
    assert len(set(paths)) == len(paths)
    assert path() == paths[0] == path(backbone=load_backbone("test_vit", "random"))


def test_cache_keeps_values_too_large_for_half_precision(backbone, images, tmp_path):
    backbone.model.norm.weight.data *= 1e6
    cache = FeatureCache(tmp_path, backbone)
    assert cache(images).high.abs().max() > 65504
    second = cache(images)
    assert cache.hits == 2
    torch.testing.assert_close(second.high, backbone(images).high)


def test_no_folder_no_cache(backbone, images):
    assert torch.equal(FeatureCache(None, backbone)(images).concat, backbone(images).concat)
