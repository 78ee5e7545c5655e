"""The paper's size, at which all kernels are estimated."""

from __future__ import annotations

from bench.graph_inputs import SIZES

# The paper's size. κ's entries: counted on clustered features.
B, PATCHES, C, NEIGHBOURS, K = SIZES["paper"]
N = B * PATCHES
ENTRIES = 5_200_000
WIDTH, HIDDEN, HEADS, HEAD_DIM, BLOCKS = 3 * C, 576, 18, 64, 2  # ψ
VIT_TOKENS, VIT_BLOCKS = B * (PATCHES + 1), 12  # ViT-S/16 at 480 x 480, with its class token
# Training in the paper (section 4.1): half a day on one RTX 3090.
STEPS = 40 * (4998 // B)
THEN = 12 * 3600 / STEPS
