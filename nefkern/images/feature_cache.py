"""Feature maps that are kept on disk, for images that are seen again."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from nefkern.images.backbone import Backbone, Features
from nefkern.runtime import tensor_files
from nefkern.runtime.files import make_folder, remove_parts, replace_file
from nefkern.runtime.precision import float32_products

#: Seconds after which nobody writes at part of an entry any more.
_ABANDONED = 86400.0


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
        tf32: on a GPU, let its float32 products and convolutions be done in TF32.
        compiled: run it by ``torch.compile``.
        also: a second folder of entries, which is only read: those of a run's training.
    """

    def __init__(
        self,
        folder: Path | None,
        backbone: Backbone,
        *,
        amp: bool = False,
        tf32: bool = False,
        compiled: bool = False,
        also: Path | None = None,
    ) -> None:
        self.folder, self.backbone, self.amp = folder, backbone, amp
        self.tf32, self.compiled = tf32, compiled
        self._extract: Callable[[Tensor], Features] | None = None
        self._folders = [f for f in dict.fromkeys((folder, also)) if f is not None]
        self.hits = self.misses = 0
        if folder is not None:  # others may be writing there
            remove_parts(folder, "*/.*.part", older=_ABANDONED)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Maps of ``[B, 3, H, W]`` uint8 images, each from the cache where it is there."""
        if not self._folders:
            return self._compute(images)
        paths = [self._path(image) for image in images]
        height, width = images.shape[-2:]
        grid = self.backbone.grid((height, width))
        shape = (math.prod(grid), self.backbone.concat_dim)
        found = [self._find(path, shape) for path in paths]
        missing = [i for i, entry in enumerate(found) if entry is None]
        self.hits += len(found) - len(missing)
        self.misses += len(missing)
        if missing:
            fresh = self._compute(images[missing])
            for row, i in enumerate(missing):
                found[i] = _compact(fresh.concat[row])
                if self.folder is not None:
                    self._write(self.folder, paths[i], found[i])
        concat = torch.stack([f.to(images.device) for f in found]).float()
        # F is the last of the three concatenated maps.
        return Features(concat[..., -self.backbone.dim :].contiguous(), concat, grid)

    def _compute(self, images: Tensor) -> Features:
        if self._extract is None:
            self._extract = self.backbone.extractor(amp=self.amp, compiled=self.compiled)
        with (
            torch.autocast(images.device.type, torch.bfloat16, enabled=self.amp),
            float32_products(images.device, tf32=self.tf32),
        ):
            return self._extract(images)

    def _find(self, path: Path, shape: tuple[int, int]) -> Tensor | None:
        entries = (self._read(folder / path) for folder in self._folders)
        return next((e for e in entries if e is not None and e.shape == shape), None)

    def _path(self, image: Tensor) -> Path:
        """Of an image's entry, in whichever folder."""
        how: tuple = (self.backbone.recipe(), self.amp, image.dtype, tuple(image.shape))
        if not self.tf32:  # entries without this may have been made in TF32
            how += ("float32",)
        sha = hashlib.sha256(repr(how).encode())
        sha.update(image.cpu().contiguous().numpy().tobytes())
        name = sha.hexdigest()[:40]
        return Path(name[:2], f"{name}.safetensors")

    @staticmethod
    def _read(path: Path) -> Tensor | None:
        try:
            entry = tensor_files.unpacked(path)[0].get("concat")
        except (tensor_files.DamagedFile, OSError):
            return None
        return entry if entry is not None and entry.is_floating_point() else None

    @staticmethod
    def _write(folder: Path, path: Path, concat: Tensor) -> None:
        make_folder(folder, (folder / path).parent)
        replace_file(folder / path, tensor_files.packed({"concat": concat}))


def _compact(features: Tensor) -> Tensor:
    """``features`` in half precision, where that holds them all."""
    half = features.half()
    return half if half.isfinite().all() else features
