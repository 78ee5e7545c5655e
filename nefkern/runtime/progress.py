"""Progress bars over images and frames."""

from __future__ import annotations

from tqdm import tqdm

#: tqdm's own format, with the rate always in seconds an image, fast or slow.
_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_inv_fmt}]"


def image_bar(total: int, title: str | None = None, *, disable: bool | None = None) -> tqdm:
    """A bar of images done, and seconds an image.

    Args:
        total: images in all.
        title: what is done to them.
        disable: show nothing; None: where standard error is not a terminal.
    """
    return tqdm(total=total, desc=title, unit="image", bar_format=_FORMAT, disable=disable)


def frame_bar(total: int, title: str) -> tqdm:
    """A bar of a video's frames; ``total`` 0: unknown. Nothing where standard error is not a
    terminal."""
    return tqdm(total=total or None, desc=title, unit="frame", leave=False, disable=None)
