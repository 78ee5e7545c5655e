"""One small model of every module of timm, with random weights, on images of no special size."""

from __future__ import annotations

import math

import pytest

from nefkern.images.loading import load_backbone

#: A small one of each module.
WORKING = [
    "beit_base_patch16_224", "botnet26t_256", "mobileone_s0", "cait_xxs24_224", "coat_lite_tiny",
    "convit_tiny", "convmixer_1024_20_ks9_p14", "convnext_atto", "cpubone_nano",
    "crossvit_tiny_240", "csatv2", "cs3darknet_focus_s", "cspnext_tiny", "davit_tiny",
    "deit_tiny_distilled_patch16_224", "densenet121", "dla46_c", "dpn48b", "edgenext_xx_small",
    "efficientformer_l1", "efficientformerv2_s0", "tinynet_e", "efficientvim_m1",
    "efficientvit_b0", "efficientvit_m0", "eva02_tiny_patch14_224", "fasternet_t0", "fastvit_t8",
    "focalnet_tiny_srf", "gcvit_xxtiny", "ghostnet_050", "hardcorenas_a", "hgnetv2_b0",
    "hiera_tiny_224", "sam2_hiera_tiny", "hrnet_w18_small", "iformer_t", "inception_next_atto",
    "inception_resnet_v2", "inception_v3", "inception_v4", "lcnetv2_small", "levit_128s",
    "lowformer_b0", "mambaout_femto", "maxvit_tiny_tf_224", "poolformer_s12", "gmlp_ti16_224",
    "tf_mobilenetv3_small_minimal_100", "mobilenetv5_base", "mobilevit_xxs", "mvitv2_tiny",
    "naflexvit_base_patch16_gap", "nest_tiny", "nextvit_small", "nf_regnet_b0", "pit_ti_224",
    "pvt_v2_b0", "qwen3_vit_88m", "rdnet_tiny", "regnetx_002", "repghostnet_050", "repvit_m0_9",
    "res2net50_26w_4s", "resnest14d", "resnet18", "resnetv2_18", "rexnet_100", "selecsls42",
    "legacy_seresnet18", "sequencer2d_s", "shvit_s1", "skresnet18", "starnet_s050",
    "swiftformer_xs", "swin_tiny_patch4_window7_224", "swinv2_cr_tiny_224",
    "swinv2_tiny_window8_256", "tiny_vit_5m_224", "tnt_s_patch16_224", "tresnet_m",
    "twins_svt_small", "vgg11", "visformer_tiny", "vit_tiny_patch16_224", "vit_tiny_r_s16_p8_224",
    "vit_relpos_small_patch16_224", "samvit_base_patch16_224", "vitamin_small_224", "volo_d1_224",
    "ese_vovnet19b_slim_dw", "legacy_xception", "xception41", "xcit_nano_12_p16_224",
    "deepseek_vit_412m_enc", "gemma4_vit_167m_enc", "nasnetalarge", "pnasnet5large",
]  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("name", WORKING)
def test_family(name, images):
    backbone = load_backbone(name, "random")
    maps = backbone(images)
    h, w = backbone.grid(images.shape[-2:])
    assert maps.grid == (h, w)
    assert maps.high.shape == (2, h * w, backbone.dim)
    assert maps.concat.shape == (2, h * w, backbone.concat_dim)
    assert maps.concat.isfinite().all()
    high, wide = backbone.extent(images.shape[-2:])
    assert high >= 70
    assert wide >= 100
    assert math.isclose(high / h, wide / w, rel_tol=0.05)
    assert not any(t.is_meta for t in backbone.state_dict().values())
    # Not one value for all; random weights make the maps of some networks vanish almost.
    assert maps.high.std(dim=1).amax() > 0
