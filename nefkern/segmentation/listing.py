"""Images in folders, what is written of them is called, and folders that grow."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from nefkern.data.constants import IMAGE_SUFFIXES
from nefkern.data.folder import is_image_name, nested_images
from nefkern.data.paths import numbered, numbers_apart
from nefkern.runtime.errors import UserError
from nefkern.runtime.files import shortened

log = logging.getLogger(__name__)

OVERLAY, CLUSTERS, CLASSES = ".overlay.png", ".clusters.png", ".classes.png"
CONFIDENCE = ".confidence.png"
EIGENMAPS = ".eigenmaps.png"
WRITTEN = (OVERLAY, CLUSTERS, CLASSES, CONFIDENCE, ".legend.png", EIGENMAPS)
"""How the names of what is written end."""

Listed = tuple[Path, Path]
"""An image file, and the folder below ``--out`` for what is written of it."""


def image_files(given: list[Path], *, recursive: bool = False) -> list[Path]:
    """The files, and the images in the folders, in order, without what commands wrote there.

    Args:
        given: files and folders.
        recursive: take the images in folders inside the folders too; without it a warning names
            those folders.

    Raises:
        UserError: a folder without images.
    """
    return [file for file, _ in listed_files(given, recursive=recursive)]


def listed_files(given: list[Path], *, recursive: bool, may_be_empty: bool = False) -> list[Listed]:
    """:func:`image_files` with the folder for each; folders without images may be allowed."""
    found: list[Listed] = []
    for path in given:
        if not path.is_dir():
            found.append((path, Path()))
            continue
        inside = list(_images_in(path, recursive=recursive))
        if not recursive:
            _tell_nested(path, empty=not inside and not may_be_empty)
        if not inside and not may_be_empty:
            suffixes = " ".join(IMAGE_SUFFIXES)
            raise UserError(f"{path}: no images in this folder ({suffixes})")
        found += inside
    return found


def _images_in(root: Path, *, recursive: bool) -> Iterator[Listed]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if recursive and not _is_left_out(folder, f))
        for name in sorted(filter(_is_wanted, names)):
            yield Path(folder, name), Path(folder).relative_to(root)


def _is_left_out(folder: str, name: str) -> bool:
    """Whether a folder is hidden, or holds index images as ``--formats voc`` writes them."""
    return name.startswith(".") or Path(folder, name, "labelmap.txt").is_file()


def _is_wanted(name: str) -> bool:
    return is_image_name(name) and not name.endswith(WRITTEN)


def _tell_nested(folder: Path, *, empty: bool) -> None:
    line = nested_images(folder, _is_wanted)
    if line and empty:
        raise UserError(f"{line}, and there are none beside them; --recursive takes them")
    if line:
        log.warning("%s; --recursive takes them too", line)


def output_names(
    files: list[Path], folders: list[Path] | None = None, taken: set[str] | None = None
) -> list[str]:
    """A name for each file: its stem; with the suffix, then a number, where two would agree. The
    end of a very long one is left out.

    Args:
        files: in any number; the time is linear in it.
        folders: of each, below ``--out``; default, ``--out`` itself.
        taken: names given before; the new ones are added.
    """
    folders = folders or [Path()] * len(files)
    stems = [
        str(folder / shortened(file.stem)) for file, folder in zip(files, folders, strict=True)
    ]
    shared = Counter(stems)
    taken = set() if taken is None else taken
    names = [
        stem if shared[stem] == 1 and stem not in taken else str(folder / shortened(file.name))
        for file, folder, stem in zip(files, folders, stems, strict=True)
    ]
    return [numbered(*pair) for pair in zip(names, numbers_apart(names, taken), strict=True)]


State = tuple[int, int]
"""Size and time of a file; of one that is gone, zeros."""


class Watch:
    """Images that come into folders, once each, when they are there whole.

    A file is taken when it has the same size and time as at the look before; one that could not be
    read is taken again when it has changed.

    Args:
        look: lists what is there.
        seen: what needs no second look.
        seconds: between two looks.
    """

    def __init__(
        self, look: Callable[[], list[Listed]], seen: list[Listed], seconds: float
    ) -> None:
        self._look, self._seconds = look, seconds
        self._done = {file for file, _ in seen}
        self._failed: dict[Path, State] = {}
        self._last = {file: _state(file) for file, _ in seen}

    def fail(self, file: Path) -> None:
        """Hear that a file could not be read as it was when last looked at, or ``seen``."""
        self._done.discard(file)
        self._failed[file] = self._last[file]

    def next(self) -> list[Listed]:
        """Wait, and tell what has come since the call before; perhaps nothing."""
        time.sleep(self._seconds)
        there = [one for one in self._look() if one[0] not in self._done]
        states = {file: _state(file) for file, _ in there}
        come = [one for one in there if self._is_whole(one[0], states[one[0]])]
        self._last = states
        self._done |= {file for file, _ in come}
        return come

    def _is_whole(self, file: Path, state: State) -> bool:
        return bool(state[0]) and state == self._last.get(file) != self._failed.get(file)


def _state(file: Path) -> State:
    try:
        found = file.stat()
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns
