"""ADE20K as the scene parsing benchmark publishes it: 150 classes."""

from __future__ import annotations

from pathlib import Path

from nefkern.data.benchmark import Benchmark, ClassSet, Part, annotation_of_split, split_folder
from nefkern.data.constants import VOID
from nefkern.data.folder import image_files
from nefkern.data.tables.ade20k import COLOURS, NAMES

_SOURCE = "ADEChallengeData2016.zip from sceneparsing.csail.mit.edu"
_FOLDERS = {"train": "training", "val": "validation"}


def _images(home: Path, split: str) -> list[Path]:
    return image_files(split_folder(home / "images", split, _FOLDERS))


#: ``{images,annotations}/{training,validation}``; annotations hold 0 (void) and 1 to 150.
ADE20K = Benchmark(
    name="ade20k",
    title="ADE20K",
    homes=("", "ADEChallengeData2016"),
    images=Part("images", _SOURCE),
    annotations=Part("annotations", _SOURCE),
    counts={"train": (20_210,), "val": (2_000,)},
    find_images=_images,
    annotation_of=annotation_of_split,
    folders=_FOLDERS,
    class_sets={150: ClassSet(NAMES, COLOURS, (VOID, *range(150)))},
)
