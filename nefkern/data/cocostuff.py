"""COCO-Stuff, its labels in 27 groups: the benchmark of IIC, PiCIE, STEGO and their successors.

Where their lists lie beside the images, ``curated/{train,val}2017/Coco164kFull_Stuff_Coarse_7.txt``
(49,629 and 2,175 images, those that are mostly stuff), they are taken; else all of COCO 2017.
"""

from __future__ import annotations

from pathlib import Path

from nefkern.data.benchmark import (
    Benchmark,
    ClassSet,
    Part,
    annotation_of_split,
    listed,
    split_folder,
)
from nefkern.data.folder import image_files
from nefkern.data.tables.cocostuff import CLASS_OF_LABEL, COLOURS, NAMES

_FOLDERS = {"train": "train2017", "val": "val2017"}
_LIST = "Coco164kFull_Stuff_Coarse_7.txt"


def _images(home: Path, split: str) -> list[Path]:
    folder = split_folder(home / "images", split, _FOLDERS)
    curated = home / "curated" / folder.name / _LIST
    if curated.is_file():
        return [folder / f"{stem}.jpg" for stem in listed(curated)]
    return image_files(folder)


#: ``{images,annotations}/{train2017,val2017}``; annotations hold 0 to 181 and 255 (void).
COCOSTUFF = Benchmark(
    name="cocostuff",
    title="COCO-Stuff",
    homes=("", "dataset", "cocostuff"),
    images=Part("images", "train2017.zip and val2017.zip from cocodataset.org"),
    annotations=Part(
        "annotations", "stuffthingmaps_trainval2017.zip from github.com/nightrome/cocostuff"
    ),
    counts={"train": (49_629, 118_287), "val": (2_175, 5_000)},
    find_images=_images,
    annotation_of=annotation_of_split,
    folders=_FOLDERS,
    class_sets={27: ClassSet(NAMES, COLOURS, CLASS_OF_LABEL)},
)
