"""Pascal Context's .mat files to index images, once."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image
from tqdm import tqdm

from nefkern.data.folder import visible_files
from nefkern.data.pascal_context import ANNOTATIONS, MAT_SOURCE, PASCAL_CONTEXT
from nefkern.data.tables.pascal_context import (
    BACKGROUND_COLOUR,
    COLOURS,
    LABELS,
    NAMES,
    NUM_LABELS,
)
from nefkern.runtime.errors import UserError, first_line
from nefkern.runtime.files import remove_parts, replace_file


def prepare_pascal_context(root: Path) -> Path:
    """Write ``SegmentationClassContext/*.png`` from ``trainval/*.mat``.

    Each file is written in one step and files that exist are left alone, so a run that was
    interrupted is finished by the next. A file that cannot be converted does not stop the others.

    Args:
        root: the data root; ``trainval`` is looked for in it, and beside ``JPEGImages``.

    Returns:
        The folder of the annotations.

    Raises:
        UserError: no images or no .mat files there, a label list that is not Pascal Context's, or
            .mat files that could not be converted, the first of them named.
    """
    home = PASCAL_CONTEXT.home(root)
    source = _mat_folder(root, home)
    mats = visible_files(source, "*.mat")
    class_of = _class_of_label(source)
    out = home / ANNOTATIONS
    out.mkdir(exist_ok=True)
    remove_parts(out)
    errors = []
    for mat in tqdm(mats, desc="converting", unit="file"):
        target = out / f"{mat.stem}.png"
        if target.exists():
            continue
        try:
            replace_file(target, _png(class_of[read_label_map(mat)]))
        except UserError as error:
            errors.append(error)
    if errors:
        raise UserError(f"{errors[0]} ({len(errors)} of {len(mats)} files not converted)")
    return out


def _mat_folder(root: Path, home: Path) -> Path:
    folders = list(dict.fromkeys((home / "trainval", root / "trainval")))
    for folder in folders:
        if visible_files(folder, "*.mat"):
            return folder
    tried = " or ".join(map(str, folders))
    raise UserError(f"{tried}: expected *.mat files, none found; get {MAT_SOURCE}")


def _class_of_label(source: Path) -> np.ndarray:
    """Index in the written files, uint8 ``[460]``, of every label: 0 background, 1 to 59.

    Labels are those of ``labels.txt`` (lines "2: aeroplane") in the folder of the .mat files or
    the one above, where it was downloaded too.
    """
    labels = dict(zip(NAMES, LABELS, strict=True))
    for path in (source / "labels.txt", source.parent / "labels.txt"):
        if path.is_file():
            labels = _read_labels(path)
            break
    class_of = np.zeros(NUM_LABELS + 1, np.uint8)
    class_of[[labels[name] for name in NAMES]] = np.arange(1, len(NAMES) + 1)
    return class_of


def _read_labels(path: Path) -> dict[str, int]:
    lines = [line.split(":", 1) for line in path.read_text(errors="replace").splitlines()]
    labels = {
        name[0].strip(): int(number)
        for number, *name in lines
        if name and number.strip().isdecimal() and 0 < int(number) <= NUM_LABELS
    }
    missing = [name for name in NAMES if name not in labels]
    if missing:
        raise UserError(
            f'{path}: expected {NUM_LABELS} lines such as "2: aeroplane", found none for'
            f" {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}"
        )
    return labels


def read_variable(path: Path, name: str) -> np.ndarray | None:
    """A variable of a .mat file; None where it has none of that name.

    Raises:
        UserError: not a .mat file.
    """
    try:
        return scipy.io.loadmat(path, variable_names=[name]).get(name)
    except MemoryError:
        raise
    except Exception as error:  # its reader raises nearly anything for damaged data
        raise UserError(f"{path}: cannot read this .mat file: {first_line(error)}") from None


def read_label_map(path: Path) -> np.ndarray:
    """``LabelMap`` of a .mat file: integers ``[H, W]``, 0 to 459.

    Raises:
        UserError: not a .mat file, or without a map of labels.
    """
    labels = read_variable(path, "LabelMap")
    if labels is None:
        raise UserError(f"{path}: expected the variable LabelMap, it has none")
    if labels.ndim != 2 or labels.dtype.kind not in "uif" or not labels.size:
        raise UserError(
            f"{path}: expected LabelMap [H, W] of numbers, got {labels.dtype} {list(labels.shape)}"
        )
    wrong = labels[~((labels >= 0) & (labels <= NUM_LABELS) & (labels == np.floor(labels)))]
    if wrong.size:
        raise UserError(f"{path}: expected labels 0 to {NUM_LABELS}, LabelMap holds {wrong[0]}")
    return labels.astype(np.int64)


def _png(index: np.ndarray) -> bytes:
    picture = Image.fromarray(index)
    picture.putpalette(np.array([BACKGROUND_COLOUR, *COLOURS], np.uint8).tobytes())
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
