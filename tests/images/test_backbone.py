"""Backbones: the maps of every family against a direct computation with the model's own weights."""

from __future__ import annotations

import functools

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize

from nefkern.images.backbone import Backbone, _prepared
from nefkern.images.feature_cache import FeatureCache
from nefkern.images.layers import Layer
from nefkern.images.loading import load_backbone
from nefkern.images.pretraining import is_dino_v1
from nefkern.reproduction.paper import TABLES
from nefkern.runtime.errors import UserError

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

    dino = is_dino_v1(whole.model)
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
        ("test_vit", "late", "block:4"),
        ("vit_small_patch14_dinov2", "late", "block:9"),
        ("vit_small_patch16_224.dino", "late", "keys:11"),
    ],
)
def test_only_dino_takes_keys_by_itself(name, high, taken):
    assert str(*load_backbone(name, "random", high=high).high) == taken


def test_late_stages_are_the_last_two():
    backbone = load_backbone("test_resnet", "random", high="late")
    last = len(backbone.model.feature_info) - 1
    assert [str(layer) for layer in backbone.high] == [f"stage:{last - 1}", f"stage:{last}"]
    assert len(backbone.high_widths) == 2
    assert sum(backbone.high_widths) == backbone.dim
    more = load_backbone("test_resnet", "random", high="stage:1,late")
    assert list(more.high) == [Layer("stage", 1), *backbone.high]


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


# ---- any block as the high map


@pytest.mark.parametrize("high", ["block:1", "block:0,block:2", "keys:1,final,block:2"])
def test_high_is_the_blocks_asked_for(high, images):
    """Block N counted from 0, its output before any norm; several side by side, in their order."""
    backbone = small("vit_tiny_patch16_224", high=high, depth=4, embed_dim=48, num_heads=3)
    model = backbone.model
    maps = backbone(images)
    with torch.no_grad():
        outputs, _ = by_hand(backbone, images)
        weight, bias = model.blocks[1].attn.qkv.weight, model.blocks[1].attn.qkv.bias
        keys = F.linear(model.blocks[1].norm1(outputs[0]), weight[48:96], bias[48:96])
    values = {f"block:{i}": out for i, out in enumerate(outputs)}
    values |= {"final": model.norm(outputs[3]), "keys:1": keys}
    want = torch.cat([values[part][:, 1:] for part in high.split(",")], dim=2)
    assert backbone.dim == want.shape[2] == 48 * len(high.split(","))
    assert backbone.concat_dim == 96 + backbone.dim
    torch.testing.assert_close(maps.high, want, atol=2e-5, rtol=2e-5)
    low_mid = torch.cat([outputs[0], outputs[2]], dim=2)[:, 1:]
    torch.testing.assert_close(maps.concat[..., :96], low_mid, atol=2e-5, rtol=2e-5)
    assert torch.equal(maps.concat[..., 96:], maps.high)
    attention = [block.attn for block in model.blocks]
    assert not any(a._forward_pre_hooks for a in attention), "hooks must not outlive the call"


def test_blocks_after_the_last_one_asked_for_are_not_run(images):
    backbone = small("vit_tiny_patch16_224", high="block:2", depth=4, embed_dim=48, num_heads=3)
    run = []
    for number, block in enumerate(backbone.model.blocks):
        block.register_forward_hook(lambda *_, number=number: run.append(number))
    backbone(images)
    assert run == [0, 1, 2]


def test_keys_of_a_layer_that_is_never_called(images):
    """BEiT adds the biases of q and v by hand, and takes the layer's weight only."""
    model = timm.create_model(
        "beit_base_patch16_224", num_classes=0, depth=2, embed_dim=48, num_heads=3
    )
    backbone = Backbone(model, (0.5,) * 3, (0.5,) * 3, high="keys")
    square = F.interpolate(images.float() / 255, (224, 224))
    seen = []
    model.blocks[1].norm1.register_forward_hook(lambda *args: seen.append(args[2]))
    got = backbone(square).high
    want = seen[0][:, 1:] @ model.blocks[1].attn.qkv.weight[48:96].T
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_high_of_a_convolutional_network_is_any_stage(images):
    whole = load_backbone("test_resnet", "random")
    one = load_backbone("test_resnet", "random", high="stage:3")
    low, mid, _ = (info["num_chs"] for info in whole.model.feature_info[-3:])
    maps, first = whole(images), one(images)
    assert torch.equal(first.high, maps.concat[..., low : low + mid])
    assert torch.equal(first.concat[..., : low + mid], maps.concat[..., : low + mid])
    both = load_backbone("test_resnet", "random", high="stage:3,final")(images)
    assert torch.equal(both.high, torch.cat([first.high, maps.high], dim=2))


@pytest.mark.parametrize(
    ("name", "high", "message"),
    [
        ("test_vit", "block:6", "--high block:6: VisionTransformer has 6 blocks, block:0 to block"),
        ("test_vit", "final,keys:9", "has 6 blocks, keys:0 to keys:5"),
        ("test_vit", "stage:1", "VisionTransformer has blocks, not stages; expected block:0 to"),
        ("test_resnet", "stage:5", "--high stage:5: ResNet has 5 stages, stage:0 to stage:4"),
        ("test_resnet", "block:1", "expected a transformer for block, got ResNet; it has stage:0"),
        ("test_vit", "block", "--high block: expected auto, or one or several, comma-separated"),
    ],
)
def test_a_high_map_that_the_backbone_has_not(name, high, message):
    with pytest.raises(UserError) as caught:
        load_backbone(name, "random", high=high)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_keys_of_windows_are_no_map():
    shape = {"depth": 3, "embed_dim": 48, "num_heads": 3, "global_attn_indexes": (2,)}
    model = timm.create_model("samvit_base_patch16", num_classes=0, img_size=256, **shape)
    Backbone(model, (0.5,) * 3, (0.5,) * 3, high="keys:2")
    with pytest.raises(UserError, match="--high keys:1: expected a map of 13 × 9 patches"):
        Backbone(model, (0.5,) * 3, (0.5,) * 3, high="keys:1")


# ---- strides and input sizes


@pytest.mark.parametrize(
    ("name", "stride"), [("vit_tiny_r_s16_p8_224", 32), ("vitamin_small_224", 16)]
)
def test_the_stride_of_a_hybrid_is_that_of_its_maps(name, stride, images):
    """Convolutions before the patches: the side of a patch of the picture is not patch_size."""
    backbone = load_backbone(name, "random", input_size="crop")
    assert backbone.patch == stride != backbone.model.patch_embed.patch_size
    seen = []
    backbone.model.blocks[-1].register_forward_hook(lambda _, args, out: seen.append(out))
    maps = backbone(images)
    assert maps.grid == (-(-70 // stride), -(-100 // stride))
    want = backbone.model.norm(seen[0])[:, -maps.grid[0] * maps.grid[1] :]
    torch.testing.assert_close(maps.high, want, atol=1e-5, rtol=1e-5)


def test_a_model_of_one_size_sees_images_resized_and_padded_to_it(images):
    """A picture of 100 × 70 becomes 224 × 157: ten rows of patches, four of padding alone."""
    changes = {"depth": 2, "embed_dim": 48, "num_heads": 3}
    model = timm.create_model("beit_base_patch16_224", num_classes=0, **changes)
    backbone = Backbone(model, (0.5,) * 3, (0.5,) * 3)
    assert (backbone.fixed, backbone.side, backbone.patch) == (224, 224, 16)
    maps = backbone(images)
    assert maps.grid == backbone.grid((70, 100)) == (10, 14)
    resized = resize(images, [157, 224], InterpolationMode.BICUBIC, antialias=True).float()
    whole = F.pad(resized, (0, 0, 0, 224 - 157), mode="replicate") / 127.5 - 1
    want = model.forward_features(whole)[:, 1:].unflatten(1, (14, 14))[:, :10].flatten(1, 2)
    torch.testing.assert_close(maps.high, want, atol=1e-5, rtol=1e-5)
    assert backbone.seen(images).shape == (2, 3, 160, 224)
    assert torch.equal(backbone.seen(images)[:, :, :157], resized.to(torch.uint8))
    assert backbone.extent((70, 100)) == (160 * 70 / 157, 100)
    for asked in ("crop", 200):
        with pytest.raises(UserError, match=f"--input-size {asked}: Beit takes .* 224 × 224 pix"):
            Backbone(model, (0.5,) * 3, (0.5,) * 3, input_size=asked)


def test_a_model_of_one_size_is_built_for_the_size_asked_for(images):
    backbone = load_backbone("maxvit_tiny_tf_224", "random", input_size=96)
    assert (backbone.fixed, backbone.side) == (96, 96)
    assert backbone(images).grid == (5, 6)  # 67 × 96 pixels


def test_a_network_whose_sides_are_multiples_of_more_than_a_cell(images):
    """DLA adds maps of strides 16 and 32: 70 × 100 is padded to 96 × 128, the grid is 5 × 7."""
    if not hasattr(timm.create_model("dla46_c"), "forward_intermediates"):
        pytest.skip("this timm's DLA gives no intermediate maps")
    backbone = load_backbone("dla46_c", "random")
    assert (backbone.patch, backbone.multiple, backbone.side) == (16, 32, None)
    maps = backbone(images)
    assert maps.grid == (5, 7)
    padded = F.pad(images.float(), (0, 28, 0, 26), mode="replicate").to(torch.uint8)
    whole = backbone(padded).concat.unflatten(1, (6, 8))[:, :5, :7].flatten(1, 2)
    torch.testing.assert_close(maps.concat, whole)


CLIP = "vit_base_patch16_clip_quickgelu_224.openai"


def test_clip_sees_bicubic_images_of_its_own_size(images):
    """Table 9: crops of any size become 224 × 224, whatever others see."""
    torch.manual_seed(3)
    changes = {"depth": 2, "embed_dim": 64, "num_heads": 4, "dynamic_img_size": True}
    model = timm.create_model(CLIP, num_classes=0, **changes)
    config = timm.data.resolve_model_data_config(model)
    backbone = Backbone(model, config["mean"], config["std"])
    assert (backbone.side, backbone.fixed, backbone.interpolation) == (224, None, "bicubic")
    crops = images[..., :70]
    maps = backbone(crops)
    assert maps.grid == (14, 14)
    resized = resize(crops, [224, 224], InterpolationMode.BICUBIC, antialias=True)
    plain = Backbone(model, config["mean"], config["std"], input_size="crop")
    assert plain.side is None
    assert plain(crops).grid == (5, 5)
    assert torch.equal(maps.concat, plain(resized).concat)
    assert torch.equal(backbone.seen(crops), resized)
    assert backbone.extent((70, 70)) == (70, 70)
    # Another shape keeps it: 224 × 320. Floats stay within [0, 1].
    assert backbone(images).grid == (14, 20)
    floats = backbone.seen(images.float() / 255)
    assert floats.min() >= 0
    assert floats.max() <= 1
    # Bytes are rounded, and cut off at 0 and 255, after each of the two directions.
    assert (floats - backbone.seen(images).float() / 255).abs().mean() < 0.002
    assert backbone.extent((70, 100)) == (70, 100)
    assert backbone.extent((70, 96)) == (70, 96 * 320 / 307)


@pytest.mark.parametrize(
    ("name", "side"),
    [
        (CLIP, 224),
        ("vit_large_patch14_clip_quickgelu_336.openai", 336),
        ("vit_base_patch16_clip_384.laion2b_ft_in12k_in1k", 384),
        ("vit_small_patch16_384", None),
        ("vit_small_patch14_dinov2", None),
        ("vit_base_patch16_siglip_224", None),
    ],
)
def test_whose_images_are_resized_unasked(name, side):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0, depth=2, dynamic_img_size=True)
    backbone = Backbone(model, (0.5,) * 3, (0.5,) * 3)
    assert backbone.side == side
    assert backbone.interpolation == "bicubic"


def test_input_size_of_any_backbone(images):
    backbone = load_backbone("test_resnet", "random", input_size="48")
    assert backbone.seen(images).shape == (2, 3, 48, 80)  # 48 × 69, and padding
    assert backbone(images).grid == (3, 5)
    native = load_backbone("test_vit", "random", input_size="native")
    assert native.side == 160
    assert native(images[:, :, :9, :9]).grid == (10, 10), "smaller than a patch, and enlarged"
    for asked, message in (("big", "expected auto, crop, native"), (8, "at least 16, a patch")):
        with pytest.raises(UserError, match=f"--input-size {asked}: .*{message}"):
            load_backbone("test_vit", "random", input_size=asked)


def test_probing_leaves_the_model_alone(images):
    torch.manual_seed(0)
    model = timm.create_model("levit_128s", num_classes=0).eval()
    square = F.interpolate(images.float() / 255, (224, 224))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        want = model.forward_features(square)
    Backbone(model, (0.5,) * 3, (0.5,) * 3)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model.forward_features(square), want)


# ---- prepared for many calls


class Casts(TorchDispatchMode):
    """Counts weights of linear and convolutional layers that are converted to another dtype."""

    def __init__(self, model):
        super().__init__()
        layers = [m for m in model.modules() if type(m) in (torch.nn.Linear, torch.nn.Conv2d)]
        self.weights = {w.data_ptr() for m in layers for w in m.parameters()}
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and result.dtype != args[0].dtype:
            self.count += args[0].data_ptr() in self.weights
        return result


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet", "test_convnext", "resnet18"])
def test_bfloat16_weights_are_autocasts(name):
    """Bit for bit, and without a cast of a weight in a call."""
    backbone = load_backbone(name, "random")
    weights = {key: w.clone() for key, w in backbone.state_dict().items()}
    images = torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8)
    cache = FeatureCache(None, backbone, amp=True)
    cache(images)
    with Casts(backbone) as plain, torch.autocast("cpu", torch.bfloat16):
        expected = backbone(images)
    with Casts(backbone) as prepared:
        found = cache(images)
    assert torch.equal(found.concat, expected.concat)
    assert plain.count > 5
    assert prepared.count == 0
    assert all(torch.equal(w, weights[key]) for key, w in backbone.state_dict().items())
    assert {w.dtype for w in backbone.parameters()} == {torch.float32}


def test_weights_of_derived_layers_and_channels_last():
    class Standardized(torch.nn.Conv2d):
        pass

    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), Standardized(4, 4, 3), torch.nn.Conv2d(4, 5, 2)
    )
    twin = _prepared(model, half=True, channels_last=True)
    assert [m.weight.dtype for m in twin] == [torch.bfloat16, torch.float32, torch.bfloat16]
    assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in twin)
    assert all(m.weight.is_contiguous() for m in model)
    assert twin[1].bias is model[1].bias, "shared"
    x = torch.randn(1, 3, 9, 9)
    last = _prepared(model, half=False, channels_last=True)
    torch.testing.assert_close(last(x), model(x))


def test_a_compiled_backbone_gives_the_same_maps(images, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    backbone = load_backbone("test_vit", "random")
    found = FeatureCache(None, backbone, compiled=True)(images)
    torch.testing.assert_close(found.concat, backbone(images).concat, rtol=1e-4, atol=1e-4)
