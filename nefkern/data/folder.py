"""A folder of the user's own images, with or without annotations."""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from nefkern.data.constants import IMAGE_SUFFIXES, VOID
from nefkern.data.dataset import ImageDataset, class_indices
from nefkern.runtime.errors import UserError

logger = logging.getLogger(__name__)

#: Of terminals, not of names: a class's name is printed in tables.
_MOST = 200
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")


def open_folder(
    root: Path,
    *,
    split: str,
    strict: bool = False,
    ignore_classes: Sequence[str | int] = (),
) -> ImageDataset:
    """Open ``root``, laid out in one of three ways.

    - ``images/{split}/*.jpg``, optional ``annotations/{split}/{same stem}.png``;
    - ``images/*.jpg``, optional ``annotations/{same stem}.png``: any split is all of it;
    - ``*.jpg``: any split is all of it, without annotations.

    ``classes.txt`` in ``root`` names the classes, one a line; annotations need it. Images in
    folders below these are not taken; a warning names the folders.

    Args:
        root: the folder.
        split: e.g. "train" or "val".
        strict: see :class:`ImageDataset`.
        ignore_classes: names or indices of classes to read as void.

    Raises:
        UserError: no such folder or split, no images in it, an image without annotation, a bad
            ``classes.txt``, an unknown class to ignore.
    """
    dataset, folder = folder_dataset(
        root, split=split, strict=strict, ignore_classes=ignore_classes
    )
    _warn_of_nested(folder)
    return dataset


def folder_dataset(
    root: Path,
    *,
    split: str,
    strict: bool = False,
    ignore_classes: Sequence[str | int] = (),
) -> tuple[ImageDataset, Path]:
    """What :func:`open_folder` returns, without its warning, and the folder of the images."""
    root = Path(root)
    need_folder(root)
    images, annotations = _layout(root, split)
    paths = image_files(images)
    annotation_paths = _annotation_files(paths, annotations) if annotations else None
    classes = _read_classes(root / "classes.txt", needed=annotation_paths is not None)
    dataset = ImageDataset(
        paths,
        annotation_paths=annotation_paths,
        classes=classes,
        ignored=class_indices(ignore_classes, classes),
        strict=strict,
    )
    return dataset, images


def need_folder(root: Path) -> None:
    """Raise a UserError unless ``root`` is a folder."""
    if not root.is_dir():
        what = "it is a file" if root.exists() else "it does not exist"
        raise UserError(f"data root {root}: expected a folder, {what}")


def _layout(root: Path, split: str) -> tuple[Path, Path | None]:
    """Folder of the images, and the one of their annotations if it exists."""
    images, annotations = root / "images", root / "annotations"
    if not images.is_dir():
        return root, None
    if split and (images / split).is_dir():
        images, annotations = images / split, annotations / split
    elif splits := subfolders(images):
        raise UserError(f"{images}: no split {split!r}, there is: {', '.join(splits)}")
    return images, annotations if annotations.is_dir() else None


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in ``folder``, sorted, hidden ones left out."""
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def visible_files(folder: Path, pattern: str) -> list[Path]:
    """What in ``folder`` is called so, sorted, without hidden files: macOS leaves one beside each
    file on a disk of another system (``._NAME``)."""
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))


def nested_images(folder: Path, wanted: Callable[[str], bool] = is_image_name) -> str | None:
    """A line that names the folders in ``folder`` with images in or below them; None without.

    Args:
        wanted: whether a file of this name is one of the images.
    """
    inside = [name for name in subfolders(folder) if _holds(folder / name, wanted)]
    if not inside:
        return None
    more = f" and {len(inside) - 5} more" if len(inside) > 5 else ""
    return f"{folder}: the images in folders inside are not taken: {', '.join(inside[:5])}{more}"


def _holds(folder: Path, wanted: Callable[[str], bool]) -> bool:
    return any(wanted(name) for _, _, names in os.walk(folder) for name in names)


@functools.cache
def _warn_of_nested(folder: Path) -> None:
    """Once a process: training opens its data set several times."""
    if line := nested_images(folder):
        logger.warning("%s", line)


def image_files(folder: Path) -> list[Path]:
    """Images directly in ``folder``, sorted; a UserError where there are none."""
    paths = sorted(path for path in folder.iterdir() if is_image_name(path.name) and path.is_file())
    if not paths:
        inside = ", ".join(subfolders(folder)[:5])
        hint = f" (but folders: {inside})" if inside else ""
        raise UserError(f"{folder}: expected images ({' '.join(IMAGE_SUFFIXES)}), none found{hint}")
    return paths


def _annotation_files(paths: Sequence[Path], folder: Path) -> list[Path]:
    files = [folder / f"{path.stem}.png" for path in paths]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise UserError(
            f"{missing[0]}: expected an annotation for every image,"
            f" {len(missing)} of {len(files)} missing"
        )
    return files


def _read_classes(path: Path, *, needed: bool) -> list[str]:
    if not path.is_file():
        if needed:
            raise UserError(f"{path}: annotations need this file, one class name a line")
        return []
    try:
        names = [line.strip() for line in path.read_text("utf-8-sig").rstrip().splitlines()]
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: expected UTF-8 text, one class name a line: {error}") from None
    _check_classes(path, names)
    return names


def _check_classes(path: Path, names: list[str]) -> None:
    if not names:
        raise UserError(f"{path}: expected one class name a line, the file is empty")
    if len(names) > VOID:
        raise UserError(f"{path}: expected at most {VOID} classes, it names {len(names)}")
    if "" in names:
        raise UserError(
            f"{path}: line {names.index('') + 1} is empty, expected a class name:"
            " the line number is the class index"
        )
    if bad := next((name for name in names if _CONTROL.search(name)), None):
        line = names.index(bad) + 1
        raise UserError(f"{path}: line {line}: expected text, it holds control characters")
    if long := next((name for name in names if len(name) > _MOST), None):
        line = names.index(long) + 1
        raise UserError(f"{path}: line {line}: expected at most {_MOST} characters")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(f"{path}: expected different names, repeated: {', '.join(repeated[:5])}")
