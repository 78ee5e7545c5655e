"""Images in: data sets, augmentation and batches.

>>> dataset = open_dataset("samples", root=None, split="train")
>>> loader = train_loader(dataset, TrainTransform(resize=520, crop=480), batch_size=8)
>>> for images in loader: ...  # uint8 [8, 3, 480, 480]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nefkern.data.constants import EVAL_SIZE, IMAGE_SUFFIXES, RESIZE_RATIO, VOID
from nefkern.data.dataset import ImageDataset, Sample
from nefkern.data.folder import open_folder
from nefkern.data.images import read_annotation, read_image
from nefkern.data.loader import TrainLoader, View, Views, train_loader
from nefkern.data.samples import open_samples
from nefkern.data.transforms import TrainTransform, eval_transform, photometric_distortion
from nefkern.errors import UserError

__all__ = [
    "DATASETS",
    "EVAL_SIZE",
    "IMAGE_SUFFIXES",
    "RESIZE_RATIO",
    "VOID",
    "ImageDataset",
    "Sample",
    "TrainLoader",
    "TrainTransform",
    "View",
    "Views",
    "eval_transform",
    "open_dataset",
    "photometric_distortion",
    "read_annotation",
    "read_image",
    "train_loader",
]

DATASETS = ("samples", "folder")
"""Names that :func:`open_dataset` knows."""


def open_dataset(
    name: str,
    *,
    root: str | Path | None = None,
    split: str = "train",
    strict: bool = False,
    ignore_classes: Sequence[str | int] = (),
) -> ImageDataset:
    """Open a data set by name.

    Args:
        name: "samples": photographs inside installed packages, all in every split, without
            annotations; "folder": the images below ``root``, see
            :func:`nefkern.data.folder.open_folder` for the layouts.
        root: the folder; only for "folder".
        split: e.g. "train" or "val".
        strict: an unreadable image ends training instead of being reported and replaced.
        ignore_classes: names or indices of classes whose pixels are read as void.

    Returns:
        The data set, never empty. Files are read only when samples are.

    Raises:
        UserError: whatever is wrong with the arguments or the folder, in one line.
    """
    if name not in DATASETS:
        raise UserError(f"data: expected one of {', '.join(DATASETS)}, got {name!r}")
    if name == "samples":
        if root is not None:
            raise UserError(f"data root {root}: 'samples' has none, did you mean data 'folder'?")
        if ignore_classes:
            raise UserError("ignored classes: 'samples' has no annotations to ignore classes in")
        return open_samples(strict=strict)
    if root is None:
        raise UserError("data 'folder': expected a data root, the folder with the images")
    return open_folder(Path(root), split=split, strict=strict, ignore_classes=ignore_classes)
