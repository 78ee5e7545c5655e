"""Pascal Context: 59 classes, or 60 with background.

Splits: train and val are VOC2010's of the detection task, ``ImageSets/Main/{train,val}.txt``, 4,998
and 5,105 images, together the 10,103 that are annotated; where
``ImageSets/SegmentationContext/{train,val}.txt`` exist, mmsegmentation's lists (4,996 and 5,104,
from the Detail API's trainval_merged.json), they are taken instead.

Annotations are read from ``SegmentationClassContext/*.png``: 0 is background, 1 to 59 the classes
in the order of their labels. ``python -m nefkern.data prepare pascal_context`` writes them from the
publisher's .mat files, mmsegmentation's converter writes the same.
"""

from __future__ import annotations

from pathlib import Path

from nefkern.data.benchmark import Benchmark, ClassSet, Part, listed
from nefkern.data.constants import VOID
from nefkern.data.tables.pascal_context import BACKGROUND_COLOUR, COLOURS, NAMES
from nefkern.runtime.errors import UserError

ANNOTATIONS = "SegmentationClassContext"
MAT_SOURCE = "trainval.tar.gz from cs.stanford.edu/~roozbeh/pascal-context"


def _images(home: Path, split: str) -> list[Path]:
    # Lists by class hold a second column.
    stems = listed(_split_file(home, split))
    return [home / "JPEGImages" / f"{stem}.jpg" for stem in stems]


def _split_file(home: Path, split: str) -> Path:
    folders = [home / "ImageSets" / name for name in ("SegmentationContext", "Main")]
    for folder in folders:
        if split in ("train", "val", "trainval") and (folder / f"{split}.txt").is_file():
            return folder / f"{split}.txt"
    raise UserError(
        f"split {split!r}: expected train, val or trainval, and the file {split}.txt in"
        f" {' or '.join(map(str, folders))}"
    )


def _annotation(home: Path, image: Path) -> Path:
    return home / ANNOTATIONS / f"{image.stem}.png"


PASCAL_CONTEXT = Benchmark(
    name="pascal_context",
    title="Pascal Context",
    homes=("", "VOC2010", "VOCdevkit/VOC2010"),
    images=Part("JPEGImages", "VOCtrainval_03-May-2010.tar from host.robots.ox.ac.uk/pascal/VOC"),
    annotations=Part(
        ANNOTATIONS, f"{MAT_SOURCE}, then python -m nefkern.data prepare pascal_context"
    ),
    counts={"train": (4_998, 4_996), "val": (5_105, 5_104)},
    find_images=_images,
    annotation_of=_annotation,
    folders=None,
    class_sets={
        59: ClassSet(NAMES, COLOURS, (VOID, *range(59))),
        60: ClassSet(("background", *NAMES), (BACKGROUND_COLOUR, *COLOURS), tuple(range(60))),
    },
)
