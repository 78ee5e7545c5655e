"""Backbones: the maps of every family against a direct computation with the model's own weights."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F

from nefkern import features as module
from nefkern.errors import UserError
from nefkern.features import Backbone, FeatureCache, load_backbone
from nefkern.reproduction.paper import TABLES

# Real classes of timm, made shallow and narrow.
TRANSFORMERS = {
    "vit": ("vit_tiny_patch16_224", {"depth": 4, "embed_dim": 48, "num_heads": 3}),
    "deit": ("deit_tiny_distilled_patch16_224", {"depth": 3, "embed_dim": 48, "num_heads": 3}),
    "dinov2": (
        "vit_small_patch14_reg4_dinov2",
        {"depth": 4, "embed_dim": 48, "num_heads": 3, "img_size": 224},
    ),
    "clip": ("vit_base_patch16_clip_quickgelu_224", {"depth": 2, "embed_dim": 64, "num_heads": 4}),
}
CONVOLUTIONAL = (
    *("test_resnet", "resnet18", "test_convnext", "test_efficientnet"),
    *("resnet50", "convnext_tiny", "tf_efficientnet_lite0"),
)

# The paper's transformers and later ones by name: blocks, channels, patch, prefix tokens.
NAMED = {
    "vit_small_patch16_384": (12, 384, 16, 1),
    "vit_base_patch16_384": (12, 768, 16, 1),
    "vit_large_patch16_384": (24, 1024, 16, 1),
    "deit_small_patch16_224": (12, 384, 16, 1),
    "deit_base_distilled_patch16_384": (12, 768, 16, 2),
    "deit3_small_patch16_384": (12, 384, 16, 1),
    "vit_small_patch16_224.dino": (12, 384, 16, 1),
    "vit_base_patch8_224.dino": (12, 768, 8, 1),
    "vit_small_patch14_dinov2": (12, 384, 14, 1),
    "vit_base_patch14_dinov2": (12, 768, 14, 1),
    "vit_large_patch14_reg4_dinov2": (24, 1024, 14, 5),
    "vit_small_patch16_dinov3": (12, 384, 16, 5),
    "vit_base_patch16_dinov3": (12, 768, 16, 5),
    "vit_large_patch16_dinov3": (24, 1024, 16, 5),
    "vit_base_patch16_clip_quickgelu_224.openai": (12, 768, 16, 1),
    "vit_large_patch14_clip_quickgelu_224.openai": (24, 1024, 14, 1),
    "vit_large_patch14_clip_quickgelu_336.openai": (24, 1024, 14, 1),
}


def small(name: str, *, high: str = "final", **changes) -> Backbone:
    torch.manual_seed(3)
    model = timm.create_model(name, num_classes=0, dynamic_img_size=True, **changes)
    for parameter in model.parameters():  # biases, position embeddings and norms away from 0 and 1
        parameter.data += 0.05 * torch.randn_like(parameter)
    config = timm.data.resolve_model_data_config(model)
    return Backbone(model, config["mean"], config["std"], high=high, input_size="crop")


def by_hand(backbone: Backbone, images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Every block's output and the last block's input, all tokens; row by row from the pixels."""
    model, p = backbone.model, backbone.patch
    x = images.double() / 255
    x = (x - backbone.mean.double()) / backbone.std.double()
    x = F.pad(x, (0, -x.shape[3] % p, 0, -x.shape[2] % p), mode="replicate").float()
    h, w = x.shape[2] // p, x.shape[3] // p
    patches = torch.stack(  # rows first, then columns: the order of the tokens
        [x[:, :, i * p : i * p + p, j * p : j * p + p] for i in range(h) for j in range(w)], 1
    )
    weight = model.patch_embed.proj.weight
    tokens = torch.einsum("bnchw,dchw->bnd", patches, weight)
    if model.patch_embed.proj.bias is not None:
        tokens = tokens + model.patch_embed.proj.bias
    embedded = model._pos_embed(tokens.unflatten(1, (h, w)))
    # DINOv3 turns queries and keys in every block instead of adding to the tokens.
    x, rotation = embedded if isinstance(embedded, tuple) else (embedded, None)
    x = model.norm_pre(x)
    outputs, last_input = [], x
    for block in model.blocks:
        last_input = x
        x = block(x) if rotation is None else block(x, rope=rotation)
        outputs.append(x)
    return outputs, last_input


def last_keys(model: torch.nn.Module, last_input: torch.Tensor) -> torch.Tensor:
    """The keys of the last attention: query, key and value are stacked in this order."""
    block, c = model.blocks[-1], last_input.shape[2]
    weight, bias = block.attn.qkv.weight, block.attn.qkv.bias
    return F.linear(block.norm1(last_input), weight[c : 2 * c], bias[c : 2 * c])


@pytest.mark.parametrize("name", NAMED)
def test_named_transformers(name, images):
    """Full size without memory, for where the maps are taken; then three blocks of full width,
    whose maps are those of a direct computation, every token in its place."""
    depth, channels, patch, prefix = NAMED[name]
    with torch.device("meta"):
        whole = timm.create_model(name, num_classes=0, dynamic_img_size=True)
    whole = Backbone(whole, (0.5,) * 3, (0.5,) * 3, high="final")
    assert whole.stages == [0, depth // 2]
    assert len(whole.model.blocks) == depth
    assert (whole.dim, whole.concat_dim, whole.patch) == (channels, 3 * channels, patch)

    dino = module._is_dino_v1(whole.model)
    assert dino == name.endswith(".dino")
    backbone = small(name, high="keys" if dino else "final", depth=3)
    assert backbone.model.num_prefix_tokens == prefix
    maps = backbone(images)
    h, w = -(-70 // patch), -(-100 // patch)
    assert maps.grid == (h, w)
    with torch.no_grad():
        outputs, last_input = by_hand(backbone, images)
        high = last_keys(backbone.model, last_input) if dino else backbone.model.norm(outputs[-1])
    got = maps.concat.split(channels, dim=2)
    for one, want in zip(got, (outputs[0], outputs[1], high), strict=True):
        assert one.shape == (2, h * w, channels)
        torch.testing.assert_close(one, want[:, prefix:], atol=1e-4, rtol=1e-4)
    assert torch.equal(maps.high, got[2])


def test_backbones_of_the_papers_tables_are_among_the_named():
    assert {row.backbone for table in TABLES.values() for row in table.rows.values()} <= set(NAMED)


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_transformer_maps_are_its_blocks(family, images):
    name, changes = TRANSFORMERS[family]
    backbone = small(name, **changes)
    model, prefix = backbone.model, backbone.model.num_prefix_tokens
    assert prefix == {"vit": 1, "deit": 2, "dinov2": 5, "clip": 1}[family]
    maps = backbone(images)
    p, c = backbone.patch, backbone.dim
    h, w = -(-70 // p), -(-100 // p)
    assert maps.grid == (h, w)
    assert maps.high.shape == (2, h * w, c)
    assert maps.concat.shape == (2, h * w, 3 * c) == (2, h * w, backbone.concat_dim)
    with torch.no_grad():
        outputs, _ = by_hand(backbone, images)
        high = model.norm(outputs[-1])
    expected = [outputs[0], outputs[len(outputs) // 2], high]
    for got, want in zip(maps.concat.split(c, dim=2), expected, strict=True):
        torch.testing.assert_close(got, want[:, prefix:], atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(maps.high, maps.concat[..., -c:], atol=0, rtol=0)


def test_keys_are_those_of_the_last_attention(images):
    backbone = small("vit_small_patch16_224.dino", high="keys", depth=3, embed_dim=48, num_heads=3)
    model = backbone.model
    maps = backbone(images)
    with torch.no_grad():
        keys = last_keys(model, by_hand(backbone, images)[1])
    torch.testing.assert_close(maps.high, keys[:, 1:], atol=2e-5, rtol=2e-5)
    assert not model.blocks[-1].attn.qkv._forward_hooks, "the hook must not outlive the call"


@pytest.mark.parametrize(
    ("name", "high", "taken"),
    [
        ("vit_small_patch16_224.dino", "auto", "keys:11"),
        ("vit_small_patch16_224.dino", "final", "final"),
        ("test_vit", "auto", "final"),
        ("test_vit", "keys", "keys:5"),
    ],
)
def test_only_dino_takes_keys_by_itself(name, high, taken):
    assert str(*load_backbone(name, "random", high=high).high) == taken


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_stages_are_brought_to_one_grid(name, images):
    backbone = load_backbone(name, "random")
    names = [info["module"] for info in backbone.model.feature_info][-3:]
    seen: dict[str, torch.Tensor] = {}
    for stage in names:
        backbone.model.get_submodule(stage).register_forward_hook(
            lambda _, args, out, stage=stage: seen.update({stage: out})
        )
    maps = backbone(images)
    assert maps.grid == (5, 7)
    assert maps.high.shape == (2, 35, backbone.dim)
    parts = [seen[stage] for stage in names]
    assert maps.concat.shape == (2, 35, sum(p.shape[1] for p in parts))
    start = 0
    for part in parts:
        got = maps.concat[..., start : start + part.shape[1]].transpose(1, 2)
        start += part.shape[1]
        if part.shape[2:] == (5, 7):
            torch.testing.assert_close(got, part.flatten(2))
        else:  # whole cells are averaged
            factor = part.shape[2] // 5
            want = F.avg_pool2d(part, factor) if factor > 1 else F.interpolate(part, (5, 7))
            torch.testing.assert_close(got, want.flatten(2), atol=1e-5, rtol=1e-5)
    assert len({tuple(p.shape[2:]) for p in parts}) > 1, "a case where one is resampled"


def test_padding_repeats_the_edges(images):
    backbone = load_backbone("test_vit", "random")
    padded = backbone.seen(images)
    assert padded.dtype == torch.uint8
    assert padded.shape == (2, 3, 80, 112)
    assert torch.equal(padded[..., :70, :100], images)
    assert torch.equal(padded[..., 70:, :100], images[..., 69:70, :].expand(2, 3, 10, 100))
    assert torch.equal(padded[..., 100:], padded[..., 99:100].expand(2, 3, 80, 12))
    assert backbone.seen(padded) is padded
    torch.testing.assert_close(backbone(images).concat, backbone(padded).concat)


def test_floats_in_0_1_are_the_same_image(images):
    backbone = load_backbone("test_vit", "random")
    torch.testing.assert_close(backbone(images).high, backbone(images.float() / 255).high)


def test_image_smaller_than_a_patch():
    with pytest.raises(UserError, match="40 × 15 pixels: expected at least one patch, 16 × 16"):
        load_backbone("test_vit", "random")(torch.zeros(1, 3, 15, 40, dtype=torch.uint8))


def test_frozen_and_in_eval_mode_whatever_its_parent_does(images):
    backbone = load_backbone("test_efficientnet", "random")
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    torch.nn.Sequential(backbone).train()
    maps = backbone(images)
    assert not any(m.training for m in backbone.modules())
    assert not any(p.requires_grad for p in backbone.parameters())
    assert not maps.high.requires_grad
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name]), f"{name}: running statistics moved"


def test_random_weights_are_the_same_in_every_process_and_leave_the_generator_alone():
    torch.manual_seed(5)
    first, drawn = load_backbone("test_vit", "random").identity, torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    assert load_backbone("test_vit", "random").identity == first


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("vit_smal_patch16", {}, "--backbone vit_smal_patch16: timm has no such model"),
        ("test_resnet", {"high": "keys"}, "--high keys: expected a transformer"),
        ("test_vit", {"weights": "packaged"}, "--weights packaged: no packaged weights for"),
        ("test_vit", {"weights": "/no/such.pth"}, "--weights /no/such.pth: no such file"),
    ],
)
def test_what_cannot_be_loaded(name, arguments, message):
    arguments = {"weights": "random", **arguments}
    with pytest.raises(UserError, match=message) as caught:
        load_backbone(name, **arguments)
    assert "\n" not in str(caught.value)


def test_a_model_of_one_input_size_says_so(images):
    model = timm.create_model(
        "beit_base_patch16_224", num_classes=0, depth=1, embed_dim=48, num_heads=3
    )
    backbone = Backbone(model, (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(UserError, match="Beit does not take images of 112 × 80 pixels"):
        backbone(images)


# ---- the cache


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
    def path(backbone=backbone, image=images[0], amp=False):
        return FeatureCache(tmp_path, backbone, amp=amp)._path(image)

    other = images[0].clone()
    other[0, 0, 0] ^= 1
    with torch.random.fork_rng():
        changed = load_backbone("test_vit", "random")
        changed.model.norm.bias.data[0] += 1
        changed.identity = module.sources.digest(changed.model)
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
        path(backbone=load_backbone("test_vit", "random", high="keys")),
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
