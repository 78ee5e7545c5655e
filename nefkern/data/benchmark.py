"""What published data sets have in common: a publisher's layout, labels, and expected counts."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nefkern.data.dataset import ImageDataset, class_indices
from nefkern.data.folder import need_folder, subfolders
from nefkern.runtime.errors import UserError

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class ClassSet:
    """One way to count classes.

    Attributes:
        names: of the classes.
        colours: RGB of each, as the publisher or custom has it.
        label_map: class of each index that the annotation files may hold, VOID where it is none.
    """

    names: tuple[str, ...]
    colours: tuple[Colour, ...]
    label_map: tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """A part of the publisher's layout.

    Attributes:
        folder: below the data set's home.
        source: the archive, and the site that has it.
    """

    folder: str
    source: str


@dataclass(frozen=True)
class Benchmark:
    """One of the published data sets.

    Attributes:
        name: as in ``--data``.
        title: the publisher's name for it.
        homes: where below the data root the layout may begin; "" is the root itself.
        images: the part with the images.
        annotations: the part with the annotations, if there are any.
        counts: images of each split when it is complete; several where several lists are in use.
        find_images: (home, split) to the image files, in a fixed order; raises UserError.
        annotation_of: (home, image file) to its annotation file.
        folders: a split's folder in both parts, where it is not called as the split; None where
            the parts have no folder for each split.
        class_sets: by number of classes; the first is the default.
    """

    name: str
    title: str
    homes: tuple[str, ...]
    images: Part
    counts: Mapping[str, tuple[int, ...]]
    find_images: Callable[[Path, str], list[Path]]
    annotations: Part | None = None
    annotation_of: Callable[[Path, Path], Path] | None = None
    folders: Mapping[str, str] | None = field(default_factory=dict)
    class_sets: Mapping[int, ClassSet] = field(default_factory=dict)

    def home(self, root: Path) -> Path:
        """Where the publisher's layout begins below ``root``.

        Raises:
            UserError: not found; names what was looked for, and the source of it.
        """
        need_folder(root)
        for home in self.homes:
            if (root / home / self.images.folder).is_dir():
                return root / home
        tried = " or ".join(str(Path(home) / self.images.folder) for home in self.homes)
        raise UserError(
            f"data root {root}: expected {self.title}, with the folder {tried};"
            f" get {self.images.source}"
        )

    def classes(self, count: int | None) -> ClassSet | None:
        """The class set of ``count`` classes; None where the data set has no classes.

        Raises:
            UserError: it has none of that many.
        """
        if count is None:
            return next(iter(self.class_sets.values()), None)
        if count not in self.class_sets:
            known = " or ".join(map(str, sorted(self.class_sets))) or "no"
            raise UserError(f"{count} classes: {self.name} has {known} classes")
        return self.class_sets[count]

    def annotation_files(self, home: Path, split: str, images: Sequence[Path]) -> list[Path] | None:
        """Where each image's annotation belongs; None without the part, or the split in it."""
        if self.annotations is None or self.annotation_of is None:
            return None
        folder = home / self.annotations.folder
        if self.folders is not None:
            folder /= self.folders.get(split, split)
        if not folder.is_dir():
            return None
        return [self.annotation_of(home, image) for image in images]


def open_benchmark(
    benchmark: Benchmark,
    root: Path,
    *,
    split: str,
    classes: int | None = None,
    strict: bool = False,
    ignore_classes: Sequence[str | int] = (),
) -> ImageDataset:
    """Open one of the published data sets in its publisher's layout.

    Without its annotations (the whole part, or the split in it) it has none; without some of them
    it is damaged.

    Args:
        benchmark: which.
        root: the data root.
        split: "train" or "val".
        classes: number of classes, where there are several ways to count; None: the first way.
        strict: see :class:`ImageDataset`.
        ignore_classes: names or indices of classes to read as void.

    Raises:
        UserError: no such data set, split or number of classes, an image or an annotation that is
            missing, an unknown class to ignore.
    """
    chosen = benchmark.classes(classes)
    home = benchmark.home(Path(root))
    paths = _images(benchmark, home, root, split)
    annotations = benchmark.annotation_files(home, split, paths)
    _need(paths, "image", benchmark.images)
    _need(annotations or (), "annotation", benchmark.annotations)
    names = chosen.names if chosen else ()
    return ImageDataset(
        paths,
        annotation_paths=annotations,
        classes=names,
        label_map=chosen.label_map if chosen else None,
        colours=chosen.colours if chosen else (),
        ignored=class_indices(ignore_classes, names),
        strict=strict,
    )


def _images(benchmark: Benchmark, home: Path, root: Path, split: str) -> list[Path]:
    """The image files; of a split that should be there the error says how to find what is not."""
    try:
        return benchmark.find_images(home, split)
    except UserError as error:
        if split not in benchmark.counts:
            raise
        raise UserError(
            f"{error}; python -m nefkern.data check {benchmark.name} --data-root {root} says what "
            "is missing and where to get it"
        ) from None


def _need(files: Sequence[Path], kind: str, part: Part | None) -> None:
    missing = missing_files(files)
    if missing and part is not None:
        raise UserError(
            f"{missing[0]}: this {kind} is missing, {len(missing)} of {len(files)} are;"
            f" get {part.source}"
        )


def missing_files(files: Sequence[Path]) -> list[Path]:
    """Those that do not exist; each folder is listed once, which is faster than to ask for each."""
    present: dict[str, set[str]] = {}
    missing = []
    for file in files:
        folder, name = os.path.split(file)
        if folder not in present:
            present[folder] = _names(folder)
        if name not in present[folder]:
            missing.append(file)
    return missing


def _names(folder: str) -> set[str]:
    try:
        return set(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return set()


def listed(path: Path) -> list[str]:
    """The names in a list of images: the first word of every line that has one.

    Raises:
        UserError: there is none.
    """
    lines = path.read_text("utf-8-sig", errors="replace").splitlines()
    names = [line.split()[0] for line in lines if line.strip()]
    if not names:
        raise UserError(f"{path}: expected names of images, the file is empty")
    return names


def annotation_of_split(home: Path, image: Path) -> Path:
    """``annotations/{split}/NAME.png`` of ``images/{split}/NAME.jpg``."""
    return home / "annotations" / image.parent.name / f"{image.stem}.png"


def split_folder(parent: Path, split: str, folders: Mapping[str, str]) -> Path:
    """The folder of ``split`` in ``parent``.

    Args:
        folders: what splits' folders are called, where not as the splits.

    Raises:
        UserError: there is none; lists those there are.
    """
    folder = parent / folders.get(split, split)
    if not split or not folder.is_dir():
        names = {name: split for split, name in folders.items()}
        known = [names.get(name, name) for name in subfolders(parent)]
        raise UserError(f"{parent}: no split {split!r}, there is: {', '.join(known) or 'none'}")
    return folder
