"""Pascal VOC 2012 segmentation: 21 classes with background, or the 20 objects."""

from __future__ import annotations

from pathlib import Path

from nefkern.data.benchmark import Benchmark, ClassSet, Part, listed
from nefkern.data.constants import VOID
from nefkern.data.tables.voc import COLOURS, NAMES
from nefkern.runtime.errors import UserError

_SOURCE = "VOCtrainval_11-May-2012.tar from host.robots.ox.ac.uk/pascal/VOC"
_SPLITS = ("train", "val", "trainval")
_LISTS = "ImageSets/Segmentation"


def _images(home: Path, split: str) -> list[Path]:
    path = home / _LISTS / f"{split}.txt"
    if split not in _SPLITS or not path.is_file():
        raise UserError(
            f"split {split!r}: expected {', '.join(_SPLITS)}, and the file {split}.txt in"
            f" {path.parent}"
        )
    return [home / "JPEGImages" / f"{stem}.jpg" for stem in listed(path)]


def _annotation(home: Path, image: Path) -> Path:
    return home / "SegmentationClass" / f"{image.stem}.png"


#: ``JPEGImages``, ``SegmentationClass``; annotations hold 0 (background), 1 to 20, 255 (void).
VOC2012 = Benchmark(
    name="voc2012",
    title="Pascal VOC 2012",
    homes=("", "VOC2012", "VOCdevkit/VOC2012"),
    images=Part("JPEGImages", _SOURCE),
    annotations=Part("SegmentationClass", _SOURCE),
    counts={"train": (1_464,), "val": (1_449,)},
    find_images=_images,
    annotation_of=_annotation,
    folders=None,
    class_sets={
        21: ClassSet(("background", *NAMES), COLOURS, tuple(range(21))),
        20: ClassSet(NAMES, COLOURS[1:], (VOID, *range(20))),
    },
)
