"""Is a data set complete, and can every file be used?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from nefkern.data.benchmark import Benchmark, missing_files, open_benchmark
from nefkern.data.constants import VOID
from nefkern.data.dataset import ImageDataset
from nefkern.data.folder import folder_dataset, need_folder, nested_images, subfolders
from nefkern.data.labels import absent_classes, one_class_left
from nefkern.data.loader import leave_interrupts_to_the_main_process
from nefkern.runtime.errors import UserError


@dataclass
class SplitReport:
    """What was found of one split.

    Attributes:
        split: its name.
        images, annotations: files there.
        expected: images in the whole split; None where nobody knows.
        problems: one line each.
        notes: what is no problem, but perhaps not meant; one line each.
    """

    split: str
    images: int = 0
    annotations: int = 0
    expected: int | None = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        whole = "" if self.expected is None else f" of {self.expected:,}"
        return f"{self.split:5}  {self.images:,}{whole} images, {self.annotations:,} annotations"


def check(
    benchmark: Benchmark, root: Path, *, quick: bool = False, workers: int = 0
) -> Iterator[SplitReport]:
    """Count the files of every split and, unless ``quick``, read them all.

    Read means: images decode, annotations have the size of their image and hold only the data
    set's labels. Classes that occur nowhere are noted.

    Args:
        benchmark: which data set.
        root: its data root.
        quick: only count.
        workers: processes that read; 0: none beside this one.

    Raises:
        UserError: the data set is not there at all.
    """
    home = benchmark.home(root)
    for split in benchmark.counts:
        report = _count(benchmark, home, split)
        if not quick:
            with contextlib.suppress(UserError):  # files are missing, as the report says already
                dataset = open_benchmark(benchmark, root, split=split)
                _read_all(dataset, report, workers)
        yield report


def check_folder(root: Path, *, quick: bool = False, workers: int = 0) -> Iterator[SplitReport]:
    """Count the files of every split of a folder and, unless ``quick``, read them all.

    Args:
        root, quick, workers: as for :func:`check`; for the layouts of a folder see
            :func:`nefkern.data.folder.open_folder`.

    Raises:
        UserError: no such folder.
    """
    need_folder(root)
    images = root / "images"
    for split in (subfolders(images) if images.is_dir() else []) or [""]:
        report = SplitReport(split or "all", expected=None)
        try:
            dataset, folder = folder_dataset(root, split=split)
        except UserError as error:
            report.problems.append(str(error))
        else:
            report.images = len(dataset)
            report.annotations = len(dataset) if dataset.annotated else 0
            report.notes += filter(None, [nested_images(folder)])
            if not quick:
                _read_all(dataset, report, workers)
        yield report


def _count(benchmark: Benchmark, home: Path, split: str) -> SplitReport:
    expected = benchmark.counts[split]
    report = SplitReport(split, expected=expected[0])
    try:
        images = benchmark.find_images(home, split)
    except UserError as error:
        report.problems.append(f"{error}; get {benchmark.images.source}")
        return report
    report.expected = len(images) if len(images) in expected else expected[0]
    absent = missing_files(images)
    report.images = len(images) - len(absent)
    if report.images != report.expected:
        where = f", such as {absent[0]}" if absent else ""
        report.problems.append(
            f"{split}: {report.images:,} images, expected {report.expected:,}{where};"
            f" get {benchmark.images.source}"
        )
    if benchmark.annotations is not None:
        _count_annotations(benchmark, home, images, report)
    return report


def _count_annotations(
    benchmark: Benchmark, home: Path, images: list[Path], report: SplitReport
) -> None:
    files = benchmark.annotation_files(home, report.split, images)
    absent = images if files is None else missing_files(files)
    report.annotations = len(images) - len(absent)
    if absent:
        folder = home / benchmark.annotations.folder
        where = f"none in {folder}" if files is None else f"such as {absent[0]}"
        report.problems.append(
            f"{report.split}: {len(absent):,} of {len(images):,} annotations missing, {where};"
            f" get {benchmark.annotations.source}"
        )


class _Found(NamedTuple):
    """What reading one sample gives.

    Attributes:
        problem: "" where there is none.
        pixels: of each class, and last of void, int64 ``[classes + 1]``; None without annotation.
    """

    problem: str = ""
    pixels: Tensor | None = None


class _Reading(Dataset[_Found]):
    """Every sample, read for its problems and its labels."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> _Found:
        try:
            if not self.dataset.annotated:
                self.dataset.image(index, min_side=1)  # decodes every byte, but few pixels
                return _Found()
            labels = self.dataset[index].annotation
        except UserError as error:
            return _Found(str(error))
        counts = labels.flatten().bincount(minlength=VOID + 1)
        return _Found(pixels=torch.cat([counts[: len(self.dataset.classes)], counts[VOID:]]))


def _read_all(dataset: ImageDataset, report: SplitReport, workers: int) -> None:
    """Add what reading every file shows to ``report``."""
    loader = DataLoader(
        _Reading(dataset),
        batch_size=None,
        num_workers=workers,
        worker_init_fn=leave_interrupts_to_the_main_process,
    )
    total = torch.zeros(len(dataset.classes) + 1, dtype=torch.int64)
    void: list[Path] = []  # annotations without any class
    for index, found in enumerate(tqdm(loader, desc=report.split, unit="image")):
        if found.problem:
            report.problems.append(found.problem)
        elif found.pixels is not None:
            total += found.pixels
            if not found.pixels[:-1].any():
                void.append(dataset.annotation_paths[index])
    if total.any():
        _judge_labels(dataset, report, total.tolist(), void)


def _judge_labels(
    dataset: ImageDataset, report: SplitReport, total: list[int], void: list[Path]
) -> None:
    *pixels, void_pixels = total
    if not any(pixels):
        report.problems.append(f"{report.split}: every annotated pixel is void ({VOID})")
        return
    if void:
        report.notes.append(
            f"{len(void):,} of {len(dataset):,} annotations are void throughout, such as {void[0]}"
        )
    # Only in files that hold the classes themselves is void always 255.
    line = absent_classes(dataset.classes, pixels, void_pixels if dataset.holds_classes else None)
    if line and dataset.holds_classes and one_class_left(pixels, void_pixels):
        report.problems.append(f"{report.split}: {line}")
    elif line:
        report.notes.append(line)
