"""Frozen backbones: from images to the low, mid and high feature maps (sections 3.1 and 4.1)."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize

from nefkern.images.layers import Layer, parse_high, parse_input_size
from nefkern.images.maps import as_map, has_keys, hook_keys, resample
from nefkern.images.pretraining import (
    configuration,
    interpolation,
    is_clip,
    is_dino_v1,
    native_size,
)
from nefkern.images.probe import Input, feature_info, is_isotropic, probe
from nefkern.runtime.errors import UserError


@dataclass
class Features:
    """Feature maps of a batch on one grid of ``h × w`` patches.

    Attributes:
        high: ``[B, h·w, C]``, the graph features F.
        concat: ``[B, h·w, C_low + C_mid + C]``, the input of ψ: F is the last part.
        grid: ``(h, w)`` of the padded images.
    """

    high: Tensor
    concat: Tensor
    grid: tuple[int, int]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Features:
        """The same maps on another device, or of another dtype."""
        return Features(self.high.to(device, dtype), self.concat.to(device, dtype), self.grid)


class Backbone(nn.Module):
    """A timm model as a frozen feature extractor.

    Strides, prefix tokens, widths and normalisation statistics are the model's own, found by
    asking it (:mod:`nefkern.images.probe`). Images are padded at the right and at the bottom to
    whole cells of its grid. What a model needs beyond that (sides that are multiples of more, or
    one fixed size) is padded too, and the cells that show padding alone are dropped again.

    CLIP's towers see images resized to their own input size (table 9), and so do models that take
    one size only.

    Args:
        model: a timm model without classifier.
        mean, std: normalisation statistics of its training, for RGB in [0, 1].
        high: the high map, see :func:`~nefkern.images.loading.load_backbone`.
        input_size: what images are resized to, see :func:`~nefkern.images.loading.load_backbone`.
        identity: what the weights are; part of the feature cache's key.

    Attributes:
        patch: side of a cell of the grid, in the pixels that the model sees.
        side: the pixels that images are resized to: their shorter side, or the longer one for a
            model of a fixed size; None: they are seen as they are.
        alignment: what sides of windows should be multiples of, in pixels of the images.
        dim, concat_dim: channels of the high map, and of all three.
        high_widths: channels of the maps that the high one is made of.

    Raises:
        UserError: a model whose maps cannot be had this way.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        high: str = "auto",
        input_size: str | int = "auto",
        identity: str = "",
    ) -> None:
        super().__init__()
        self.model: Any = model.eval().requires_grad_(False)  # timm's models have no common type
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.identity = identity
        if not hasattr(model, "forward_intermediates"):
            raise UserError(
                f"--backbone: timm's {type(model).__name__} gives no intermediate maps; "
                "expected a model with forward_intermediates"
            )
        # Pyramids of attention have stages as convolutional networks do.
        self.is_transformer = (
            hasattr(model, "blocks")
            and hasattr(getattr(model, "patch_embed", None), "patch_size")
            and is_isotropic(model)
        )
        native = native_size(model)
        asked = parse_input_size(input_size)
        found = probe(model, (asked, *native) if isinstance(asked, int) else native)
        self.patch, self.multiple, self.fixed = found.patch, found.multiple, found.side
        self.side = self._chosen_side(asked, native)
        self.alignment = self.patch if self.side is None else 1
        self.interpolation = interpolation(model)
        if self.is_transformer:
            self.stages = [0, len(model.blocks) // 2]
        else:
            self.stages = list(range(len(feature_info(model))))[-3:-1]
        self.high = self._chosen_layers(high)
        widths = self._widths(found)
        self.high_widths = tuple(widths[len(self.stages) :])
        self.dim, self.concat_dim = sum(self.high_widths), sum(widths)

    def train(self, mode: bool = True) -> Backbone:
        """A frozen backbone stays in eval mode whatever its parents do."""
        return super().train(False)

    def recipe(self) -> str:
        """All that decides the maps of an image: weights, architecture, statistics, layers."""
        config = configuration(self.model)
        parts = (type(self.model).__name__, config.get("architecture"), self.identity, self.patch)
        statistics = self.mean.flatten().tolist(), self.std.flatten().tolist()
        size = self.side, self.fixed, self.interpolation, self.multiple
        return repr((*parts, *statistics, *size, self.stages, [str(part) for part in self.high]))

    def facts(self) -> dict[str, Any]:
        """What a run records of it."""
        return {
            "digest": self.identity,
            "patch": self.patch,
            "dim": self.dim,
            "concat_dim": self.concat_dim,
            "high": ",".join(map(str, self.high)),
            "input_size": self.side,
            "interpolation": self.interpolation if self.side else None,
        }

    # ---- sizes ----

    def scaled(self, size: tuple[int, int]) -> tuple[int, int]:
        """The ``(H, W)`` that an image of ``size`` is resized to; its own where none is."""
        if self.side is None:
            return size[0], size[1]
        reference = max(size) if self.fixed else min(size)
        height, width = (max(1, round(pixels * self.side / reference)) for pixels in size)
        return height, width

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """``(h, w)``, the cells of an image of ``(H, W)`` pixels."""
        height, width = self.scaled(size)
        return -(-height // self.patch), -(-width // self.patch)

    def extent(self, size: tuple[int, int]) -> tuple[float, float]:
        """``(H, W)`` that the grid of an image of ``size`` spans, in the image's own pixels.

        A little more than the image; whole numbers where images are seen as they are.
        """
        scaled, grid = self.scaled(size), self.grid(size)
        height, width = (
            cells * self.patch if now == before else cells * self.patch * before / now
            for before, now, cells in zip(size, scaled, grid, strict=True)
        )
        return height, width

    # ---- maps ----

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        """Extract the maps.

        Args:
            images: ``[B, 3, H, W]`` RGB, uint8 in 0-255 or float in [0, 1].

        Raises:
            UserError: an image smaller than one patch.
        """
        return self.maps_by(functools.partial(self._maps, self.model), images)

    def extractor(self, *, amp: bool, compiled: bool) -> Callable[[Tensor], Features]:
        """:meth:`forward`, prepared for many calls; without gradients.

        Args:
            amp: for calls under bfloat16 autocast. The layers that autocast would run in bfloat16
                get their weights so once, not in every call; results are the same to the last bit.
            compiled: by ``torch.compile``.

        Convolutional networks are laid out channels last on a GPU, whose tensor cores want it. (On
        the CPU another layout would round differently.)
        """
        channels_last = self.mean.is_cuda and not self.is_transformer
        model = _prepared(self.model, half=amp, channels_last=channels_last)
        maps = functools.partial(self._maps, model)
        return functools.partial(self.maps_by, torch.compile(maps) if compiled else maps)

    @torch.no_grad()
    def maps_by(self, maps: Callable[[Tensor], list[Tensor]], images: Tensor) -> Features:
        """:meth:`forward`, with the model's maps had by a function of padded, normalised images."""
        grid = self.grid(images.shape[-2:])
        inputs = self._padded(self.normalize(images))
        if inputs.is_cuda and not self.is_transformer:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        cut = [m[..., : grid[0], : grid[1]] for m in maps(inputs)]
        tokens = [m.flatten(2).transpose(1, 2).float() for m in cut]
        concat = torch.cat(tokens, dim=-1)
        return Features(concat[..., -self.dim :].contiguous(), concat, grid)

    def normalize(self, images: Tensor) -> Tensor:
        """What :meth:`seen` gives, to [0, 1], minus mean, over std."""
        images = self.seen(images)
        if images.dtype == torch.uint8:
            images = images.float() / 255
        return (images - self.mean) / self.std

    def seen(self, images: Tensor) -> Tensor:
        """The pixels behind the grid: resized where the model asks for it, and padded.

        The right and bottom edges are repeated up to whole cells. Resizing is bicubic or bilinear,
        as in the model's own training, antialiased, and keeps the aspect ratio.

        Args:
            images: ``[B, 3, H, W]``, any dtype.

        Returns:
            ``[B, 3, patch · h, patch · w]`` of the same dtype.

        Raises:
            UserError: an image smaller than one patch.
        """
        size = height, width = images.shape[-2:]
        if min(size) < (self.patch if self.side is None else 1):
            raise UserError(
                f"image of {width} × {height} pixels: expected at least one patch, "
                f"{self.patch} × {self.patch}"
            )
        scaled = self.scaled(size)
        if scaled != (height, width):
            mode = InterpolationMode(self.interpolation)
            images = resize(images, list(scaled), mode, antialias=True)
            if images.is_floating_point():
                images = images.clamp(0, 1)  # bicubic weights are negative here and there
        h, w = self.grid(size)
        return _extended(images, h * self.patch, w * self.patch)

    def maps(self, inputs: Tensor) -> list[Tensor]:
        """Low and mid map, then the parts of the high one, ``[B, C, h, w]`` of whole, normalised
        cells."""
        return self._maps(self.model, inputs)

    def padded_maps(self, inputs: Tensor) -> list[Tensor]:
        """:meth:`maps`, with cells of padding where the model needs them."""
        return self._maps(self.model, self._padded(inputs))

    def _padded(self, images: Tensor) -> Tensor:
        """Repeat edges up to what the model takes, where whole cells are not enough."""
        if self.fixed:
            cut = images[..., : self.fixed, : self.fixed]  # whole cells may be a little more
            return _extended(cut, self.fixed, self.fixed)
        height, width = (-(-pixels // self.multiple) for pixels in images.shape[-2:])
        return _extended(images, height * self.multiple, width * self.multiple)

    def _maps(self, model: nn.Module, images: Tensor) -> list[Tensor]:
        """Low and mid map, then the parts of the high one, ``[B, C, h, w]`` of padded images."""
        grid = -(-images.shape[-2] // self.patch), -(-images.shape[-1] // self.patch)
        if self.is_transformer:
            return self._blocks(model, images, grid)
        wanted = [*self.stages, *(layer.index for layer in self.high)]
        indices = sorted(set(wanted))
        found = model.forward_intermediates(
            images, indices=indices, intermediates_only=True, output_fmt="NCHW"
        )
        by_index = dict(zip(indices, found, strict=True))
        return [resample(by_index[index], grid) for index in wanted]

    def _blocks(self, model: nn.Module, images: Tensor, grid: tuple[int, int]) -> list[Tensor]:
        """The maps of a vision transformer, prefix tokens dropped."""
        indices = sorted({*self.stages, *(la.index for la in self.high if la.index is not None)})
        keys: dict[int, Tensor] = {}
        with contextlib.ExitStack() as stack:
            for layer in self.high:
                if layer.kind == "keys":
                    stack.callback(hook_keys(model, layer.index, keys).remove)
            options = {"indices": indices, "norm": False, "output_fmt": "NCHW"}
            if Layer("final") in self.high:
                final, maps = model.forward_intermediates(images, **options)
            else:  # blocks after the last one asked for are not run
                options.update(intermediates_only=True, stop_early=True)
                final, maps = None, model.forward_intermediates(images, **options)
        by_index = dict(zip(indices, maps, strict=True))
        found = {"final": lambda _: final, "block": by_index.get, "keys": keys.get}
        shape = (images.shape[0], *grid)
        high = [as_map(found[layer.kind](layer.index), layer, shape) for layer in self.high]
        return [*(by_index[index] for index in self.stages), *high]

    # ---- choices ----

    def _chosen_side(self, asked: str | int, native: tuple[int, ...]) -> int | None:
        """The side that images are resized to, by ``--input-size``."""
        name = type(self.model).__name__
        if asked == "auto":
            asked = "native" if self.fixed or is_clip(self.model) else "crop"
        if asked == "crop":
            if self.fixed:
                raise UserError(
                    f"--input-size crop: {name} takes images of {self.fixed} × {self.fixed} pixels "
                    "only; expected native, to which they are resized"
                )
            return None
        if asked == "native":
            if not native:
                raise UserError(f"--input-size native: timm tells no input size of {name}")
            return self.fixed or native[0]
        if self.fixed and asked != self.fixed:
            raise UserError(
                f"--input-size {asked}: {name} takes images of {self.fixed} × {self.fixed} pixels "
                "only; expected native, to which they are resized"
            )
        if asked < self.patch:
            raise UserError(f"--input-size {asked}: expected at least {self.patch}, a patch")
        return asked

    def _chosen_layers(self, high: str) -> tuple[Layer, ...]:
        """The parts of the high map, all with an index where they can have one."""
        layers = parse_high(high)
        if not self.is_transformer:
            chosen = (self._stages(high, layer) for layer in layers or (Layer("final"),))
            return tuple(itertools.chain.from_iterable(chosen))
        auto = Layer("keys" if is_dino_v1(self.model) else "final")
        return tuple(self._block(high, layer) for layer in layers or (auto,))

    def _stages(self, high: str, layer: Layer) -> tuple[Layer, ...]:
        last = len(feature_info(self.model)) - 1
        if layer.kind == "final":
            return (Layer("stage", last),)
        if layer.kind == "late":  # objects in the last stage, parts in the one before
            return tuple(Layer("stage", index) for index in (last - 1, last) if index >= 0)
        name = type(self.model).__name__
        if layer.kind != "stage":
            raise UserError(
                f"--high {high}: expected a transformer for {layer.kind}, got {name}; "
                f"it has stage:0 to stage:{last}"
            )
        if layer.index > last:
            raise UserError(f"--high {high}: {name} has {last + 1} stages, stage:0 to stage:{last}")
        return (layer,)

    def _block(self, high: str, layer: Layer) -> Layer:
        last = len(self.model.blocks) - 1
        name = type(self.model).__name__
        if layer.kind == "stage":
            raise UserError(
                f"--high {high}: {name} has blocks, not stages; expected block:0 to block:{last}"
            )
        if layer == Layer("late"):
            layer = Layer("keys") if is_dino_v1(self.model) else Layer("block", late_block(last))
        if layer == Layer("keys"):
            layer = Layer("keys", last)
        if layer.index is not None and layer.index > last:
            raise UserError(
                f"--high {high}: {name} has {last + 1} blocks, {layer.kind}:0 to "
                f"{layer.kind}:{last}"
            )
        if layer.kind == "keys" and not has_keys(self.model.blocks[layer.index]):
            raise UserError(
                f"--high {high}: expected a transformer with a linear layer for qkv or keys, "
                f"got {name}"
            )
        return layer

    @torch.no_grad()
    def _widths(self, found: Input) -> list[int]:
        """Channels of every map, low and mid first, told by one pass of the probe's model."""
        device = next(found.twin.parameters()).device
        maps = self._maps(found.twin, torch.zeros(1, 3, *found.tried, device=device))
        return [m.shape[1] for m in maps]


def late_block(last: int) -> int:
    """The block three quarters of the way through those from 0 to ``last``.

    What it says of parts and objects is clustered best: after it, networks turn to what they were
    trained for (of DINOv2's twelve blocks, 7 to 10 are ahead of the last; docs/quality.md).
    """
    return min(last, round(0.75 * (last + 1)))


def _extended(images: Tensor, height: int, width: int) -> Tensor:
    """Repeat the right and bottom edges up to this size, which is no less than the images'."""
    # Replicated edges disturb the border patches less than black ones would.
    pad = (0, width - images.shape[-1], 0, height - images.shape[-2])
    if not any(pad):
        return images
    return F.pad(images.float(), pad, mode="replicate").to(images.dtype)


def _prepared(model: nn.Module, *, half: bool, channels_last: bool) -> nn.Module:
    """The model with some of its weights in another form; it shares the others with the one given,
    which stays as it is.

    Args:
        half: those of the layers that autocast runs in bfloat16 in bfloat16. Autocast rounds the
            weights of such a layer in every call (it keeps the rounded ones only of weights that
            are trained): half the kernels of a ViT's forward pass.
        channels_last: those of convolutions laid out so.
    """
    shared = {id(t): t for t in itertools.chain(model.parameters(), model.buffers())}
    twin = copy.deepcopy(model, shared)
    for module in twin.modules():
        # Not of classes derived from these: they may compute something of their weights.
        rounded = half and type(module) in (nn.Linear, nn.Conv2d)
        for name, weight in list(module.named_parameters(recurse=False)):
            form = weight.to(torch.bfloat16) if rounded else weight
            if channels_last and weight.ndim == 4:
                form = form.contiguous(memory_format=torch.channels_last)
            if form is not weight:
                setattr(module, name, nn.Parameter(form.detach(), requires_grad=False))
    return twin
