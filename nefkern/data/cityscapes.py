"""Cityscapes, finely annotated: 27 classes (label ids 7 to 33) or the benchmark's 19."""

from __future__ import annotations

from pathlib import Path

from nefkern.data.benchmark import Benchmark, ClassSet, Part, split_folder
from nefkern.data.constants import VOID
from nefkern.data.folder import visible_files
from nefkern.data.tables.cityscapes import LABELS
from nefkern.runtime.errors import UserError

_SITE = "from www.cityscapes-dataset.com (registration)"
_IMAGE, _LABELS = "_leftImg8bit", "_gtFine_labelIds"
_FIRST = 7  # ids below are void to everyone


def _images(home: Path, split: str) -> list[Path]:
    folder = split_folder(home / "leftImg8bit", split, {})
    paths = visible_files(folder, f"*/*{_IMAGE}.png")
    if not paths:
        raise UserError(f"{folder}: expected images <city>/*{_IMAGE}.png, none found")
    return paths


def _annotation(home: Path, image: Path) -> Path:
    split, city = image.parts[-3:-1]
    return home / "gtFine" / split / city / f"{image.stem.removesuffix(_IMAGE)}{_LABELS}.png"


def _class_set(class_of: tuple[int, ...]) -> ClassSet:
    """Classes in the order of their ids."""
    kept = [label for label, index in zip(LABELS, class_of, strict=True) if index != VOID]
    return ClassSet(tuple(k[0] for k in kept), tuple(k[2] for k in kept), class_of)


#: ``leftImg8bit/{split}/{city}``, ``gtFine/{split}/{city}``; annotations hold label ids.
CITYSCAPES = Benchmark(
    name="cityscapes",
    title="Cityscapes",
    homes=("",),
    images=Part("leftImg8bit", f"leftImg8bit_trainvaltest.zip {_SITE}"),
    annotations=Part("gtFine", f"gtFine_trainvaltest.zip {_SITE}"),
    counts={"train": (2_975,), "val": (500,)},
    find_images=_images,
    annotation_of=_annotation,
    class_sets={
        27: _class_set((*[VOID] * _FIRST, *range(len(LABELS) - _FIRST))),
        19: _class_set(tuple(train_id for _, train_id, _ in LABELS)),
    },
)
