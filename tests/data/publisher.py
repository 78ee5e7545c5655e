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


def voc2012(root: Path, values: list[int], home: str = "VOCdevkit/VOC2012") -> Path:
    """With one image that no split names, and the lists of another task beside."""
    for task, names in (("Segmentation", ("2007_000032\n2007_000039\n", "2007_000033\n")),
                        ("Main", ("2008_000002\n", "2008_000003\n"))):  # fmt: skip
        folder = root / home / "ImageSets" / task
        folder.mkdir(parents=True)
        for split, text in zip(("train", "val"), names, strict=True):
            (folder / f"{split}.txt").write_text(text)
    for number in (32, 33, 39, 99):
        write_image(root / home / "JPEGImages" / f"2007_{number:06}.jpg", number)
        write_labels(root / home / "SegmentationClass" / f"2007_{number:06}.png", values)
    return root


def cocostuff(root: Path, values: list[int], *, curated: bool = True) -> Path:
    """Three images for training and two for validation, of which lists name two and one."""
    for split, count in (("train2017", 3), ("val2017", 2)):
        stems = [f"{number:012}" for number in range(count)]
        for number, stem in enumerate(stems):
            write_image(root / "images" / split / f"{stem}.jpg", number)
            write_labels(root / "annotations" / split / f"{stem}.png", values)
        if curated:
            path = root / "curated" / split / "Coco164kFull_Stuff_Coarse_7.txt"
            path.parent.mkdir(parents=True)
            path.write_text("\n".join(stems[:-1]))
    return root


def potsdam(root: Path, values: list[int]) -> Path:
    """As others cut it: pieces as .mat files, with infra-red, and lists."""
    lists = {"labelled_train": ["0", "1"], "unlabelled_train": ["2"], "labelled_test": ["3"]}
    (root / "imgs").mkdir(parents=True)
    (root / "gt").mkdir()
    random = np.random.default_rng(0)
    for name, stems in lists.items():
        (root / f"{name}.txt").write_text("\n".join(stems) + "\n")
        for stem in stems:
            pixels = random.integers(0, 255, (HEIGHT, WIDTH, 4), np.uint8)
            scipy.io.savemat(root / "imgs" / f"{stem}.mat", {"img": pixels})
            if not name.startswith("unlabelled"):
                write_mat(root / "gt" / f"{stem}.mat", values, "gt", np.uint8)
    return root
