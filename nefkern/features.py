"""Frozen backbones: from images to the low, mid and high feature maps (sections 3.1 and 4.1)."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import socket
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nefkern import weights as sources
from nefkern.errors import UserError, first_line
from nefkern.files import replace_file

log = logging.getLogger(__name__)

#: Cells of a convolutional network's grid, in pixels; transformers bring their patch size.
CONV_STRIDE = 16


@dataclass
class Features:
    """Feature maps of a batch on one grid of ``h × w`` patches.

    Attributes:
        high: ``[B, h·w, C]``, the graph features F.
        concat: ``[B, h·w, C_low + C_mid + C]``, the input of ψ (3C for a transformer).
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

    Patch size, prefix tokens and normalisation statistics are the model's own. Images are
    normalised and padded at the right and at the bottom to a multiple of the patch size.

    Args:
        model: a timm model without classifier.
        mean, std: normalisation statistics of its training, for RGB in [0, 1].
        keys: take the keys of the last attention layer as the high map (DINO v1).
        identity: what the weights are; part of the feature cache's key.

    Raises:
        UserError: a model whose maps cannot be had this way.
    """

    def __init__(
        self,
        model: nn.Module,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        keys: bool = False,
        identity: str = "",
    ) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        # Pyramids of attention have stages as convolutional networks do.
        self.is_transformer = hasattr(model, "blocks") and hasattr(
            getattr(model, "patch_embed", None), "patch_size"
        )
        self.keys = keys
        self.identity = identity
        if not hasattr(model, "forward_intermediates"):
            raise UserError(
                f"--backbone: timm's {type(model).__name__} gives no intermediate maps; "
                "expected a model with forward_intermediates"
            )
        if keys and not (self.is_transformer and _has_joint_qkv(model)):
            raise UserError(
                f"--high keys: expected a transformer with a joint qkv layer, "
                f"got {type(model).__name__}"
            )
        if self.is_transformer:
            patch = model.patch_embed.patch_size
            height, width = (patch, patch) if isinstance(patch, int) else patch
            if height != width:
                raise UserError(f"--backbone: expected square patches, got {height} × {width}")
            self.patch = height
            self.stages = [0, len(model.blocks) // 2]
            channels = [model.feature_info[i]["num_chs"] for i in (*self.stages, -1)]
        else:
            self.patch = CONV_STRIDE
            self.stages = list(range(len(model.feature_info)))[-3:]
            channels = [model.feature_info[i]["num_chs"] for i in self.stages]
        self.dim, self.concat_dim = channels[-1], sum(channels)

    def train(self, mode: bool = True) -> Backbone:
        """A frozen backbone stays in eval mode whatever its parents do."""
        return super().train(False)

    def recipe(self) -> str:
        """All that decides the maps of an image: weights, architecture, statistics, layers."""
        config = getattr(self.model, "pretrained_cfg", None) or {}
        parts = (type(self.model).__name__, config.get("architecture"), self.identity, self.patch)
        statistics = self.mean.flatten().tolist(), self.std.flatten().tolist()
        return repr((*parts, *statistics, self.stages, self.keys))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        """Extract the maps.

        Args:
            images: ``[B, 3, H, W]`` RGB, uint8 in 0-255 or float in [0, 1].

        Raises:
            UserError: an image smaller than one patch, or of a size that the model cannot take.
        """
        images = self.normalize(images)
        grid = images.shape[-2] // self.patch, images.shape[-1] // self.patch
        try:
            maps = self._tokens(images) if self.is_transformer else self._stages(images, grid)
        except (AssertionError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "must match the size" not in str(error):
                raise
            raise UserError(
                f"--backbone: {type(self.model).__name__} does not take images of "
                f"{images.shape[-1]} × {images.shape[-2]} pixels ({first_line(error)})"
            ) from error
        return Features(maps[-1].float(), torch.cat([m.float() for m in maps], dim=-1), grid)

    def normalize(self, images: Tensor) -> Tensor:
        """To [0, 1], minus mean, over std, padded to a multiple of the patch size."""
        if images.dtype == torch.uint8:
            images = images.float() / 255
        return self.pad((images - self.mean) / self.std)

    def pad(self, images: Tensor) -> Tensor:
        """Repeat the right and bottom edges up to a multiple of the patch size.

        Args:
            images: ``[B, 3, H, W]``, any dtype.

        Raises:
            UserError: an image smaller than one patch.
        """
        height, width = images.shape[-2:]
        if min(height, width) < self.patch:
            raise UserError(
                f"image of {width} × {height} pixels: expected at least one patch, "
                f"{self.patch} × {self.patch}"
            )
        # Replicated edges disturb the border patches less than black ones would.
        pad = (0, -width % self.patch, 0, -height % self.patch)
        if not any(pad):
            return images
        return F.pad(images.float(), pad, mode="replicate").to(images.dtype)

    def _tokens(self, images: Tensor) -> list[Tensor]:
        """Low, mid and high token maps of a vision transformer, prefix tokens dropped."""
        captured: list[Tensor] = []
        with contextlib.ExitStack() as stack:
            if self.keys:
                qkv = self.model.blocks[-1].attn.qkv
                hook = qkv.register_forward_hook(lambda _, args, out: captured.append(out))
                stack.callback(hook.remove)
            final, maps = self.model.forward_intermediates(
                images, indices=self.stages, norm=False, output_fmt="NLC"
            )
        high = captured[0].chunk(3, dim=-1)[1] if self.keys else final
        return [*maps, high[:, getattr(self.model, "num_prefix_tokens", 0) :]]

    def _stages(self, images: Tensor, grid: tuple[int, int]) -> list[Tensor]:
        """The last three stages of a convolutional network, brought to one grid."""
        maps = self.model.forward_intermediates(
            images, indices=self.stages, intermediates_only=True, output_fmt="NCHW"
        )
        return [_resample(m, grid).flatten(2).transpose(1, 2) for m in maps]


def _has_joint_qkv(model: nn.Module) -> bool:
    """Whether the last attention layer computes q, k and v by one linear module."""
    return isinstance(getattr(model.blocks[-1].attn, "qkv", None), nn.Linear)


def _resample(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Bring ``[B, C, h, w]`` to a grid: averaged where finer, bilinear where coarser."""
    if maps.shape[-2:] == grid:
        return maps
    if maps.shape[-2] > grid[0]:
        return F.adaptive_avg_pool2d(maps, grid)
    return F.interpolate(maps, grid, mode="bilinear", align_corners=False)


def load_backbone(
    name: str, weights: str = "auto", *, high: str = "auto", device: torch.device | str = "cpu"
) -> Backbone:
    """Build a frozen backbone and say where its weights came from.

    Args:
        name: any timm model name, with or without its pre-training tag.
        weights: a ``.safetensors`` or ``.pth`` file; "packaged" (an installed Python package);
            "hub"; "random" (for trials); or "auto": packaged where installed, else the hub.
        high: the high map of a transformer: "final" (after the last norm), "keys" (of the last
            attention layer), or "auto": keys for DINO v1 (section 4.1), else final.

    Raises:
        UserError: unknown model, weights that don't fit, an unreachable hub: with the ways out.
    """
    package = sources.packaged(name)
    if weights == "auto":
        weights = "packaged" if package and package.path() else "hub"
    model = _create(name, pretrained=weights == "hub")
    if weights == "packaged":
        path = package.path() if package else None
        if path is None:
            reason = f"pip: {package.install}" if package else "no package carries them"
            raise UserError(f"--weights packaged: no packaged weights for {name} ({reason})")
        sources.load_into(model, package.convert(path, model), f"package {package.distribution}")
        taken = f"the installed package {package.distribution}"
    elif weights == "random":
        taken = "random initialisation (for trials: the segments will be poor)"
    elif weights == "hub":
        taken = "the model hub"
    else:
        sources.load_into(model, sources.read_file(Path(weights)), f"--weights {weights}")
        taken = str(weights)
    keys = high == "keys" or (high == "auto" and _is_dino_v1(model))
    mean, std = _statistics(model)
    backbone = Backbone(model, mean, std, keys=keys, identity=sources.digest(model)).to(device)
    log.info("backbone %s: weights from %s", name, taken)
    return backbone


def _create(name: str, *, pretrained: bool) -> nn.Module:
    import timm

    if not timm.is_model(sources.architecture(name)):
        near = timm.list_models(f"*{sources.architecture(name)[:8]}*")[:5]
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise UserError(f"--backbone {name}: timm has no such model{hint}")
    if pretrained:
        _go_offline_without_network()
    # Position embeddings are resized for other input sizes; strides stay at 16 where they can.
    attempts = ({"dynamic_img_size": True}, {"output_stride": CONV_STRIDE}, {})
    for extra in attempts:
        try:
            # Seeded, so that "random" weights are the same wherever the run is loaded again.
            with torch.random.fork_rng(devices=()):
                torch.manual_seed(0)
                return timm.create_model(name, pretrained=pretrained, num_classes=0, **extra)
        except (TypeError, NotImplementedError, AssertionError):
            continue  # an option of another family of models
        except Exception as error:  # hub, network and cache errors come in dozens of classes
            if not pretrained:
                raise
            raise UserError(
                f"--backbone {name}: its weights could not be had from the model hub "
                f"({type(error).__name__}: {first_line(error)}); {sources.ways_out(name)}"
            ) from error
    raise UserError(f"--backbone {name}: timm cannot build it as a feature extractor")


def _go_offline_without_network() -> None:
    """Without a network: cached files or nothing, not a minute of the hub client's retries."""
    from huggingface_hub import constants

    hub = urllib.parse.urlsplit(constants.ENDPOINT)
    proxy = urllib.request.getproxies().get(hub.scheme)
    if proxy and not urllib.request.proxy_bypass(hub.hostname):
        hub = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = hub.port or (443 if hub.scheme == "https" else 80)
    try:
        socket.create_connection((hub.hostname, port), timeout=5).close()
    except OSError:
        constants.HF_HUB_OFFLINE = True


def _statistics(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    import timm

    config = timm.data.resolve_model_data_config(model)
    return tuple(config["mean"]), tuple(config["std"])


def _is_dino_v1(model: nn.Module) -> bool:
    return (getattr(model, "pretrained_cfg", None) or {}).get("tag") == "dino"


class FeatureCache:
    """Feature maps on disk, keyed by content: pixels, weights, and the options that made them.

    A frozen backbone gives the same maps for the same pixels, so a run that sees an image (or one
    of a fixed number of augmented views of it) again reads its maps instead of computing them.
    Entries are written atomically, in half precision unless a value is too large for it; a broken
    one is computed again.

    Args:
        folder: where the entries lie; made if absent. None keeps nothing.
        backbone: the extractor.
        amp: run it under bfloat16 autocast.
        also: a second folder of entries, which is only read: those of a run's training.
    """

    def __init__(
        self,
        folder: Path | None,
        backbone: Backbone,
        *,
        amp: bool = False,
        also: Path | None = None,
    ) -> None:
        self.folder, self.backbone, self.amp = folder, backbone, amp
        self._folders = [f for f in dict.fromkeys((folder, also)) if f is not None]
        self.hits = self.misses = 0

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Maps of ``[B, 3, H, W]`` uint8 images, each from the cache where it is there."""
        if not self._folders:
            return self._compute(images)
        paths = [self._path(image) for image in images]
        found = [self._find(path) for path in paths]
        missing = [i for i, entry in enumerate(found) if entry is None]
        self.hits += len(found) - len(missing)
        self.misses += len(missing)
        if missing:
            fresh = self._compute(images[missing])
            for row, i in enumerate(missing):
                found[i] = _compact(fresh.concat[row])
                if self.folder is not None:
                    self._write(self.folder / paths[i], found[i])
        concat = torch.stack([f.to(images.device) for f in found]).float()
        patch = self.backbone.patch
        grid = -(-images.shape[-2] // patch), -(-images.shape[-1] // patch)
        # F is the last of the three concatenated maps.
        return Features(concat[..., -self.backbone.dim :].contiguous(), concat, grid)

    def _compute(self, images: Tensor) -> Features:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.amp):
            return self.backbone(images)

    def _find(self, path: Path) -> Tensor | None:
        entries = (self._read(folder / path) for folder in self._folders)
        return next((entry for entry in entries if entry is not None), None)

    def _path(self, image: Tensor) -> Path:
        """Of an image's entry, in whichever folder."""
        how = (self.backbone.recipe(), self.amp, image.dtype, tuple(image.shape))
        sha = hashlib.sha256(repr(how).encode())
        sha.update(image.cpu().contiguous().numpy().tobytes())
        name = sha.hexdigest()[:40]
        return Path(name[:2], f"{name}.safetensors")

    @staticmethod
    def _read(path: Path) -> Tensor | None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)["concat"]
        except (FileNotFoundError, SafetensorError, KeyError, OSError):
            return None

    @staticmethod
    def _write(path: Path, concat: Tensor) -> None:
        from safetensors.torch import save

        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, save({"concat": concat.cpu().contiguous()}))


def _compact(features: Tensor) -> Tensor:
    """``features`` in half precision, where that holds them all."""
    half = features.half()
    return half if half.isfinite().all() else features
