"""``python -m nefkern.reproduce``: the paper's tables and figures, beside the paper's numbers."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
from pathlib import Path

from nefkern.reproduction.paper import TABLES
from nefkern.reproduction.planning import Job, Planner, also_methods, chosen, command_lines
from nefkern.reproduction.rendering import as_dict, figure, listing, markdown
from nefkern.reproduction.running import Measured, measure
from nefkern.runtime.commandline import command_parser, log_to_stderr
from nefkern.runtime.errors import UserError, command, visible

DESCRIPTION = """\
Every experiment of the paper as a command: tables 1 to 9; 4.4, the comparison in the text of that
section; figure-2, segments on Pascal Context beside the annotation, and figure-3, on ADE20K beside
the image; of the appendix figure-cityscapes and figure-eigenfunctions, ψ's raw outputs. Each row is
trained and scored by python -m nefkern.train and nefkern.evaluate, and printed beside the paper's
numbers. It goes on where it was interrupted: what is trained or scored already, here or by the
commands that --dry-run prints, is not done again, and rows that train alike (five tables have a row
of table 1) share a run. A row that fails is told in one line, the others go on, and the exit code
is 2.
"""
EXAMPLES = """\
examples:
  python -m nefkern.reproduce --list                          tables and their rows
  python -m nefkern.reproduce 1 --data-root DIR               DIR/pascal_context/..., as published
  python -m nefkern.reproduce 1 vit-s --data-root DIR --seeds 3
  python -m nefkern.reproduce figure-2 --data-root DIR --evaluate="--pictures 12"
  python -m nefkern.reproduce all --data-root DIR --dry-run   commands to spread over machines
  python -m nefkern.reproduce 1 --data-root DIR --evaluate="--crf clusters"
                                                              with a CRF, as the paper's numbers are
  python -m nefkern.reproduce 1 --data-root DIR --also deep-spectral,kmeans-concat
                                                              with baselines that it does not have

the same ablations on a small data set of your own (images/, annotations/, classes.txt):
  python -m nefkern.reproduce 5 --data folder --data-root voc --scale-K 0.25 \\
      --train="--backbone vit_small_patch14_dinov2 --crop 336 --k 2% --epochs 20 --amp"
  python -m nefkern.reproduce 1 vit-s --data folder --data-root voc \\
      --train="--backbone vit_small_patch14_dinov2 --k 2%"    what rows compare takes one row
  python -m nefkern.reproduce 8 --data folder --data-root photos --transfer-root voc

on a machine with several GPUs, rows side by side; the last line collects the table:
  CUDA_VISIBLE_DEVICES=0 python -m nefkern.reproduce 1 vit-s --data-root DIR &
  CUDA_VISIBLE_DEVICES=1 python -m nefkern.reproduce 1 vit-b vit-l --data-root DIR &
  wait; python -m nefkern.reproduce 1 --data-root DIR
one row on several GPUs: its lines of --dry-run, by torchrun (python -m nefkern.train --help)

It writes OUT/table-N.md, OUT/table-N.json, OUT/figure-N.png, and a run folder with report.html for
every run.
"""


# ---- parse ----


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = command_parser("reproduce", DESCRIPTION, EXAMPLES)
    add = result.add_argument
    add("table", nargs="?", metavar="TABLE", help=f"{', '.join(TABLES)} or all")
    add("rows", nargs="*", metavar="ROW", help="rows of the table by name [all]")
    add("--list", action="store_true", help="print tables and rows, and do nothing else")
    add("--dry-run", action="store_true", help="print the commands, and do nothing else")
    add(
        "--data",
        default="paper",
        choices=("paper", "folder"),
        help="paper: the paper's data sets; folder: one of your own in place of each [paper]",
    )
    add(
        "--data-root",
        type=Path,
        metavar="DIR",
        help="paper: the folder of pascal_context/, cityscapes/, ade20k/ and imagenet/; "
        "folder: your data set",
    )
    add(
        "--transfer-root",
        type=Path,
        metavar="DIR",
        help="with --data folder, what table 8 scores on, trained on --data-root",
    )
    add(
        "--also",
        default="",
        metavar="A,B,...",
        help="score these methods of python -m nefkern.evaluate beside those of the paper",
    )
    add("--seeds", type=int, default=1, metavar="N", help="runs of each row, seeds 0 to N-1 [1]")
    add(
        "--scale-K",
        type=float,
        default=1.0,
        metavar="FACTOR",
        help="times every K of the paper, for data sets with fewer classes [1]",
    )
    add(
        "--train",
        default="",
        metavar="OPTIONS",
        help="options of python -m nefkern.train for all rows, in one argument: "
        '--train="--crop 336 --amp"',
    )
    add(
        "--evaluate",
        default="",
        metavar="OPTIONS",
        help='options of python -m nefkern.evaluate likewise: --evaluate="--limit 100"',
    )
    add(
        "--out",
        type=Path,
        default=Path("runs/reproduce"),
        metavar="DIR",
        help="where tables and runs go [runs/reproduce]",
    )
    return result


def check(options: argparse.Namespace) -> None:
    """Raise a UserError that names the first option out of range."""
    if options.table not in (*TABLES, "all"):
        raise UserError(f"TABLE: expected one of {', '.join(TABLES)} or all; got {options.table}")
    if options.table == "all" and options.rows:
        raise UserError("ROW: expected a single TABLE before it, not all")
    for name in options.rows:
        if name not in TABLES[options.table].rows:
            known = ", ".join(TABLES[options.table].rows)
            raise UserError(f"ROW: {TABLES[options.table]} has {known}; got {name}")
    also_methods(options)
    if options.data_root is None:
        raise UserError("--data-root: expected the folder with the data sets")
    if options.seeds < 1:
        raise UserError(f"--seeds {options.seeds}: expected at least 1")
    if not 0 < options.scale_K < math.inf:
        raise UserError(f"--scale-K {options.scale_K}: expected more than 0")


# ---- run ----


def reproduce(options: argparse.Namespace, line: str) -> int:
    """Run the chosen rows and write their tables, anew after every row; returns the exit code."""
    from nefkern.backends import check_environment
    from nefkern.runtime.files import replace_file
    from nefkern.segmentation.pictures import write_png

    check_environment()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("torchrun: expected for the lines of --dry-run, not for this command")
    planner, code = Planner(options), 0
    options.out.mkdir(parents=True, exist_ok=True)
    for number, rows in chosen(options).items():
        measured: list[Measured] = []
        for row in rows:
            measured.append(measure(planner, TABLES[number], row, rows))
            code = 2 if measured[-1].error else code
            text = markdown(TABLES[number], measured, planner, line)
            replace_file(options.out / f"{TABLES[number].stem}.md", text)
            if TABLES[number].is_figure and (sheet := figure(TABLES[number], measured)):
                write_png(sheet, options.out / f"{TABLES[number].stem}.png")
            content = {"command": line, **as_dict(TABLES[number], measured, planner)}
            replace_file(
                options.out / f"{TABLES[number].stem}.json",
                json.dumps(content, indent=1, ensure_ascii=False),
            )
        print(f"\n{text}")
    return code


def dry_run(options: argparse.Namespace) -> int:
    """Print every command once, in order; returns the exit code."""
    planner, code = Planner(options), 0
    jobs: list[Job] = []
    for number, rows in chosen(options).items():
        for row in rows:
            try:
                jobs += [planner.job(TABLES[number], row, rows, s) for s in range(options.seeds)]
            except UserError as error:
                print(visible(f"error: {TABLES[number]}, {row.name}: {error}"), file=sys.stderr)
                code = 2
    print(*command_lines(jobs), sep="\n")
    return code


@command
def main(arguments: list[str] | None = None) -> int:
    """Parse and run."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(given)
    if options.list:
        print(listing())
        return 0
    check(options)
    if options.dry_run:
        return dry_run(options)
    log_to_stderr()
    return reproduce(options, shlex.join(["python", "-m", "nefkern.reproduce", *given]))


if __name__ == "__main__":
    sys.exit(main())
