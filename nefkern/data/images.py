"""Image and annotation files to tensors, every defect told in one line."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from nefkern.data.constants import VOID
from nefkern.errors import UserError

CLASSES_FILE = "classes.txt names {} classes"
"""Where a folder's number of classes comes from."""


@contextlib.contextmanager
def _opened(path: Path, kind: str) -> Iterator[Image.Image]:
    """Open ``path`` and turn whatever a decoder says about it into a :class:`UserError`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # oddities that do not stop PIL are no news
            with Image.open(path) as image:
                yield image
    except (UserError, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        raise UserError(f"{path}: expected an {kind}, the file is in no known format") from None
    except Exception as error:  # decoders of damaged data raise nearly anything
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        reason = " ".join(reason.split())
        raise UserError(f"{path}: cannot read this {kind}: {reason}") from None


def read_image(path: str | Path, *, min_side: int | None = None) -> Tensor:
    """Read an image upright and in colour.

    EXIF orientation is applied; grayscale, palette, CMYK and 16-bit images are converted;
    transparent pixels are laid over white; of an animation the first frame is taken.

    Args:
        path: the file.
        min_side: a shorter side in pixels that is enough for the caller. A JPEG of twice that
            size or more is then decoded at 1/2, 1/4 or 1/8, which is up to ten times faster.

    Returns:
        uint8 ``[3, H, W]``, RGB, stored channels last (the layout that resizes fastest).

    Raises:
        UserError: the file is missing, truncated, not an image, or has pixels without a fixed
            range (floating point, 32 bits).
    """
    with _opened(Path(path), "image") as image:
        if min_side is not None and image.format == "JPEG":
            scale = min(1.0, min_side / min(image.size))
            image.draft(None, tuple(int(np.ceil(side * scale)) for side in image.size))
        return upright_pixels(image, path)


def upright_pixels(image: Image.Image, name: str | Path) -> Tensor:
    """An opened image upright and in colour; result and errors as :func:`read_image`'s.

    Args:
        image: of any mode.
        name: what to call it in an error.
    """
    rgb = _to_rgb(ImageOps.exif_transpose(image), name)
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def _to_rgb(image: Image.Image, path: str | Path) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or image.mode == "I":
        return _from_16_bits(image, path).convert("RGB")
    if image.mode == "F":
        raise UserError(f"{path}: expected 8 or 16 bits a channel, it has floating-point pixels")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _from_16_bits(image: Image.Image, path: str | Path) -> Image.Image:
    """Scale to 8 bits; PIL's own conversion would clip at 255 instead."""
    pixels = np.asarray(image).astype(np.int64)
    low, high = int(pixels.min()), int(pixels.max())
    if low < 0 or high > 65535:
        raise UserError(f"{path}: expected 8 or 16 bits a channel, it has values {low} to {high}")
    return Image.fromarray(((pixels * 255 + 32767) // 65535).astype(np.uint8))


def read_annotation(
    path: str | Path,
    *,
    num_classes: int,
    size: tuple[int, int],
    source: str = CLASSES_FILE,
) -> Tensor:
    """Read a map of class indices from an 8-bit palette or grayscale image.

    Args:
        path: the file.
        num_classes: indices from 0 to ``num_classes - 1`` and 255 (void) are allowed.
        size: expected ``(height, width)``, that of the upright image.
        source: where ``num_classes``, the ``{}``, comes from; for the error.

    Returns:
        uint8 ``[H, W]``.

    Raises:
        UserError: unreadable, in colour, of another size, or with an index that is no class.
    """
    with _opened(Path(path), "annotation") as mask:
        if mask.mode not in ("P", "L", "1"):
            raise UserError(
                f"{path}: expected an index image (8-bit palette or grayscale, one class index"
                f" a pixel), it is {mask.mode}"
            )
        step = _gray_step(mask)
        labels = np.array(mask).astype(np.uint8) // step
    if labels.shape != tuple(size):
        raise UserError(
            f"{path}: expected the size of its image, {size[1]} x {size[0]} pixels,"
            f" it has {labels.shape[1]} x {labels.shape[0]}"
        )
    wrong = labels[(labels >= num_classes) & (labels != VOID)]
    if wrong.size:
        raise UserError(
            f"{path}: holds index {int(wrong.max())}, {source.format(num_classes)}"
            f" (0 to {num_classes - 1}; {VOID} is void)"
        )
    return torch.from_numpy(labels)


def _gray_step(mask: Image.Image) -> int:
    """PIL stretches 2- and 4-bit grayscale to 0..255; one index is then this many levels."""
    raw_modes = {str(tile[3][0] if isinstance(tile[3], tuple) else tile[3]) for tile in mask.tile}
    return 85 if "L;2" in raw_modes else 17 if "L;4" in raw_modes else 1
