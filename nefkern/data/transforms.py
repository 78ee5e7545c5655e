"""Augmentation for training (Segmenter's, section 4.1) and the two evaluation protocols.

Everything works on uint8 tensors ``[3, H, W]`` with torchvision's v2 kernels. Randomness comes
from the generator that is passed in, never from global state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torchvision.transforms.v2.functional as F
from torch import Generator, Tensor
from torchvision.transforms.v2 import InterpolationMode

from nefkern.data.constants import (
    BRIGHTNESS,
    CONTRAST,
    EVAL_SIZE,
    FLIP,
    HUE,
    LONGEST,
    RESIZE_RATIO,
    SATURATION,
)
from nefkern.data.dataset import Sample
from nefkern.runtime.errors import UserError


class TrainTransform:
    """Random resize, crop, flip and photometric distortion to one square size.

    The image is scaled so that its shorter side is ``resize`` times a ratio drawn from
    ``ratio``, and a ``crop`` x ``crop`` window is drawn from that. Both are done in one
    resampling of just the window's pixels (bilinear, antialiased), so the cost depends on
    ``crop`` and not on the size of the scaled image; the window's edges fall on whole source
    pixels.

    Where the scaled image is smaller than the crop it is centred and continued by reflection,
    as often as needed. Neither a constant border nor extra enlargement is used: equal border
    pixels would be each other's nearest neighbours across the batch and win an eigenfunction
    of their own, and enlargement would blur beyond what ``ratio`` allows.

    Args:
        resize: base size of the shorter side, pixels.
        crop: side of the result, pixels.
        ratio: smallest and largest factor on ``resize``.
        flip: probability of a horizontal flip.
        photometric: whether colours are distorted, see :func:`photometric_distortion`.

    Raises:
        UserError: an argument out of range.
    """

    def __init__(
        self,
        resize: int,
        crop: int,
        ratio: tuple[float, float] = RESIZE_RATIO,
        flip: float = FLIP,
        photometric: bool = True,
    ) -> None:
        if resize < 1:
            raise UserError(f"resize: expected a positive number of pixels, got {resize}")
        if crop < 1:
            raise UserError(f"crop: expected a positive number of pixels, got {crop}")
        if not 0 < ratio[0] <= ratio[1]:
            raise UserError(f"resize ratio: expected 0 < low <= high, got {ratio[0]}, {ratio[1]}")
        if not 0 <= flip <= 1:
            raise UserError(f"flip: expected a probability from 0 to 1, got {flip}")
        self.resize, self.crop = resize, crop
        self.ratio, self.flip, self.photometric = tuple(ratio), flip, photometric

    def short_side(self, generator: Generator) -> int:
        """Draw the scaled image's shorter side; known before decoding, it lets JPEGs be read small.

        Returns:
            Pixels, at least 1.
        """
        return max(1, round(self.resize * _uniform(generator, *self.ratio)))

    def __call__(
        self, image: Tensor, generator: Generator, *, short_side: int | None = None
    ) -> Tensor:
        """Draw one view.

        Args:
            image: uint8 ``[3, H, W]``, any size from 1 x 1.
            generator: source of all randomness.
            short_side: a result of :meth:`short_side` with the same generator, else drawn here.

        Returns:
            uint8 ``[3, crop, crop]``, contiguous.
        """
        if short_side is None:
            short_side = self.short_side(generator)
        view = self._resized_crop(image, short_side, generator)
        if _uniform(generator) < self.flip:
            view = F.horizontal_flip(view)
        if self.photometric:
            view = photometric_distortion(view, generator)
        return _reflect_to(view, self.crop).contiguous()

    def _resized_crop(self, image: Tensor, short_side: int, generator: Generator) -> Tensor:
        scale = short_side / min(image.shape[1:])
        top, height, rows = self._window(image.shape[1], scale, generator)
        left, width, columns = self._window(image.shape[2], scale, generator)
        return _resize(F.crop(image, top, left, height, width), [rows, columns])

    def _window(self, length: int, scale: float, generator: Generator) -> tuple[int, int, int]:
        """Draw the window along one axis: first source pixel, source pixels, result pixels."""
        scaled = max(1, round(length * scale))
        start = int(_uniform(generator) * (max(0, scaled - self.crop) + 1))
        if scaled <= self.crop:
            return 0, length, scaled
        first = min(round(start / scale), length - 1)
        last = min(max(round((start + self.crop) / scale), first + 1), length)
        return first, last - first, self.crop


def _resize(image: Tensor, size: list[int]) -> Tensor:
    """Bilinear, antialiased; ``size`` is one number for the shorter side, or height and width.

    Channels last is the faster layout, and the only safe one: from channels first, torch 2.14
    fails for a result of one pixel (and for floats silently gets results one pixel wide wrong).
    """
    image = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return F.resize(image, size, InterpolationMode.BILINEAR, antialias=True)


def photometric_distortion(image: Tensor, generator: Generator) -> Tensor:
    """Distort brightness, contrast, saturation and hue, each with probability 1/2.

    As mmsegmentation's ``PhotoMetricDistortion``: a shift of all channels, a factor on them
    (before or after the colour steps, at random), a factor on the HSV saturation and a turn of
    the hue. Unlike there, the hue is not rounded to 180 levels and values are rounded once.

    Args:
        image: uint8 ``[3, H, W]``.
        generator: source of all randomness.

    Returns:
        uint8 ``[3, H, W]``.
    """
    brightness = _uniform(generator, -BRIGHTNESS, BRIGHTNESS) if _coin(generator) else 0.0
    contrast = _uniform(generator, *CONTRAST) if _coin(generator) else 1.0
    saturation = _uniform(generator, *SATURATION) if _coin(generator) else 1.0
    hue = _uniform(generator, -HUE, HUE) if _coin(generator) else 0.0
    contrast_first = _coin(generator)

    pixels = image.float().div_(255).add_(brightness).clamp_(0, 1)
    if contrast_first:
        pixels = pixels.mul_(contrast).clamp_(0, 1)
    if saturation != 1.0 or hue != 0.0:
        pixels = _saturate_and_turn(pixels, saturation, hue)
    if not contrast_first:
        pixels = pixels.mul_(contrast).clamp_(0, 1)
    return pixels.mul_(255).round_().to(torch.uint8)


def _saturate_and_turn(pixels: Tensor, saturation: float, hue: float) -> Tensor:
    """Scale the HSV saturation and turn the hue of RGB in [0, 1], without the trip through HSV.

    With value v, chroma c (v times the saturation) and hue h in sixths of a turn, each channel
    is v - c w(h + n), n = 5, 3, 1 for R, G, B, where w has period 6 and is the trapezoid
    0, 1, 1, 1, 0, 0 at 0, 1, ..., 5. With h in [-1.6, 5.6] only two periods of w are met, and
    both are clamp(2 - | |h + n - 5| - 3 |, 0, 1): no remainder, the slowest step, is needed.
    """
    red, green, blue = pixels
    value = pixels.amax(0)
    chroma = value - pixels.amin(0)
    divisor = chroma.clamp_min(1e-8)  # gray has no hue: its weight below is multiplied by 0
    turned = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    ).add_(6 * hue)
    chroma = torch.minimum(chroma * saturation, value)  # saturation ends at 1
    offset = pixels.new_tensor([5.0, 3.0, 1.0]).view(3, 1, 1)
    weight = (turned + (offset - 5)).abs_().sub_(3).abs_().neg_().add_(2).clamp_(0, 1)
    return value - weight.mul_(chroma)


def _reflect_to(image: Tensor, size: int) -> Tensor:
    """Centre in ``size`` x ``size``, continued by reflection about the edge pixels."""
    rows, columns = (_reflected(length, size, image.device) for length in image.shape[1:])
    if rows is not None:
        image = image[:, rows]
    return image if columns is None else image[:, :, columns]


def _reflected(length: int, size: int, device: torch.device) -> Tensor | None:
    """Indices into an axis of ``length`` that fill ``size``: 2 1 [0 1 2] 1 0; None if it fits."""
    if length >= size:
        return None
    period = max(1, 2 * (length - 1))
    position = (torch.arange(size, device=device) - (size - length) // 2) % period
    return torch.minimum(position, period - position) if length > 1 else position


def _uniform(generator: Generator, low: float = 0.0, high: float = 1.0) -> float:
    return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()


def _coin(generator: Generator) -> bool:
    return _uniform(generator) < 0.5


def resize_shorter(image: Tensor, side: int) -> Tensor:
    """Resize an image so that its shorter side is ``side`` pixels, the aspect ratio kept.

    Bilinear and antialiased. A strip is enlarged no further than to ``LONGEST`` times ``side``.

    Args:
        image: ``[3, H, W]``, uint8 or float.
        side: at least 1.

    Returns:
        The same dtype.

    Raises:
        UserError: ``side`` not positive.
    """
    size = (image.shape[1], image.shape[2])
    after = resized_shorter(size, side)
    return image if after == size else _resize(image, list(after))


def resized_shorter(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Height and width of an image of ``size`` after :func:`resize_shorter`; errors as there."""
    if side < 1:
        raise UserError(f"shorter side: expected a positive number of pixels, got {side}")
    short, long = sorted(size)
    scale = min(side / short, max(1.0, LONGEST * side / long))
    height, width = (max(1, round(length * scale)) for length in size)
    return height, width


def eval_transform(protocol: str, size: int = EVAL_SIZE) -> Callable[[Sample], Sample]:
    """The transform of an evaluation protocol (section 4.1).

    Args:
        protocol: "crop320" (protocol A): the shorter side resized to ``size``, bilinear and
            antialiased for the image, nearest for the annotation, then the centre
            ``size`` x ``size``; or "full" (protocol B): everything at its own resolution, where it
            is scored; the network sees the image after :func:`resize_shorter`.
        size: pixels, of "crop320" only.

    Returns:
        A function from :class:`Sample` to :class:`Sample` that leaves its argument unchanged.

    Raises:
        UserError: unknown protocol, or ``size`` not positive.
    """
    if protocol == "full":
        return lambda sample: sample
    if protocol != "crop320":
        raise UserError(f"protocol: expected 'crop320' or 'full', got {protocol!r}")
    if size < 1:
        raise UserError(f"evaluation size: expected a positive number of pixels, got {size}")
    return lambda sample: _centre(sample, size)


def _centre(sample: Sample, size: int) -> Sample:
    image = _resize(sample.image, [size])
    labels = sample.annotation
    if labels is not None:
        # NEAREST_EXACT takes the pixel under the centre, as PIL does; NEAREST is shifted.
        labels = F.resize(labels[None], [size], InterpolationMode.NEAREST_EXACT)
        labels = F.center_crop(labels, [size])[0].contiguous()
    return replace(sample, image=F.center_crop(image, [size]).contiguous(), annotation=labels)
