"""Tiny data sets in their publishers' layouts, with annotations that hold chosen labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image

WIDTH, HEIGHT = 40, 30


def labels_of(values: list[int], dtype=np.uint8) -> np.ndarray:
    """``[30, 40]`` in columns: column x holds values[x % len(values)]."""
    return np.tile(np.resize(values, WIDTH), (HEIGHT, 1)).astype(dtype)


def write_image(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
    Image.fromarray(pixels).save(path, "JPEG" if path.suffix.lower() != ".png" else "PNG")
    return path


def write_labels(path: Path, values: list[int]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels_of(values)).save(path)
    return path


def write_mat(path: Path, values: list[int], name: str = "LabelMap", dtype=np.uint16) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, {name: labels_of(values, dtype)})
    return path


def cityscapes(root: Path, values: list[int]) -> Path:
    for split, cities in (("train", ("aachen", "ulm")), ("val", ("lindau",))):
        for number, city in enumerate(cities):
            frame = f"{city}_{number:06}_000019"
            write_image(root / "leftImg8bit" / split / city / f"{frame}_leftImg8bit.png", number)
            folder = root / "gtFine" / split / city
            write_labels(folder / f"{frame}_gtFine_labelIds.png", values)
            (folder / f"{frame}_gtFine_polygons.json").write_text("{}")
    return root


def ade20k(root: Path, values: list[int]) -> Path:
    for folder, count in (("training", 2), ("validation", 1)):
        for number in range(count):
            name = f"ADE_{folder[:5]}_{number:08}"
            write_image(root / "images" / folder / f"{name}.jpg", number)
            write_labels(root / "annotations" / folder / f"{name}.png", values)
    return root


def pascal_context(root: Path, values: list[int], home: str = "VOCdevkit/VOC2010") -> Path:
    """With .mat files only, and one image that no split names."""
    lists = root / home / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2008_000002\n2008_000003\n")
    (lists / "val.txt").write_text("2008_000007\n")
    for number in (2, 3, 7, 9):
        write_image(root / home / "JPEGImages" / f"2008_{number:06}.jpg", number)
    for number in (2, 3, 7):
        write_mat(root / "trainval" / f"2008_{number:06}.mat", values)
    return root


def imagenet(root: Path) -> Path:
    for synset, count in (("n02119789", 2), ("n01440764", 1)):
        for number in range(count):
            write_image(root / "train" / synset / f"{synset}_{number}.JPEG", number)
    return root
