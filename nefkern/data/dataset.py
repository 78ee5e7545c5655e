"""The data set every command works on: named images, perhaps with annotations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from nefkern.data.constants import VOID
from nefkern.data.images import CLASSES_FILE, read_annotation, read_image
from nefkern.data.paths import Names, Paths
from nefkern.runtime.errors import UserError


@dataclass(frozen=True)
class Sample:
    """One image of a data set.

    Attributes:
        name: unique in its data set, without a folder: fit for a file name.
        image: uint8 ``[3, H, W]``, RGB.
        annotation: uint8 ``[H, W]`` of class indices, 255 where void; None without annotations.
    """

    name: str
    image: Tensor
    annotation: Tensor | None = None


class ImageDataset(Dataset[Sample]):
    """Images and, for all of them or none, annotations; files are read when asked for.

    Args:
        paths: the image files.
        annotation_paths: one for each image, or None.
        classes: names of the classes.
        label_map: class of each index that annotation files may hold, VOID where it is none;
            None where the files hold the classes themselves.
        colours: RGB of each class as its publisher paints it; empty where there is no custom.
        ignored: indices of classes that are read as void.
        strict: whether training stops at an unreadable image instead of replacing it.

    Attributes:
        names: str, unique: the file name without its suffix, with it where two agree.
        annotated: whether samples have annotations.
        holds_classes: whether annotation files hold the classes themselves, without ``label_map``.
        paths, annotation_paths, classes, colours, ignored, strict: as given.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        annotation_paths: Sequence[Path] | None = None,
        classes: Sequence[str] = (),
        label_map: Sequence[int] | None = None,
        colours: Sequence[tuple[int, int, int]] = (),
        ignored: Sequence[int] = (),
        strict: bool = False,
    ) -> None:
        if annotation_paths is not None and len(annotation_paths) != len(paths):
            raise ValueError(
                f"annotation_paths: expected one for each of {len(paths)} images,"
                f" got {len(annotation_paths)}"
            )
        self.paths = Paths(paths)
        self.names = Names(self.paths)
        self.annotation_paths = None if annotation_paths is None else Paths(annotation_paths)
        self.classes = list(classes)
        self.colours = tuple(colours)
        self.ignored = sorted(set(ignored))
        self.strict = strict
        self.holds_classes = label_map is None
        self._label_source = CLASSES_FILE if label_map is None else "this data set has {} labels"
        labels = range(len(classes)) if label_map is None else label_map
        self._num_labels = len(labels)
        self._to_class = torch.full((256,), VOID, dtype=torch.uint8)
        for label, index in enumerate(labels):
            self._to_class[label] = VOID if index in self.ignored else index

    @property
    def annotated(self) -> bool:
        return self.annotation_paths is not None

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Sample:
        """Read one sample at full size.

        Raises:
            UserError: the image or its annotation cannot be used; a score must be over the
                whole set, so here nothing is skipped, strict or not.
        """
        image = self.image(index)
        return Sample(self.names[index], image, self._annotation(index, image))

    def image(self, index: int, *, min_side: int | None = None) -> Tensor:
        """Read one image alone; arguments and errors as :func:`nefkern.data.read_image`."""
        return read_image(self.paths[index], min_side=min_side)

    def _annotation(self, index: int, image: Tensor) -> Tensor | None:
        if self.annotation_paths is None:
            return None
        labels = read_annotation(
            self.annotation_paths[index],
            num_classes=self._num_labels,
            size=tuple(image.shape[1:]),
            source=self._label_source,
        )
        return self._to_class[labels.int()]


def class_indices(wanted: Sequence[str | int], classes: Sequence[str]) -> list[int]:
    """Indices of classes given by name, by index, or by an index written as text.

    Raises:
        UserError: no such class.
    """
    return [_class_index(item, classes) for item in wanted]


def _class_index(item: str | int, classes: Sequence[str]) -> int:
    if item in classes:
        return list(classes).index(item)
    index = int(item) if str(item).isdecimal() else -1
    if not 0 <= index < len(classes):
        known = ", ".join(classes) or "none: this data set has no classes"
        raise UserError(f"ignored class {item!r}: expected a name or an index of: {known}")
    return index
