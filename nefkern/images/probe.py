"""What input a timm model takes, found by asking it: without weights, so that it costs nothing."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nefkern.runtime.errors import UserError, first_line

#: Cells of the grid of a network whose stages have several strides, in pixels.
PYRAMID_STRIDE = 16

#: Sides of the input that is tried, in units that are tried: a multiple of no usual window.
_TRIED = (9, 13)


@dataclass(frozen=True)
class Input:
    """What a model takes, and where to ask it more.

    Attributes:
        patch: side of a cell of the grid, in pixels.
        multiple: what both sides have to be multiples of.
        side: the one side that a model of a fixed input size takes, else None.
        twin: the model on the meta device; the model itself if it does not run there.
        tried: a size ``(H, W)`` that it takes.
    """

    patch: int
    multiple: int
    side: int | None
    twin: nn.Module
    tried: tuple[int, int]


@torch.no_grad()
def probe(model: nn.Module, sides: Iterable[int]) -> Input:
    """Find out what input a model takes.

    Args:
        model: of timm, with ``forward_intermediates``.
        sides: to try where it does not take sizes of another shape, in this order.

    Raises:
        UserError: it takes none of them, or its grid has cells that are not square.
    """
    unit = _stride_told(model)
    sizes = [(unit * m * _TRIED[0], unit * m * _TRIED[1]) for m in (1, 2, 3, 4)]
    sizes += [(side, side) for side in dict.fromkeys(sides)]
    error: Exception | None = None
    for asked in _candidates(model):
        for size in sizes:
            try:
                grid = last_map(asked, size).shape[-2:]
            except Exception as raised:  # every family refuses a size by an error of its own
                error = raised
                continue
            return _found(model, asked, size, (grid[0], grid[1]))
    raise UserError(
        f"--backbone: {type(model).__name__} gives no maps for images of "
        f"{', '.join(f'{w} × {h}' for h, w in sizes)} ({first_line(error)})"
    ) from error


def _found(model: nn.Module, asked: nn.Module, size: tuple[int, int], grid: tuple) -> Input:
    patch = PYRAMID_STRIDE
    if is_isotropic(model):
        patch = size[0] // grid[0]
        if (grid[0] * patch, grid[1] * patch) != size:
            raise UserError(
                f"--backbone: expected square patches, {type(model).__name__} makes "
                f"{grid[1]} × {grid[0]} of {size[1]} × {size[0]} pixels"
            )
    if size[0] == size[1]:
        return Input(patch, patch, size[0], asked, size)
    return Input(patch, max(patch, size[0] // _TRIED[0]), None, asked, size)


def is_isotropic(model: nn.Module) -> bool:
    """Whether all its maps have one stride, as those of a plain transformer."""
    strides = {info.get("reduction") for info in feature_info(model)}
    return len(strides) == 1 and None not in strides


def feature_info(model: nn.Module) -> list[dict]:
    """What timm tells of each of a model's maps."""
    info = getattr(model, "feature_info", None) or []
    return list(info if isinstance(info, list) else info.info)


def last_map(model: nn.Module, size: tuple[int, int]) -> Tensor:
    """The last intermediate map ``[1, C, h, w]`` of an image of zeros."""
    image = torch.zeros(1, 3, *size, device=next(model.parameters()).device)
    return model.forward_intermediates(
        image, indices=1, intermediates_only=True, output_fmt="NCHW"
    )[-1]


def _stride_told(model: nn.Module) -> int:
    """The stride to try sizes by; what the model returns decides."""
    if is_isotropic(model):
        return int(feature_info(model)[-1]["reduction"])
    return PYRAMID_STRIDE


def _candidates(model: nn.Module) -> Iterable[nn.Module]:
    with contextlib.suppress(RuntimeError, TypeError):  # one that cannot be copied is asked itself
        yield on_meta(model)
    if next(model.parameters()).device.type != "meta":
        yield model


def on_meta(model: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers have shapes only: its forward pass computes nothing."""
    shapes: dict[int, Tensor] = {}
    for parameter in model.parameters():
        shapes[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    for buffer in model.buffers():
        shapes[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(model, shapes)
