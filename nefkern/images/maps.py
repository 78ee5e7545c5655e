"""Maps of blocks and stages on the patch grid: of tokens, keys, or cells of another stride."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nefkern.images.layers import Layer
from nefkern.runtime.errors import UserError


def has_keys(block: nn.Module) -> bool:
    """Whether a block's attention computes keys by a linear layer, its own or that of q and v."""
    attention = getattr(block, "attn", None)
    return any(isinstance(getattr(attention, n, None), nn.Linear) for n in ("qkv", "k_proj"))


def hook_keys(model: Any, index: int, keys: dict[int, Tensor]) -> RemovableHandle:
    """Have the next pass leave the keys of block ``index`` in ``keys``, all tokens.

    They are computed from the attention's input: some families take the layer's weight without
    calling the layer.
    """
    attention = model.blocks[index].attn

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        keys[index] = _keys(attention, args[0])

    return attention.register_forward_pre_hook(keep)


def _keys(attention: Any, x: Tensor) -> Tensor:
    """Keys ``[..., C]`` of the attention's input, before rotations and norms of heads."""
    joint = getattr(attention, "qkv", None)
    if not isinstance(joint, nn.Linear):
        return attention.k_proj(x)
    weight = joint.weight.chunk(3)[1]
    # BEiT's and EVA's keys have no bias: those of q and v stand beside the layer.
    return F.linear(x, weight, None if joint.bias is None else joint.bias.chunk(3)[1])


def as_map(found: Tensor | None, layer: Layer, shape: tuple[int, int, int]) -> Tensor:
    """``[B, C, h, w]`` of that, of ``[B, h, w, C]`` or of tokens ``[B, n, C]``, prefix first.

    Args:
        shape: ``(B, h, w)``; attention within windows has maps of its windows.
    """
    batch, h, w = shape
    if found is not None and found.shape[0] == batch:
        if found.ndim == 3 and found.shape[1] >= h * w:
            return found[:, found.shape[1] - h * w :].transpose(1, 2).unflatten(2, (h, w))
        if found.ndim == 4 and tuple(found.shape[2:]) == (h, w):
            return found
        if found.ndim == 4 and tuple(found.shape[1:3]) == (h, w):
            return found.permute(0, 3, 1, 2)
    came = "nothing" if found is None else " × ".join(map(str, found.shape))
    raise UserError(
        f"--high {layer}: expected a map of {w} × {h} patches, the backbone gives {came}; "
        "take final, or another block"
    )


def resample(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Bring ``[B, C, h, w]`` to a grid: averaged where finer, bilinear where coarser."""
    if maps.shape[-2:] == grid:
        return maps
    if maps.shape[-2] > grid[0]:
        return F.adaptive_avg_pool2d(maps, grid)
    return F.interpolate(maps, grid, mode="bilinear", align_corners=False)
