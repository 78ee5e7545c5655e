"""The 20 object classes of Pascal VOC, and the colours that its annotation files bring."""

from __future__ import annotations

NAMES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip


def colour(index: int) -> tuple[int, int, int]:
    """The palette's entry: bits 0, 1, 2 of the index are the highest of red, green, blue, bits 3,
    4, 5 the next, and so on."""
    return tuple(
        sum((index >> 3 * place + channel & 1) << 7 - place for place in range(3))
        for channel in range(3)
    )


COLOURS = tuple(colour(index) for index in range(len(NAMES) + 1))
"""RGB of the background and of :data:`NAMES`."""
