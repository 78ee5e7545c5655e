"""Images in: data sets, augmentation and batches.

>>> dataset = open_dataset("samples", root=None, split="train")
>>> loader = train_loader(dataset, TrainTransform(resize=520, crop=480), batch_size=8)
>>> for images in loader: ...  # uint8 [8, 3, 480, 480]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nefkern.data.ade20k import ADE20K
from nefkern.data.benchmark import open_benchmark
from nefkern.data.cityscapes import CITYSCAPES
from nefkern.data.cocostuff import COCOSTUFF
from nefkern.data.constants import EVAL_SIZE, IMAGE_SUFFIXES, RESIZE_RATIO, VOID
from nefkern.data.dataset import ImageDataset, Sample
from nefkern.data.folder import open_folder
from nefkern.data.imagenet import IMAGENET
from nefkern.data.images import read_annotation, read_image
from nefkern.data.loader import TrainLoader, View, Views, train_loader
from nefkern.data.pascal_context import PASCAL_CONTEXT
from nefkern.data.potsdam import POTSDAM
from nefkern.data.samples import open_samples
from nefkern.data.transforms import (
    TrainTransform,
    eval_transform,
    photometric_distortion,
    resize_shorter,
)
from nefkern.data.voc2012 import VOC2012
from nefkern.runtime.errors import UserError

__all__ = [
    "BENCHMARKS",
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
    "resize_shorter",
    "train_loader",
]

BENCHMARKS = {
    b.name: b for b in (PASCAL_CONTEXT, CITYSCAPES, ADE20K, IMAGENET, VOC2012, COCOSTUFF, POTSDAM)
}
"""Published data sets by name: the paper's four, then others that the field compares on."""

DATASETS = ("samples", "folder", *BENCHMARKS)
"""Names that :func:`open_dataset` knows."""


def open_dataset(
    name: str,
    *,
    root: str | Path | None = None,
    split: str = "train",
    classes: int | None = None,
    strict: bool = False,
    ignore_classes: Sequence[str | int] = (),
) -> ImageDataset:
    """Open a data set by name.

    Args:
        name: "samples": photographs inside installed packages, all in every split, without
            annotations; "folder": the images below ``root``, see
            :func:`nefkern.data.folder.open_folder` for the layouts; or one of
            :data:`BENCHMARKS`, see :func:`nefkern.data.benchmark.open_benchmark`.
        root: the folder; of all but "samples".
        split: e.g. "train" or "val".
        classes: how many classes to count, where there are several ways: 59 or 60 (with
            background) for "pascal_context", 27 or 19 for "cityscapes", 21 or 20 (without
            background) for "voc2012", 3 or 6 for "potsdam"; None takes the first.
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
    elif root is None:
        raise UserError(f"data {name!r}: expected a data root, the folder with the images")
    if name in BENCHMARKS:
        return open_benchmark(
            BENCHMARKS[name],
            Path(root),
            split=split,
            classes=classes,
            strict=strict,
            ignore_classes=ignore_classes,
        )
    if classes is not None:
        raise UserError(f"{classes} classes: {name!r} has one way to count them, leave it out")
    if name == "samples":
        return open_samples(strict=strict)
    return open_folder(Path(root), split=split, strict=strict, ignore_classes=ignore_classes)
