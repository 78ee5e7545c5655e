"""Small data sets on disk, made of a smooth colourful picture that resampling barely changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def _picture(width: int, height: int, phase: float = 0.0) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 17 + phase), np.cos(y / 13 - phase), np.sin((x + y) / 23 + 2 * phase)]
    pixels = np.stack([127.5 + 100 * wave for wave in waves], axis=-1)
    return Image.fromarray(pixels.round().astype(np.uint8))


def _truncate(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


@pytest.fixture(scope="session")
def picture() -> Callable[..., Image.Image]:
    """picture(width, height, phase=0): a smooth RGB image."""
    return _picture


@pytest.fixture(scope="session")
def truncate() -> Callable[[Path], None]:
    """truncate(path): drop the second half of a file."""
    return _truncate


@pytest.fixture
def images_folder(tmp_path: Path) -> Path:
    """Seven photographs of different sizes in a plain folder, a.jpg to g.jpg."""
    for number, letter in enumerate("abcdefg"):
        _picture(80 + 10 * number, 70, phase=number).save(tmp_path / f"{letter}.jpg")
    return tmp_path


@pytest.fixture
def annotated_folder(tmp_path: Path) -> Path:
    """Splits "train" (3) and "val" (2) with 3 classes; the top row of every mask is void."""
    (tmp_path / "classes.txt").write_text("sky\ntree\nroad sign\n")
    for split, count in (("train", 3), ("val", 2)):
        images, masks = tmp_path / "images" / split, tmp_path / "annotations" / split
        images.mkdir(parents=True)
        masks.mkdir(parents=True)
        for number in range(count):
            _picture(40, 30, phase=number).save(images / f"{split}{number}.png")
            labels = np.arange(40 * 30).reshape(30, 40) % 3
            labels[0] = 255
            Image.fromarray(labels.astype(np.uint8)).save(masks / f"{split}{number}.png")
    return tmp_path
