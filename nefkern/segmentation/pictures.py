"""Segments to look at: colours, outlines, and files."""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torchvision.transforms.v2.functional import resize

from nefkern.runtime.files import replace_file

BACKGROUND = (0, 0, 0)
"""Colour of void and unmatched pixels; no colour of the palette is near it."""

LONGEST_PANEL = 2048
"""The longer side, in pixels, of an image as it is drawn: what a screen shows."""

GAP = 8
"""Pixels between panels."""

_OUTLINE = (255, 255, 255)


@functools.cache
def palette(n: int) -> np.ndarray:
    """``n`` colours that the eye tells apart, uint8 ``[n, 3]``, RGB; the same on every machine.

    Each colour is the one farthest from all before it in Oklab, where distance is what the eye
    sees, among colours neither too dark nor too pale for outlines and photographs to stand out.
    ``palette(m)`` therefore begins with ``palette(n)`` for every m > n. After some thousands, the
    colours repeat.
    """
    colours = _candidates()
    oklab = _oklab(colours)
    order = [int(np.argmin(np.square(colours.astype(int) - (30, 120, 200)).sum(1)))]
    distance = np.full(len(colours), np.inf)
    while len(order) < min(n, len(colours)):
        distance = np.minimum(distance, np.square(oklab - oklab[order[-1]]).sum(1))
        order.append(int(distance.argmax()))
    chosen = colours[np.resize(order, n)] if n else colours[:0]
    chosen.flags.writeable = False  # it is cached
    return chosen


def colorize(index: Tensor | np.ndarray, colours: np.ndarray | None = None) -> np.ndarray:
    """Paint an index map ``[H, W]``: uint8 ``[H, W, 3]``.

    Args:
        colours: uint8 ``[n, 3]``; default the palette up to the largest index. Negative indices
            and those beyond ``colours`` (void) are black.
    """
    index = _numpy(index)
    if colours is None:
        colours = palette(max(256, int(index.max(initial=-1)) + 1))
    table = np.concatenate([colours, np.array([BACKGROUND], np.uint8)])
    outside = (index < 0) | (index >= len(colours))
    return table[np.where(outside, len(colours), index)]


def boundaries(index: Tensor | np.ndarray) -> np.ndarray:
    """Pixels whose right or lower neighbour belongs to another segment: bool ``[H, W]``."""
    index = _numpy(index)
    edge = np.zeros(index.shape, bool)
    edge[:, :-1] |= index[:, :-1] != index[:, 1:]
    edge[:-1] |= index[:-1] != index[1:]
    return edge


def overlay(
    image: Tensor | np.ndarray | Image.Image,
    clusters: Tensor | np.ndarray,
    *,
    colours: np.ndarray | None = None,
    opacity: float = 0.5,
    longest: int = LONGEST_PANEL,
) -> Image.Image:
    """The picture "image | clusters | blend", side by side.

    A large image is drawn smaller, at a size to look at: the photograph averaged, of the clusters
    those at the centres of the pixels drawn.

    With hundreds of clusters some colours are close, so both painted panels carry one-pixel
    outlines.

    Args:
        image: uint8 RGB, ``[3, H, W]`` as a tensor or ``[H, W, 3]`` as an array, or a PIL image.
        clusters: index map ``[H, W]``.
        opacity: of the colours in the blend.
        longest: the longer side of each of the three at most, in pixels.

    Raises:
        ValueError: the sizes differ.
    """
    photo = _rgb(image)
    clusters = _numpy(clusters)
    if photo.shape[:2] != clusters.shape:
        raise ValueError(f"image is {photo.shape[:2]} (H, W) but clusters {clusters.shape}")
    photo, clusters = shrunk(photo, clusters, longest=longest)
    painted = colorize(clusters, colours)
    blend = ((1 - opacity) * photo + opacity * painted).round().astype(np.uint8)
    edge = boundaries(clusters)
    painted[edge], blend[edge] = BACKGROUND, _OUTLINE
    return grid([[photo, painted, blend]])


def shrunk(
    photo: np.ndarray, *maps: np.ndarray, longest: int = LONGEST_PANEL
) -> tuple[np.ndarray, ...]:
    """A photograph and its index maps at a size to look at, in their proportions.

    Args:
        photo: uint8 ``[H, W, 3]``; it is averaged.
        maps: ``[H, W]`` each; what is at the centres of the new pixels is taken.
        longest: the longer side at most, in pixels.
    """
    shape = photo.shape[:2]
    scale = longest / max(*shape, 1)
    if scale >= 1:
        return (photo, *maps)
    size = [max(1, round(side * scale)) for side in shape]
    rows, cols = (
        (np.arange(short) * 2 + 1) * long // (2 * short)
        for short, long in zip(size, shape, strict=True)
    )
    small = resize(torch.from_numpy(photo).permute(2, 0, 1), size, antialias=True)
    small = small.permute(1, 2, 0).contiguous().numpy()
    return (small, *(index[rows][:, cols] for index in maps))


def grid(rows: Sequence[Sequence[np.ndarray | Image.Image]]) -> Image.Image:
    """Rows of pictures on white, in columns as wide as their widest picture."""
    pictures = [[Image.fromarray(_rgb(p)) for p in row] for row in rows]
    columns = max(len(row) for row in pictures)
    widths = [max(row[i].width for row in pictures if i < len(row)) for i in range(columns)]
    heights = [max(p.height for p in row) for row in pictures]
    sheet = Image.new(
        "RGB",
        (sum(widths) + GAP * (columns - 1), sum(heights) + GAP * (len(rows) - 1)),
        "white",
    )
    top = 0
    for row, height in zip(pictures, heights, strict=True):
        left = 0
        for picture, width in zip(row, widths, strict=False):
            sheet.paste(picture, (left, top))
            left += width + GAP
        top += height + GAP
    return sheet


def index_image(clusters: Tensor | np.ndarray, num_clusters: int | None = None) -> Image.Image:
    """An index map as an image whose pixel values are the indices.

    Up to 256 clusters become a palette image, which viewers show in colour; more become 16-bit
    grey.

    Args:
        clusters: ``[H, W]``.
        num_clusters: how many there are in all images; default, as many as here.

    Raises:
        ValueError: an index below 0 or above 65535.
    """
    clusters = _numpy(clusters)
    low, high = int(clusters.min(initial=0)), int(clusters.max(initial=0))
    if low < 0 or high > 65535:
        raise ValueError(f"indices must lie in 0..65535, got {clusters.min()}..{clusters.max()}")
    if max(high + 1, num_clusters or 0) > 256:
        return Image.fromarray(clusters.astype(np.uint16))
    picture = Image.fromarray(clusters.astype(np.uint8))
    picture.putpalette(palette(256).tobytes())
    return picture


def _candidates() -> np.ndarray:
    """Colours of a 20³ lattice, neither dark nor pale nor glaring, uint8 ``[n, 3]``."""
    steps = np.linspace(0, 255, 20).round().astype(np.uint8)
    lattice = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    lightness, a, b = _oklab(lattice).T
    return lattice[(lightness > 0.4) & (lightness < 0.92) & (np.hypot(a, b) < 0.2)]


def _oklab(rgb: np.ndarray) -> np.ndarray:
    """sRGB (0-255) to Oklab (Ottosson 2020, "A perceptual color space for image processing")."""
    c = rgb.astype(np.float64) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    to_cones = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    to_lab = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    return np.cbrt(linear @ to_cones.T) @ to_lab.T


def write_png(picture: Image.Image, path: Path, text: Mapping[str, str] | None = None) -> None:
    """Write a PNG, perhaps with texts in it, in one step; errors as
    :func:`nefkern.runtime.files.replace_file`."""
    content, info = io.BytesIO(), PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value)
    # Photographs hardly shrink further at a higher level, and take half as long again.
    level = 1 if picture.mode == "RGB" else 6
    picture.save(content, format="PNG", compress_level=level, pnginfo=info)
    replace_file(path, content.getvalue())


def png_text(path: Path) -> dict[str, str]:
    """The texts in a PNG; none of what is no PNG."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            return dict(getattr(picture, "text", {}))
    except (OSError, ValueError, SyntaxError):
        return {}


def _numpy(index: Tensor | np.ndarray) -> np.ndarray:
    return index.detach().cpu().numpy() if isinstance(index, Tensor) else np.asarray(index)


def _rgb(image: Tensor | np.ndarray | Image.Image) -> np.ndarray:
    if isinstance(image, Image.Image):
        return np.array(image.convert("RGB"))
    if isinstance(image, Tensor):
        image = image.permute(1, 2, 0).cpu().to(torch.uint8).numpy()
    return np.ascontiguousarray(image)
