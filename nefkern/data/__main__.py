"""``python -m nefkern.data``: check the paper's data sets, and prepare the one that needs it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nefkern.commandline import command_parser
from nefkern.data import BENCHMARKS
from nefkern.data.check import check
from nefkern.data.prepare import prepare_pascal_context
from nefkern.errors import UserError, command

DESCRIPTION = """\
The paper's data sets, as their publishers lay them out. Nothing is downloaded: check says what is
missing and where to get it; prepare converts Pascal Context's .mat files to index images.
"""
EXAMPLES = """\
examples:
  python -m nefkern.data check cityscapes --data-root DIR            count and read every file
  python -m nefkern.data check ade20k --data-root DIR --quick        only count
  python -m nefkern.data prepare pascal_context --data-root DIR
"""
_SHOWN = 20  # problems of a split


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = command_parser("data", DESCRIPTION, EXAMPLES)
    tasks = result.add_subparsers(dest="task", required=True, metavar="check|prepare")
    checked = tasks.add_parser("check", help="count the files and read them all")
    checked.add_argument(
        "name", choices=tuple(BENCHMARKS), metavar="NAME", help=", ".join(BENCHMARKS)
    )
    checked.add_argument("--quick", action="store_true", help="only count")
    checked.add_argument("--workers", type=int, default=2, help="processes that read [2]")
    prepared = tasks.add_parser("prepare", help="convert annotations, once")
    prepared.add_argument(
        "name", choices=("pascal_context",), metavar="NAME", help="pascal_context"
    )
    for task in (checked, prepared):
        task.add_argument("--data-root", type=Path, required=True, metavar="DIR")
    return result


def print_check(options: argparse.Namespace) -> None:
    """Print a line for every split and every problem.

    Raises:
        UserError: there were problems.
    """
    if options.workers < 0:
        raise UserError(f"--workers {options.workers}: expected at least 0")
    benchmark, count = BENCHMARKS[options.name], 0
    print(f"{benchmark.title}, {options.data_root}")
    for report in check(benchmark, options.data_root, quick=options.quick, workers=options.workers):
        print(f"  {report}")
        for problem in report.problems[:_SHOWN]:
            print(f"    {problem}")
        if len(report.problems) > _SHOWN:
            print(f"    and {len(report.problems) - _SHOWN:,} more")
        count += len(report.problems)
    if count:
        raise UserError(f"{options.name}: {count:,} problems, listed above")
    print("  complete" + (", files not read" if options.quick else ", every file is usable"))


@command
def main(arguments: list[str] | None = None) -> None:
    """Parse and run."""
    options = parser().parse_args(arguments)
    if options.task == "check":
        print_check(options)
    else:
        print(f"written: {prepare_pascal_context(options.data_root)}")


if __name__ == "__main__":
    sys.exit(main())
