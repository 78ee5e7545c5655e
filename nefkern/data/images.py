"""Image and annotation files to tensors, every defect told in one line."""

from __future__ import annotations

import contextlib
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torchvision.io import decode_image, read_file

from nefkern.data import tiff
from nefkern.data.constants import VOID
from nefkern.data.levels import eight_bits
from nefkern.runtime.errors import UserError

CLASSES_FILE = "classes.txt names {} classes"
"""Where a folder's number of classes comes from."""

MAX_PIXELS = "NEFKERN_MAX_PIXELS"
"""Environment variable: the largest image that is read, in pixels."""

_MOST_PIXELS = 500_000_000  # 5 GB while they are read: 4 bytes in Pillow, 3 + 3 here
_STRIPE = 1 << 22  # pixels that are converted at a time
_PILLOW_LIMIT = threading.Lock()


@contextlib.contextmanager
def _reading(path: Path, kind: str) -> Iterator[None]:
    """Turn whatever a decoder says about ``path`` into a :class:`UserError`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # oddities that do not stop PIL are no news
            yield
    except (UserError, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        raise UserError(f"{path}: expected an {kind}, the file is in no known format") from None
    except Exception as error:  # decoders of damaged data raise nearly anything
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        reason = " ".join(reason.split())
        raise UserError(f"{path}: cannot read this {kind}: {reason}") from None


def _check_kind(path: Path) -> None:
    """A pipe would be waited for without end, and a device has none."""
    with contextlib.suppress(OSError, ValueError):  # what reads it says what is wrong
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise UserError(f"{path}: expected a file, it is a pipe, a socket or a device")


def _open(path: Path) -> Image.Image:
    """Open an image of any size: :func:`_check_size` has a limit of its own, and a way out."""
    with contextlib.suppress(Image.DecompressionBombError):
        return Image.open(path)
    with _PILLOW_LIMIT:  # it is a global of Pillow's
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(path)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _check_size(path: Path, size: tuple[int, int]) -> None:
    text = os.environ.get(MAX_PIXELS) or str(_MOST_PIXELS)
    if not text.isdecimal() or not int(text):
        raise UserError(f"{MAX_PIXELS}={text}: expected a number of pixels, such as {_MOST_PIXELS}")
    width, height = size
    if width * height > int(text):
        raise UserError(
            f"{path}: {width:,} × {height:,} are {width * height / 1e6:,g} megapixels, expected "
            f"at most {int(text) / 1e6:,g}; {MAX_PIXELS}={width * height} in the environment "
            f"allows it (reading takes about {width * height / 1e8:.1f} GB of memory)"
        )


def read_image(path: str | Path, *, min_side: int | None = None) -> Tensor:
    """Read an image upright and in colour.

    EXIF orientation is applied; grayscale, palette and CMYK images are converted; transparent
    pixels are laid over white; of an animation or a TIFF of several pages the first is taken; of
    more than four bands the first three are red, green and blue. Samples of more than 8 bits are
    scaled by :func:`nefkern.data.levels.eight_bits`, which says where white is.

    Args:
        path: the file.
        min_side: a shorter side in pixels that is enough for the caller. A JPEG of twice that
            size or more is then decoded at 1/2, 1/4 or 1/8, which is up to ten times faster.

    Returns:
        uint8 ``[3, H, W]``, RGB, stored channels last (the layout that resizes fastest).

    Raises:
        UserError: the file is missing, truncated, not an image, has pixels without a known range
            (below 0, NaN, floats beyond 1, 32 bits), or more of them than
            ``$NEFKERN_MAX_PIXELS``, 500 million unless set.
    """
    path = Path(path)
    _check_kind(path)
    with _reading(path, "image"):
        if tiff.is_tiff(path):
            found = tiff.read_tiff(path, partial(_check_size, path))
            if found is not None:
                image, orientation = found
                return _tensor(_turned(_pixels(image, path), orientation))
        with _open(path) as image:
            if min_side is not None and image.format == "JPEG":
                scale = min(1.0, min_side / min(image.size))
                image.draft(None, tuple(int(np.ceil(side * scale)) for side in image.size))
            _check_size(path, image.size)
            if (deep := _deep_png(image, path)) is not None:
                return _tensor(_turned(_pixels(deep, path), _orientation(image)))
            return upright_pixels(image, path)


def upright_pixels(image: Image.Image, name: str | Path) -> Tensor:
    """An opened image upright and in colour; result and errors as :func:`read_image`'s.

    Args:
        image: of any mode.
        name: what to call it in an error.

    Raises:
        UserError: also a TIFF that Pillow itself reads wrongly, which has to be given by its path.
    """
    if tiff.is_garbled(image):
        raise UserError(
            f"{name}: Pillow reads a TIFF of planes with more than 8 bits in wrong colours; give "
            "the path of the file in place of the opened image"
        )
    pixels = _pixels(image, name)  # first: Pillow turns a TIFF as it loads it
    return _tensor(_turned(pixels, _orientation(image)))


def _tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)


def _orientation(image: Image.Image) -> int:
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """``[H, W, ...]`` as it is to be seen, by the orientation of EXIF and TIFF (1: as it is)."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _pixels(image: Image.Image, name: str | Path) -> np.ndarray:
    """uint8 ``[H, W, 3]``, not turned; converted in stripes, for the sake of large images."""
    image.load()
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(eight_bits(np.asarray(image), name, white=_stated_white(image)))
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    rows = max(1, _STRIPE // max(1, width))
    for top in range(0, height, rows):
        box = (0, top, width, min(top + rows, height))
        part = image if rows >= height else image.crop(box)
        pixels[top : top + rows] = np.asarray(_to_rgb(part))
    return pixels


def _stated_white(image: Image.Image) -> int | None:
    if image.format == "PPM":  # Pillow has scaled integers, by the maximum that the file states
        return None if image.mode == "F" else 65535
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(ExifTags.Base.BitsPerSample, (16,))
    return tiff.stated_white(bits[0], _first(tags.get(ExifTags.Base.MaxSampleValue)))


def _first(value: object) -> int | None:
    return value[0] if isinstance(value, tuple) else value


def _deep_png(image: Image.Image, path: Path) -> Image.Image | None:
    """A PNG with 16 bits in several channels, scaled; Pillow would cut off the low bytes."""
    layout = str(image.tile[0].args) if image.format == "PNG" and image.tile else ""
    if layout not in ("RGB;16B", "RGBA;16B", "LA;16B") or "transparency" in image.info:
        return None
    if not hasattr(torch.ops.image, "decode_png"):  # a torchvision without libpng
        return None
    samples = decode_image(read_file(str(path)), mode="UNCHANGED").permute(1, 2, 0).numpy()
    colours = 1 if samples.shape[2] == 2 else 3
    pixels = eight_bits(samples[..., :colours], path)
    if samples.shape[2] > colours:
        alpha = eight_bits(samples[..., colours:], path, white=65535)
        pixels = np.concatenate([pixels, alpha], 2)
    return Image.fromarray(pixels)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def read_annotation(
    path: str | Path,
    *,
    num_classes: int,
    size: tuple[int, int],
    source: str = CLASSES_FILE,
) -> Tensor:
    """Read a map of class indices from an 8-bit palette or grayscale image.

    Its own EXIF orientation is applied, as that of images is.

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
    path = Path(path)
    _check_kind(path)
    with _reading(path, "annotation"), _open(path) as mask:
        _check_size(path, mask.size)
        if mask.mode not in ("P", "L", "1"):
            raise UserError(
                f"{path}: expected an index image (8-bit palette or grayscale, one class index"
                f" a pixel), it is {mask.mode}; {_to_indices(mask)}"
            )
        step = _gray_step(mask)
        labels = np.array(mask).astype(np.uint8) // step
        labels = np.ascontiguousarray(_turned(labels, _orientation(mask)))
    if labels.shape != tuple(size):
        turned = labels.shape == tuple(size)[::-1]
        hint = "; has one of the two an EXIF orientation that the other lacks?" if turned else ""
        raise UserError(
            f"{path}: expected the size of its image, {size[1]} x {size[0]} pixels,"
            f" it has {labels.shape[1]} x {labels.shape[0]}{hint}"
        )
    wrong = labels[(labels >= num_classes) & (labels != VOID)]
    if wrong.size:
        raise UserError(
            f"{path}: holds index {int(wrong.max())}, {source.format(num_classes)}"
            f" (0 to {num_classes - 1}; {VOID} is void){_grey_levels(labels)}"
        )
    return torch.from_numpy(labels)


def _to_indices(mask: Image.Image) -> str:
    """What to do with a mask that is no index image."""
    channels = np.asarray(mask)
    if channels.ndim == 2:
        return "if it holds indices, save them in 8 bits"
    if all(
        (channels[..., 0] == channels[..., i]).all() for i in range(1, min(3, channels.shape[2]))
    ):
        return "its channels are equal: save one of them"
    return "write each colour's class index instead"


def _grey_levels(labels: np.ndarray) -> str:
    """A hint for masks in steps, such as 0, 128 and 255."""
    values = np.unique(labels).tolist()
    if not 2 <= len(values) <= 6:
        return ""
    return (
        f"; its values are {', '.join(map(str, values))}: if they are grey levels, write the "
        f"classes' indices 0, 1, ... instead"
    )


def _gray_step(mask: Image.Image) -> int:
    """PIL stretches 2- and 4-bit grayscale to 0..255; one index is then this many levels."""
    raw_modes = {str(tile[3][0] if isinstance(tile[3], tuple) else tile[3]) for tile in mask.tile}
    return 85 if "L;2" in raw_modes else 17 if "L;4" in raw_modes else 1
