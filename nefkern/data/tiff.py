"""TIFF files that Pillow reads wrongly or not at all: planes of 16 bits, floats, many bands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from nefkern.data.levels import eight_bits, tell_once
from nefkern.runtime.errors import UserError

if TYPE_CHECKING:
    from tifffile import TiffPage

_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: BigTIFF
_UNSIGNED = 1
_SEPARATE = 2
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _SEPARATED = 0, 1, 2, 5
_ASSOCIATED, _UNASSOCIATED = 1, 2
_BITS_PER_SAMPLE, _ORIENTATION, _MAX_SAMPLE_VALUE, _PLANAR_CONFIGURATION = 258, 274, 281, 284


def is_tiff(path: Path) -> bool:
    """Whether the file begins as a TIFF does; raises OSError where it cannot be read."""
    with open(path, "rb") as file:
        return file.read(4) in _MAGIC


def read_tiff(
    path: Path, check_size: Callable[[tuple[int, int]], None]
) -> tuple[Image.Image, int] | None:
    """A TIFF that Pillow is not to be trusted with.

    Args:
        path: the file.
        check_size: called with (width, height) before pixels are read.

    Returns:
        The first page in 8 bits, of mode L, LA, RGB, RGBA or CMYK, and its orientation (1 to 8);
        None where Pillow reads the file right.

    Raises:
        UserError: pixels that are none of an image, or a compression that needs imagecodecs.
    """
    import tifffile

    with tifffile.TiffFile(path) as file:
        if not len(file.pages):
            return None  # Pillow says what is wrong with it
        page = file.pages.first
        _tell_pages(path, file)
        if _pillow_reads(page):
            return None
        check_size((page.imagewidth, page.imagelength))
        try:
            samples = page.asarray()
        except ValueError as error:
            if "imagecodecs" not in str(error):
                raise
            if _pillow_reads_high_bytes(path, page):
                return None
            raise UserError(
                f"{path}: {_kind(page)} with {page.compression.name} compression: reading them "
                "needs the package imagecodecs, pip install imagecodecs"
            ) from None
        orientation = page.tags.valueof(_ORIENTATION, 1)
        return _as_image(path, page, _channels_last(path, page, samples)), int(orientation)


def is_garbled(image: Image.Image) -> bool:
    """Whether Pillow opened planes of more than 8 bits, which it takes for other colours."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS_PER_SAMPLE, (8,))
    return tags.get(_PLANAR_CONFIGURATION) == _SEPARATE and len(bits) > 1 and max(bits) > 8


def stated_white(bits: int, max_sample_value: int | None) -> int | None:
    """The value of white that a file's tags state, None where they leave it open.

    MaxSampleValue is the largest value *used*, which is not to affect how an image looks; it is
    taken for a depth only where it is that of a depth, such as 4095.
    """
    if bits < 16:
        return (1 << bits) - 1
    if bits == 16 and max_sample_value in [(1 << depth) - 1 for depth in range(9, 17)]:
        return max_sample_value
    return None


def _pillow_reads(page: TiffPage) -> bool:
    samples, kind = page.samplesperpixel, page.photometric
    if page.sampleformat != _UNSIGNED:
        return False
    if page.bitspersample <= 8:
        return samples <= 2 if kind in (_WHITE_IS_ZERO, _BLACK_IS_ZERO) else samples <= 4
    return kind == _BLACK_IS_ZERO and samples == 1 and page.bitspersample in (12, 16)


def _pillow_reads_high_bytes(path: Path, page: TiffPage) -> bool:
    """16-bit RGB pixel by pixel, of which Pillow takes the high bytes; not if they are all low."""
    if page.photometric != _RGB or page.bitspersample != 16 or page.sampleformat != _UNSIGNED:
        return False
    if page.planarconfig == _SEPARATE or page.samplesperpixel > 4:
        return False
    with Image.open(path) as image:
        return max(high for _, high in image.convert("RGB").getextrema()) >= 64


def _tell_pages(path: Path, file: object) -> None:
    pages = file.pages
    if len(pages) > 1 and pages[1].shape == pages.first.shape:  # others: a pyramid, a thumbnail
        tell_once("pages", f"{path}: {len(pages)} pages, the first is taken")


def _kind(page: TiffPage) -> str:
    return f"{page.samplesperpixel} samples of {page.bitspersample} bits a pixel"


def _channels_last(path: Path, page: TiffPage, samples: np.ndarray) -> np.ndarray:
    if page.axes == "YX":
        return samples[..., None]
    if page.axes == "SYX":
        return np.moveaxis(samples, 0, 2)
    if page.axes == "YXS":
        return samples
    raise UserError(f"{path}: expected a plane of pixels, it has the axes {page.axes}")


def _as_image(path: Path, page: TiffPage, samples: np.ndarray) -> Image.Image:
    kind, count = page.photometric, samples.shape[2]
    if kind not in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _SEPARATED):
        raise UserError(
            f"{path}: {_kind(page)} of the kind {page.photometric.name}; expected gray, RGB or CMYK"
        )
    colours = {_RGB: 3, _SEPARATED: 4}.get(kind, 3 if count >= 3 else 1)
    if colours > count or (kind == _SEPARATED and count > 4):
        raise UserError(f"{path}: {_kind(page)} are no {page.photometric.name} image")
    alpha = next(iter(page.extrasamples), 0) if count == colours + 1 else 0
    has_alpha = alpha in (_ASSOCIATED, _UNASSOCIATED)
    if count > colours + has_alpha and kind != _RGB and count > 2:
        tell_once(
            "bands",
            f"{path}: {count} bands, the first three are taken for red, green and blue (others: "
            "gdal_translate -b 4 -b 3 -b 2 makes a file of the ones you choose)",
        )
    white = stated_white(page.bitspersample, page.tags.valueof(_MAX_SAMPLE_VALUE))
    if page.sampleformat != _UNSIGNED:
        white = None
    pixels = eight_bits(samples[..., :colours], path, white=white)
    if kind == _WHITE_IS_ZERO:
        pixels = 255 - pixels
    mode = {1: "L", 3: "RGB", 4: "CMYK"}[colours]
    if has_alpha and kind != _SEPARATED:
        pixels = np.concatenate(
            [pixels, eight_bits(samples[..., colours:], path, white=white, quiet=True)], 2
        )
        mode += "a" if alpha == _ASSOCIATED else "A"
    size = (samples.shape[1], samples.shape[0])
    return Image.frombuffer(mode, size, np.ascontiguousarray(pixels), "raw", mode, 0, 1)
