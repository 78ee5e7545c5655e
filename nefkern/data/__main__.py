"""``python -m nefkern.data``: check data sets, and prepare those that need it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from nefkern.data import BENCHMARKS
from nefkern.data.check import SplitReport, check, check_folder
from nefkern.data.prepare import prepare_pascal_context
from nefkern.data.prepare_potsdam import prepare_potsdam
from nefkern.runtime.commandline import command_parser, log_to_stderr
from nefkern.runtime.errors import UserError, command, visible

DESCRIPTION = """\
Published data sets as their publishers lay them out, and folders of your own. Nothing is
downloaded: check says what is missing and where to get it; prepare converts Pascal Context's .mat
files and Potsdam's large pictures to images and index images.
"""
EXAMPLES = """\
examples:
  python -m nefkern.data check cityscapes --data-root DIR            count and read every file
  python -m nefkern.data check ade20k --data-root DIR --quick        only count
  python -m nefkern.data check folder --data-root voc                a folder of your own
  python -m nefkern.data prepare pascal_context --data-root DIR
  python -m nefkern.data prepare potsdam --data-root DIR

below DIR:
  pascal_context  [VOCdevkit/VOC2010/]JPEGImages/*.jpg, .../ImageSets/Main/{train,val}.txt, and
                  trainval/*.mat, from which prepare makes .../SegmentationClassContext/*.png
                  (0 background, 1 to 59 the classes)
  cityscapes      leftImg8bit/{train,val}/<city>/*_leftImg8bit.png,
                  gtFine/{train,val}/<city>/*_gtFine_labelIds.png (label ids)
  ade20k          [ADEChallengeData2016/]{images,annotations}/{training,validation}/*
                  (0 void, 1 to 150 the classes)
  imagenet        [ILSVRC/Data/CLS-LOC/]train/<synset>/*.JPEG; no annotations
  voc2012         [VOCdevkit/VOC2012/]JPEGImages/*.jpg, .../SegmentationClass/*.png,
                  .../ImageSets/Segmentation/{train,val}.txt (0 background, 1 to 20, 255 void)
  cocostuff       {images,annotations}/{train2017,val2017}/* (labels 0 to 181, 255 void);
                  curated/*2017/Coco164kFull_Stuff_Coarse_7.txt, if the usual part is meant
  potsdam         2_Ortho_RGB/*_RGB.tif and 5_Labels_all/*_label.tif, or imgs/*.mat, gt/*.mat and
                  lists, from which prepare makes {images,annotations}/{train,val}/*.png
  folder          images/{split}/*, annotations/{split}/<same name>.png (class indices, 255 void:
                  in masks of 0 and 255, write 1 for 255), classes.txt (one name a line); without
                  splits, or images alone

check also notes classes that occur nowhere, and folders of images that are not read. Images of more
than 8 bits are scaled by what their file states, else floats from 0 to 1;
integers to 65535, or to 4095 (12 bits) or 255 where no sample is above. In the environment,
NEFKERN_WHITE=N says which sample value is white, and NEFKERN_MAX_PIXELS=N allows images beyond 500
megapixels.
"""
_SHOWN = 20  # problems of a split
_CHECKED = (*BENCHMARKS, "folder")
_PREPARED = {"pascal_context": prepare_pascal_context, "potsdam": prepare_potsdam}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = command_parser("data", DESCRIPTION, EXAMPLES)
    tasks = result.add_subparsers(dest="task", required=True, metavar="check|prepare")
    checked = tasks.add_parser("check", help="count the files and read them all")
    checked.add_argument("name", choices=_CHECKED, metavar="NAME", help=", ".join(_CHECKED))
    checked.add_argument("--quick", action="store_true", help="only count")
    checked.add_argument(
        "--workers", type=int, default=2, metavar="N", help="processes that read [2]"
    )
    prepared = tasks.add_parser("prepare", help="convert annotations, once")
    prepared.add_argument(
        "name", choices=tuple(_PREPARED), metavar="NAME", help=", ".join(_PREPARED)
    )
    for task in (checked, prepared):
        task.add_argument(
            "--data-root",
            type=Path,
            required=True,
            metavar="DIR",
            help="the data set's folder; python -m nefkern.data --help shows what belongs below it",
        )
    return result


def print_check(options: argparse.Namespace) -> None:
    """Print a line for every split, every problem and every note.

    Raises:
        UserError: there were problems.
    """
    if options.workers < 0:
        raise UserError(f"--workers {options.workers}: expected at least 0")
    title, reports = _reports(options)
    count = 0
    print(visible(f"{title}, {options.data_root}"))
    for report in reports:
        print(visible(f"  {report}"))
        for problem in report.problems[:_SHOWN]:
            print(visible(f"    {problem}"))
        if len(report.problems) > _SHOWN:
            print(f"    and {len(report.problems) - _SHOWN:,} more")
        for note in report.notes:
            print(visible(f"    note: {note}"))
        count += len(report.problems)
    if count:
        raise UserError(f"{options.name}: {count:,} problems, listed above")
    print("  complete" + (", files not read" if options.quick else ", every file is usable"))


def _reports(options: argparse.Namespace) -> tuple[str, Iterator[SplitReport]]:
    """What the data set is called, and its splits as they are checked."""
    how = {"quick": options.quick, "workers": options.workers}
    if options.name == "folder":
        return "Folder", check_folder(options.data_root, **how)
    benchmark = BENCHMARKS[options.name]
    return benchmark.title, check(benchmark, options.data_root, **how)


@command
def main(arguments: list[str] | None = None) -> None:
    """Parse and run."""
    options = parser().parse_args(arguments)
    log_to_stderr()
    if options.task == "check":
        print_check(options)
    else:
        print(visible(f"written: {_PREPARED[options.name](options.data_root)}"))


if __name__ == "__main__":
    sys.exit(main())
