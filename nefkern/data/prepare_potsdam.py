"""Potsdam's pictures, or the pieces that others cut of them, to index images, once."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from nefkern.data.benchmark import listed
from nefkern.data.constants import VOID
from nefkern.data.folder import need_folder, visible_files
from nefkern.data.images import read_image
from nefkern.data.potsdam import COLOURS, SOURCE
from nefkern.data.prepare import read_variable
from nefkern.runtime.errors import UserError
from nefkern.runtime.files import remove_parts, replace_file

#: Side of a piece before it is halved, and pieces in a row and a column of a picture.
_SIDE, _ACROSS = 400, 15

#: The publisher's pictures for testing: as in top_potsdam_2_13_RGB.tif.
_TESTED = frozenset((
    "2_13", "2_14", "3_13", "3_14", "4_13", "4_14", "4_15", "5_13", "5_14", "5_15", "6_13",
    "6_14", "6_15", "7_13",
))  # fmt: skip

#: The lists beside .mat files, and the split that each belongs to.
_LISTS = {
    "labelled_train.txt": "train",
    "unlabelled_train.txt": "train",
    "labelled_test.txt": "val",
}

Pair = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class _Work:
    """A source file to convert.

    Attributes:
        split: of what becomes of it.
        stems: names of what becomes of it, without suffix.
        read: gives an image uint8 ``[H, W, 3]`` and labels uint8 ``[H, W]`` for each name.
    """

    split: str
    stems: list[str]
    read: Callable[[], Iterator[Pair]]


def prepare_potsdam(root: Path) -> Path:
    """Write ``{images,annotations}/{train,val}/*.png``.

    From ``2_Ortho_RGB/top_potsdam_*_RGB.tif`` and ``5_Labels_all/top_potsdam_*_label.tif``
    (``Potsdam`` above them or not), or from ``imgs/*.mat``, ``gt/*.mat`` and the lists
    ``{labelled_train,unlabelled_train,labelled_test}.txt``; unlabelled pieces become void.

    Each file is written in one step and files that exist are left alone, so a run that was
    interrupted is finished by the next. A file that cannot be converted does not stop the others.

    Args:
        root: the data root, which is written into.

    Returns:
        The folder of the annotations.

    Raises:
        UserError: neither is there, or files could not be converted, the first of them named.
    """
    need_folder(root)
    works = _from_pieces(root) if (root / "imgs").is_dir() else _from_pictures(root)
    for part in ("images", "annotations"):
        for split in ("train", "val"):
            folder = root / part / split
            folder.mkdir(parents=True, exist_ok=True)
            remove_parts(folder)
    errors = []
    for work in tqdm(works, desc="converting", unit="file"):
        try:
            _convert(root, work)
        except UserError as error:
            errors.append(error)
    if errors:
        raise UserError(f"{errors[0]} ({len(errors)} of {len(works)} files not converted)")
    return root / "annotations"


def _convert(root: Path, work: _Work) -> None:
    targets = [
        [root / part / work.split / f"{stem}.png" for part in ("images", "annotations")]
        for stem in work.stems
    ]
    if all(target.exists() for pair in targets for target in pair):
        return
    for pair, found in zip(targets, work.read(), strict=True):
        for target, array in zip(pair, found, strict=True):
            replace_file(target, _png(array))


# ---- the publisher's pictures ----


def _from_pictures(root: Path) -> list[_Work]:
    """One work for each picture.

    Raises:
        UserError: no pictures, or one without its labels.
    """
    home = next((h for h in (root, root / "Potsdam") if (h / "2_Ortho_RGB").is_dir()), root)
    works = []
    for image in visible_files(home / "2_Ortho_RGB", "*_RGB.tif"):
        found = re.search(r"(\d+_\d+)_RGB$", image.stem)
        if found is None:
            raise UserError(f"{image}: expected a name such as top_potsdam_2_10_RGB.tif")
        labels = home / "5_Labels_all" / f"{image.stem.removesuffix('_RGB')}_label.tif"
        if not labels.is_file():
            raise UserError(f"{labels}: these labels are missing; get {SOURCE}")
        stems = [f"{found[1]}_{piece:03}" for piece in range(_ACROSS**2)]
        split = "val" if found[1] in _TESTED else "train"
        works.append(_Work(split, stems, lambda i=image, a=labels: _pieces(i, a)))
    if not works:
        raise UserError(
            f"{root}: expected 2_Ortho_RGB/*_RGB.tif or imgs/*.mat, none found; get {SOURCE}"
        )
    return works


def _pieces(image: Path, labels: Path) -> Iterator[Pair]:
    """Row by row, halved: the mean of four pixels, and the label of the first of them."""
    pixels, index = _whole(image), _indices(_whole(labels), labels)
    for top in range(0, _ACROSS * _SIDE, _SIDE):
        for left in range(0, _ACROSS * _SIDE, _SIDE):
            at = np.s_[top : top + _SIDE, left : left + _SIDE]
            piece = Image.fromarray(np.ascontiguousarray(pixels[at])).reduce(2)
            yield np.asarray(piece), index[at][::2, ::2]


def _whole(path: Path) -> np.ndarray:
    """A picture, uint8 ``[H, W, 3]``, large enough for all pieces."""
    found = read_image(path).permute(1, 2, 0).numpy()
    if min(found.shape[:2]) < _ACROSS * _SIDE:
        raise UserError(
            f"{path}: expected {_ACROSS * _SIDE} pixels on each side, got"
            f" {found.shape[1]} x {found.shape[0]}"
        )
    return found


def _indices(painted: np.ndarray, path: Path) -> np.ndarray:
    """The labels that a picture is painted with; some of the files hold 252 for 255."""
    bits = np.array([4, 2, 1], np.uint8)
    table = np.full(8, VOID, np.uint8)
    table[(np.array(COLOURS) > 127) @ bits] = np.arange(len(COLOURS))
    found = table[(painted > 127) @ bits]
    if (found == VOID).any():
        y, x = np.argwhere(found == VOID)[0]
        raise UserError(
            f"{path}: expected the six colours of Potsdam's labels, pixel ({x}, {y}) is"
            f" {tuple(painted[y, x].tolist())}"
        )
    return found


# ---- pieces that others have cut ----


def _from_pieces(root: Path) -> list[_Work]:
    """One work for each piece of the lists.

    Raises:
        UserError: a list is missing.
    """
    works = []
    for name, split in _LISTS.items():
        path = root / name
        if not path.is_file():
            raise UserError(f"{path}: this list of pieces is missing, expected {', '.join(_LISTS)}")
        labelled = not name.startswith("unlabelled")
        for stem in listed(path):
            works.append(
                _Work(split, [stem], lambda s=stem, known=labelled: iter([_piece(root, s, known)]))
            )
    return works


def _piece(root: Path, stem: str, labelled: bool) -> Pair:
    image = _variable(root / "imgs" / f"{stem}.mat", "img")
    if image.ndim != 3 or image.shape[2] < 3:
        raise UserError(
            f"{root / 'imgs' / stem}.mat: expected img [H, W, 3 or 4], got {list(image.shape)}"
        )
    if not labelled:
        return image[..., :3], np.full(image.shape[:2], VOID, np.uint8)
    path = root / "gt" / f"{stem}.mat"
    labels = _variable(path, "gt")
    if labels.shape != image.shape[:2]:
        raise UserError(
            f"{path}: expected gt {list(image.shape[:2])}, the size of its image, got"
            f" {list(labels.shape)}"
        )
    wrong = labels[(labels >= len(COLOURS)) & (labels != VOID)]
    if wrong.size:
        raise UserError(f"{path}: expected labels 0 to {len(COLOURS) - 1}, gt holds {wrong[0]}")
    return image[..., :3], labels


def _variable(path: Path, name: str) -> np.ndarray:
    """A variable of a .mat file, uint8.

    Raises:
        UserError: no such file or variable, or not bytes.
    """
    found = read_variable(path, name)
    if found is None or found.dtype != np.uint8 or not found.size:
        what = "it has none" if found is None else f"got {found.dtype} {list(found.shape)}"
        raise UserError(f"{path}: expected the variable {name} of bytes, {what}")
    return found


def _png(array: np.ndarray) -> bytes:
    picture = Image.fromarray(np.ascontiguousarray(array))
    if array.ndim == 2:
        # All 256 entries: with fewer than 16 Pillow writes four bits a pixel, and void needs eight.
        palette = np.zeros((256, 3), np.uint8)
        palette[: len(COLOURS)] = COLOURS
        picture.putpalette(palette.tobytes())
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
