"""Data sets of rectangles in four colours, for the evaluate command to score."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("red", "green", "blue", "grey")
COLOURS = np.array([[200, 40, 40], [40, 190, 60], [50, 60, 210], [128, 128, 128]])


def scene(width: int, height: int, seed: int) -> tuple[Image.Image, Image.Image]:
    """Noisy rectangles in the colours of the classes, with their masks and a rim of void."""
    random = np.random.default_rng(seed)
    mask = np.full((height, width), 3, np.uint8)
    for _ in range(6):
        y, x = random.integers(0, height - 10), random.integers(0, width - 10)
        mask[y : y + random.integers(8, 40), x : x + random.integers(8, 40)] = random.integers(3)
    pixels = COLOURS[mask] + random.normal(0, 25, (height, width, 3))
    mask[:2] = 255
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), Image.fromarray(mask)


def write_folder(root: Path, images: dict[str, int]) -> Path:
    """An annotated data set with so many images a split."""
    root.mkdir()
    (root / "classes.txt").write_text("\n".join(CLASSES))
    for split, count in images.items():
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for n in range(count):
            image, mask = scene(70 + 5 * n, 90 - 4 * n, seed=100 * len(split) + n)
            image.save(root / "images" / split / f"{n}.png")
            mask.save(root / "annotations" / split / f"{n}.png")
    return root
