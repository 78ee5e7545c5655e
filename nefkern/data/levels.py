"""From samples of any depth to 8 bits: where white is, and what is told when nobody says."""

from __future__ import annotations

import logging
import math
import os

import numpy as np

from nefkern.runtime.errors import UserError

logger = logging.getLogger(__name__)

WHITE = "NEFKERN_WHITE"
"""Environment variable: the sample value that is white, for samples of more than 8 bits."""

_GUESSES = (255, 4095)  # 8 and 12 bits in 16
_FULL = 65535
_DARK = _FULL // 4
_ROWS = 1 << 22  # samples that are scaled at a time

_told: set[object] = set()


def tell_once(key: object, message: str) -> None:
    """Log a warning, once a process for each ``key``: a folder's files have their traits alike."""
    if key not in _told:
        _told.add(key)
        logger.warning("%s", message)


def eight_bits(
    samples: np.ndarray, name: object, *, white: float | None = None, quiet: bool = False
) -> np.ndarray:
    """Samples of any depth as uint8, black at 0.

    White is, in this order: ``$NEFKERN_WHITE``; what the file states; 1 for floating point; for
    integers 255 or 4095 where no sample exceeds it (8 or 12 bits in a file of 16, which would come
    out black), else 65535. It is never the image's own maximum: the images of a folder keep their
    brightness to each other. A guess is told, once a process.

    Args:
        samples: integers, booleans or floating point, of any shape.
        name: the file's, for messages.
        white: the value that the file states.
        quiet: tell nothing.

    Returns:
        uint8, of the same shape; uint8 samples as they are.

    Raises:
        UserError: NaN or complex numbers, samples below 0, floats beyond white, or integers of more
            than 16 bits without a stated white.
    """
    if samples.dtype == np.uint8:
        return samples
    if samples.dtype == bool:
        return samples.astype(np.uint8) * 255
    if samples.dtype.kind not in "uif":
        raise UserError(f"{name}: expected integers or floating point, it has {samples.dtype}")
    given = _given_white()
    white = given or white
    low, high = (samples.min(), samples.max()) if samples.size else (0, 0)
    if samples.dtype.kind == "f":
        _check_floats(name, float(low), float(high), white or 1.0, clipped=given is not None)
        return _scaled(samples, white or 1.0)
    low, high = int(low), int(high)
    if low < 0 or (white is None and high > _FULL):
        raise UserError(
            f"{name}: expected 8 or 16 bits a channel, it has values {low} to {high}; "
            f"{_way_out(low, high)}"
        )
    if white is None:
        white = next((guess for guess in _GUESSES if high <= guess), _FULL)
        if high and not quiet:
            _tell_guess(name, high, white)
    if high <= _FULL:
        return _scaled(np.arange(_FULL + 1), white)[samples]
    return _scaled(samples, white)


def _given_white() -> float | None:
    text = os.environ.get(WHITE, "")
    if not text:
        return None
    try:
        white = float(text)
    except ValueError:
        white = math.nan
    if not 0 < white < math.inf:
        raise UserError(f"{WHITE}={text}: expected a number above 0, the sample value of white")
    return white


def _check_floats(name: object, low: float, high: float, white: float, *, clipped: bool) -> None:
    if math.isnan(low) or math.isnan(high):
        raise UserError(
            f"{name}: floating-point pixels, some of them NaN (no data?); fill them in, e.g. by 0"
        )
    if low < 0 or (high > white and not clipped) or math.isinf(high):
        raise UserError(
            f"{name}: floating-point pixels, expected values from 0 to {white:g}, it has "
            f"{low:g} to {high:g}; {_way_out(low, high)}"
        )


def _way_out(low: float, high: float) -> str:
    if low < 0 or math.isinf(high):
        return "scale them to 8 or 16 bits"
    number = f"{high:g}" if isinstance(high, float) else high
    return f"say which is white, e.g. {WHITE}={number} in the environment"


def _tell_guess(name: object, high: int, white: int) -> None:
    if white < _FULL:
        tell_once(
            (WHITE, white),
            f"{name}: samples of more than 8 bits, none above {high:,}: read as "
            f"{white.bit_length()} bits, white at {white:,}; {WHITE}={_FULL} in the environment "
            "reads all 16, and another number sets white for all files",
        )
    elif high <= _DARK:
        tell_once(
            (WHITE, _DARK),
            f"{name}: 16 bits, but no sample above {high:,} of {_FULL:,}, so it is dark; is white "
            f"lower in these files? then e.g. {WHITE}={_DARK} in the environment (14 bits)",
        )


def _scaled(samples: np.ndarray, white: float) -> np.ndarray:
    """``samples`` · 255 / ``white``, rounded, at most 255; some rows at a time."""
    result = np.empty(samples.shape, np.uint8)
    step = max(1, _ROWS // max(1, samples[:1].size))
    for begin in range(0, len(samples), step):
        part = samples[begin : begin + step].astype(np.float64) * 255 / white + 0.5
        result[begin : begin + step] = part.clip(0, 255)
    return result
