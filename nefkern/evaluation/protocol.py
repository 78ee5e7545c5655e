"""How the protocols of an evaluation cut images into windows."""

from __future__ import annotations

import argparse

from nefkern.baselines.comparison import Windows
from nefkern.runtime.errors import UserError
from nefkern.segmentation.segmenter import Segmenter
from nefkern.training.presets import PRESETS, WINDOWS


def windows(options: argparse.Namespace, segmenter: Segmenter) -> Windows:
    """What ``--protocol``, ``--size``, ``--window``, ``--stride`` and ``--resize`` ask for.

    crop320 has one window an image.

    Raises:
        UserError: a side below a patch of the backbone, a stride beyond the window.
    """
    if options.protocol == "crop320":
        _check_side("--size", options.size, segmenter)
        return Windows(options.size, options.size, options.batch_size)
    window, stride = _usual(options.data, segmenter)
    if options.window:
        _check_side("--window", options.window, segmenter)
        window, stride = options.window, -(-2 * options.window // 3)
    stride = options.stride or stride
    if stride > window:
        raise UserError(f"--stride {stride}: expected at most the window, {window}")
    return Windows(window, stride, options.batch_size, _shorter(options, segmenter))


def _shorter(options: argparse.Namespace, segmenter: Segmenter) -> int | None:
    """The shorter side that protocol B resizes images to; None leaves them as they are."""
    if options.resize == "none":
        return None
    if options.resize:
        _check_side("--resize", options.resize, segmenter)
    preset = PRESETS.get(options.data, {}).get("resize")
    return options.resize or preset or segmenter.options.base_size()


def _check_side(flag: str, side: int, segmenter: Segmenter) -> None:
    patch = segmenter.patch
    if side < patch:
        raise UserError(f"{flag} {side}: expected at least {patch}, a patch of the backbone")


def _usual(data: str, segmenter: Segmenter) -> tuple[int, int]:
    """Window and stride of the paper's data sets, on the patch grid; of others the run's own."""
    if data not in WINDOWS:
        return segmenter.window, segmenter.stride
    patch = segmenter.patch
    window, stride = (-(-side // patch) * patch for side in WINDOWS[data])
    return window, stride
