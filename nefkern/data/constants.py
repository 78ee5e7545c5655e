"""Numbers the data package shares, each with its reason."""

from __future__ import annotations

VOID = 255
"""Index of pixels that count neither for nor against a prediction."""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
"""File names taken for images, whatever their case."""

EVAL_SIZE = 320
"""Side of protocol A's centre crop in pixels (section 4.1)."""

LONGEST = 16
"""Length in shorter sides to which an image is enlarged at most: a strip of a few pixels' width
would become thousands of windows."""

# Segmenter's augmentation (section 4.1), with the values mmsegmentation gives it.
RESIZE_RATIO = (0.5, 2.0)
"""The shorter side becomes the base size times a ratio drawn from this range."""

FLIP = 0.5
"""Probability of a horizontal flip."""

BRIGHTNESS = 32 / 255
"""Largest shift added to all channels, with full scale 1."""

CONTRAST = (0.5, 1.5)
"""Range of the factor on all channels."""

SATURATION = (0.5, 1.5)
"""Range of the factor on the HSV saturation."""

HUE = 0.1
"""Largest turn of the HSV hue, in full turns (36 degrees; OpenCV counts it as 18 of 180)."""
