"""Potsdam from the air (ISPRS), in pieces of 200 pixels: three classes, or the publisher's six.

``python -m nefkern.data prepare potsdam`` cuts the publisher's 38 pictures of 6,000 pixels into
pieces of 400, halves those, and takes the publisher's 24 pictures for training (5,400 pieces) and
its 14 for validation (3,150). From the pieces that IIC's authors cut likewise, and STEGO's pass on
as .mat files with lists, it writes those of the lists (7,695 and 855).
"""

from __future__ import annotations

from pathlib import Path

from nefkern.data.benchmark import Benchmark, ClassSet, Part, annotation_of_split, split_folder
from nefkern.data.folder import image_files

SOURCE = "2_Ortho_RGB.zip and 5_Labels_all.zip of Potsdam from www.isprs.org"
_PREPARED = f"{SOURCE}, then python -m nefkern.data prepare potsdam"

_SIX = {
    "impervious surfaces": (255, 255, 255),
    "building": (0, 0, 255),
    "low vegetation": (0, 255, 255),
    "tree": (0, 255, 0),
    "car": (255, 255, 0),
    "clutter": (255, 0, 0),
}
_THREE = {
    "roads and cars": (255, 255, 255),
    "buildings and clutter": (0, 0, 255),
    "vegetation": (0, 255, 0),
}

COLOURS = tuple(_SIX.values())
"""RGB of the six labels in the publisher's files."""


def _images(home: Path, split: str) -> list[Path]:
    return image_files(split_folder(home / "images", split, {}))


#: ``{images,annotations}/{train,val}``, as prepared; annotations hold 0 to 5 and 255 (void).
POTSDAM = Benchmark(
    name="potsdam",
    title="ISPRS Potsdam",
    homes=("",),
    images=Part("images", _PREPARED),
    annotations=Part("annotations", _PREPARED),
    counts={"train": (5_400, 7_695), "val": (3_150, 855)},
    find_images=_images,
    annotation_of=annotation_of_split,
    class_sets={
        3: ClassSet(tuple(_THREE), tuple(_THREE.values()), (0, 1, 2, 2, 0, 1)),
        6: ClassSet(tuple(_SIX), COLOURS, tuple(range(6))),
    },
)
