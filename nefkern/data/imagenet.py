"""ImageNet (ILSVRC 2012): photographs to train on, without annotations (table 8)."""

from __future__ import annotations

import os
from pathlib import Path

from nefkern.data.benchmark import Benchmark, Part, split_folder
from nefkern.data.folder import image_files, is_image_name, subfolders


def _images(home: Path, split: str) -> list[Path]:
    folder = split_folder(home, split, {})
    synsets = subfolders(folder)
    if not synsets:
        return image_files(folder)  # the validation images as they are published
    return [path for synset in synsets for path in _listed(folder / synset)]


def _listed(folder: Path) -> list[Path]:
    """Images of ``folder`` by their names alone: 1.3 million files are not asked for each."""
    names = sorted(os.listdir(folder))
    return [folder / name for name in names if is_image_name(name)]


#: ``{train,val}/{synset}/*.JPEG``; the validation images may also lie in ``val`` itself.
IMAGENET = Benchmark(
    name="imagenet",
    title="ImageNet",
    homes=("", "ILSVRC/Data/CLS-LOC"),
    images=Part(
        "train",
        "ILSVRC2012_img_train.tar from image-net.org (registration),"
        " the archive of each synset in a folder of its name",
    ),
    counts={"train": (1_281_167,)},
    find_images=_images,
)
