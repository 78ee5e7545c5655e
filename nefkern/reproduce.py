"""``python -m nefkern.reproduce``: the paper's tables, measured beside the paper's numbers."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nefkern import evaluate, train
from nefkern.baselines.methods import parse_methods
from nefkern.errors import ArgumentParser, UserError, command, first_line
from nefkern.options import CLASSES, PRESETS, TrainOptions, resolve
from nefkern.paper import TABLES, Number, Row, Table

log = logging.getLogger(__name__)

DESCRIPTION = """\
Every experiment of the paper as a command: tables 1 to 9, and 4.4, the comparison in the text of
that section. Each row is trained and scored by python -m nefkern.train and nefkern.evaluate, and
printed beside the paper's numbers. It goes on where it was interrupted: what is trained or scored
already, here or by the commands that --dry-run prints, is not done again, and rows that train alike
(five tables have a row of table 1) share a run. A row that fails is told in one line, the others go
on, and the exit code is 2.
"""
EXAMPLES = """\
examples:
  python -m nefkern.reproduce --list                          tables and their rows
  python -m nefkern.reproduce 1 --data-root DIR               DIR/pascal_context/..., as published
  python -m nefkern.reproduce 1 vit-s --data-root DIR --seeds 3
  python -m nefkern.reproduce all --data-root DIR --dry-run   commands to spread over machines
  python -m nefkern.reproduce 1 --data-root DIR --evaluate="--crf classes"
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

It writes OUT/table-N.md, OUT/table-N.json, and a run folder with report.html for every run.
"""

#: Training options that rows compare, as they appear in the names of run folders.
_COMPARED = {"num_eigenfunctions": "K", "alpha": "alpha", "beta": "beta"}

#: Options of the two commands that this one sets itself.
_TRAIN_SET = ("data", "data_root", "out", "resume", "seed", "config")
_EVALUATE_SET = ("data", "data_root", "methods", "protocol", "seed", "baseline", "features")
_EVALUATE_SET += ("untrained",)


# ---- parse ----


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = ArgumentParser(
        prog="python -m nefkern.reproduce",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
            raise UserError(f"ROW: table {options.table} has {known}; got {name}")
    also_methods(options)
    if options.data_root is None:
        raise UserError("--data-root: expected the folder with the data sets")
    if options.seeds < 1:
        raise UserError(f"--seeds {options.seeds}: expected at least 1")
    if not 0 < options.scale_K < math.inf:
        raise UserError(f"--scale-K {options.scale_K}: expected more than 0")


def chosen(options: argparse.Namespace) -> dict[str, list[Row]]:
    """The rows to run, by table."""
    numbers = list(TABLES) if options.table == "all" else [options.table]
    also = also_methods(options)
    return {
        n: [TABLES[n].rows[name].beside(also) for name in options.rows or TABLES[n].rows]
        for n in numbers
    }


def also_methods(options: argparse.Namespace) -> list[str]:
    """Names of the methods of ``--also``."""
    names = [name.strip() for name in options.also.split(",") if name.strip()]
    return [method.name for method in parse_methods(names, flag="--also")]


def _split(flag: str, text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"{flag} {text!r}: {error}") from None


def _refuse(flag: str, names: Any, set_here: tuple[str, ...]) -> None:
    for name in set_here:
        if name in names:
            raise UserError(
                f"{flag}: --{name.replace('_', '-')} is for this command to set; "
                "python -m nefkern.reproduce --help lists what it takes"
            )


# ---- from rows to commands ----


@dataclass(frozen=True)
class Job:
    """A row with a seed: the arguments of its two commands, and where its run goes."""

    folder: Path
    train: list[str]
    evaluate: list[str]

    def train_options(self) -> TrainOptions:
        """As ``python -m nefkern.train`` reads them."""
        return _resolved(self.train)

    def evaluate_options(self) -> argparse.Namespace:
        """As ``python -m nefkern.evaluate`` reads them."""
        options = evaluate.parser().parse_args(self.evaluate)
        evaluate.check(options)
        return options


def _resolved(arguments: list[str]) -> TrainOptions:
    flags = vars(train.parser().parse_args(arguments))
    return resolve(flags, flags.pop("config"))


class Planner:
    """Makes the commands of rows.

    Args:
        options: what :func:`parser` parses; checked.

    Raises:
        UserError: a mistake in ``--train`` or ``--evaluate``.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.more_train = _split("--train", options.train)
        self.given = vars(train.parser().parse_args(self.more_train))
        if self.given["config"] is None:
            del self.given["config"]
        _refuse("--train", self.given, _TRAIN_SET)
        self.more_evaluate = _split("--evaluate", options.evaluate)
        # Names that are there before are not set to defaults: what is there after was given.
        before = argparse.Namespace(**dict.fromkeys(_EVALUATE_SET))
        self.scoring = evaluate.parser().parse_args(["RUN", *self.more_evaluate], before)
        given = [name for name in _EVALUATE_SET if getattr(self.scoring, name) is not None]
        _refuse("--evaluate", given, _EVALUATE_SET)

    def job(self, table: Table, row: Row, rows: list[Row], seed: int) -> Job:
        """The commands of ``row``, one of the chosen ``rows`` of its table.

        Raises:
            UserError: an option that does not go with the row.
        """
        settings = self._settings(table, row)
        for name in settings.keys() & self.given.keys():
            if len(rows) > 1 and len({self._settings(table, r)[name] for r in rows}) > 1:
                raise UserError(
                    f"--train: --{name.replace('_', '-')} is what these rows compare; "
                    f"name a single row, such as {table.number} {row.name}"
                )
        arguments = _data(*self._home(row.trained_on or row.data, self.options.data_root))
        for name, value in settings.items():
            if name not in self.given:
                arguments += [f"--{name.replace('_', '-')}", str(value)]
        arguments += [*self.more_train, "--seed", str(seed)]
        folder = self.options.out / f"{_run_name(_resolved(arguments))}-seed{seed}"
        scoring = _data(*self._home(row.data, self._scored_root(table, row)))
        scoring += ["--protocol", table.protocol, "--methods", ",".join(row.methods)]
        return Job(
            folder,
            [*arguments, "--out", str(folder), "--resume"],
            [str(folder), *scoring, *self.more_evaluate, "--seed", str(seed)],
        )

    def _settings(self, table: Table, row: Row) -> dict[str, Any]:
        """Training options that make the row what it is."""
        settings = {"backbone": row.backbone, "num_eigenfunctions": self._clusters(table, row)}
        settings |= {"alpha": row.alpha, "beta": row.beta}
        return {
            name: getattr(TrainOptions, name) if value is None else value
            for name, value in settings.items()
        }

    def _clusters(self, table: Table, row: Row) -> int:
        """K of a row; a K that is the number of classes is not scaled."""
        if row.clusters == "classes":
            return self._classes(table, row)
        preset = PRESETS[row.trained_on or row.data]
        k = row.clusters or preset.get("num_eigenfunctions", TrainOptions.num_eigenfunctions)
        return max(2, round(k * self.options.scale_K))

    def _classes(self, table: Table, row: Row) -> int:
        from nefkern.data import open_dataset

        if self.options.data == "paper" and not self.scoring.ignore_class:
            return self.scoring.classes or CLASSES[row.data][table.protocol]
        name, root = self._home(row.data, self._scored_root(table, row))
        dataset = open_dataset(
            name,
            root=root,
            split=self.scoring.split,
            classes=self.scoring.classes or CLASSES.get(name, {}).get(table.protocol),
            ignore_classes=self.scoring.ignore_class,
        )
        return len(dataset.classes) - len(dataset.ignored)

    def _home(self, name: str, root: Path) -> tuple[str, Path]:
        """What stands for a data set of the paper, and its folder."""
        return ("folder", root) if self.options.data == "folder" else (name, root / name)

    def _scored_root(self, table: Table, row: Row) -> Path:
        if self.options.data == "paper" or row.trained_on is None:
            return self.options.data_root
        if self.options.transfer_root is None:
            raise UserError(
                f"--transfer-root: table {table.number} trains on --data-root and is scored on "
                "another data set; expected its folder"
            )
        return self.options.transfer_root


def _data(name: str, root: Path) -> list[str]:
    return ["--data", name, "--data-root", str(root)]


def _run_name(options: TrainOptions) -> str:
    """Data, backbone, and what else rows compare, where it is not the data set's default."""
    default = resolve({"data": options.data, "data_root": options.data_root})
    parts = [
        f"{short}{getattr(options, name):g}"
        for name, short in _COMPARED.items()
        if getattr(options, name) != getattr(default, name)
    ]
    return "-".join([options.run_folder().name, *parts])


# ---- run ----


def perform(job: Job) -> dict[str, Any]:
    """Train and evaluate what is not done yet; returns the evaluation.

    Raises:
        UserError: an option, a data set or weights that cannot be used.
    """
    from nefkern.evaluator import Evaluator

    options, scoring = job.train_options(), job.evaluate_options()
    if not is_trained(options):
        train.train(options)
    found = find_evaluation(job.folder, scoring)
    if found is None:
        return Evaluator(scoring, evaluate.chosen_methods(scoring)).run()
    log.info("%s: done", job.folder)
    return found


def is_trained(options: TrainOptions) -> bool:
    """Whether the run is complete, up to its report.

    Raises:
        UserError: the folder holds a run of other options.
    """
    from nefkern.report import REPORT
    from nefkern.runs import CHECKPOINT, Run

    if not Run(options.run_folder()).path(CHECKPOINT).exists():
        return False
    run = Run.create(options)
    return run.path(REPORT).exists() and run.epochs_done() >= options.epochs


def find_evaluation(folder: Path, scoring: argparse.Namespace) -> dict[str, Any] | None:
    """The evaluation of this checkpoint, asked for alike, that has all the methods; if any."""
    from nefkern.evaluator import asked
    from nefkern.runs import CHECKPOINT

    methods = {method.name for method in evaluate.chosen_methods(scoring)}
    trained_at = (folder / CHECKPOINT).stat().st_mtime_ns
    for file in sorted(folder.glob("evaluation-*.json")):
        content = json.loads(file.read_text())
        same = content.get("asked") == asked(scoring)
        if same and methods <= content["methods"].keys() and file.stat().st_mtime_ns >= trained_at:
            return content
    return None


@dataclass
class Measured:
    """What came of a row: an evaluation for each seed, or why there are none (more)."""

    row: Row
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    error: str | None = None

    def scores(self, method: str, matching: str, name: str) -> list[float]:
        """One figure of every seed, in percent; after the CRF where there was one."""
        found = []
        for evaluation in self.evaluations:
            stage = evaluation["methods"][method]["stages"][evaluation["settings"]["crf"] or "none"]
            if matching in stage["matchings"]:  # Hungarian needs as many clusters as classes
                found.append(100 * stage["matchings"][matching][name])
        return found


def measure(planner: Planner, table: Table, row: Row, rows: list[Row]) -> Measured:
    """Run a row with every seed, up to the first that fails."""
    result = Measured(row)
    for seed in range(planner.options.seeds):
        try:
            job = planner.job(table, row, rows, seed)
            log.info("table %s, %s, seed %d", table.number, row.name, seed)
            result.evaluations.append(perform(job))
            result.runs.append(str(job.folder))
        except (UserError, OSError, RuntimeError) as error:
            result.error = first_line(error, limit=1000)
            place = f"table {table.number}, {row.name}, seed {seed}"
            print(f"error: {place}: {result.error}", file=sys.stderr)
            break
    return result


def reproduce(options: argparse.Namespace, line: str) -> int:
    """Run the chosen rows and write their tables, anew after every row; returns the exit code."""
    from nefkern.backends import check_environment
    from nefkern.files import replace_file

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
            text = markdown(TABLES[number], measured, options, line)
            replace_file(options.out / f"table-{number}.md", text)
            content = {"command": line, **as_dict(TABLES[number], measured)}
            replace_file(
                options.out / f"table-{number}.json",
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
                print(f"error: table {number}, {row.name}: {error}", file=sys.stderr)
                code = 2
    print(*command_lines(jobs), sep="\n")
    return code


def command_lines(jobs: list[Job]) -> list[str]:
    """Commands to paste into a shell, in order, without those that an earlier one covers."""
    lines: dict[str, None] = {}
    scored: dict[str, set[str]] = {}
    for job in jobs:
        lines[shlex.join(["python", "-m", "nefkern.train", *job.train])] = None
        asked = vars(job.evaluate_options())
        methods = set(asked.pop("methods").split(","))
        before = scored.setdefault(repr(asked), set())
        if not methods <= before:
            before |= methods
            lines[shlex.join(["python", "-m", "nefkern.evaluate", *job.evaluate])] = None
    return list(lines)


# ---- write ----


def _lines(measured: list[Measured]) -> Iterator[tuple[Measured, str, Number]]:
    for result in measured:
        for method, number in result.row.numbers:
            yield result, method, number


def markdown(
    table: Table, measured: list[Measured], options: argparse.Namespace, command_line: str
) -> str:
    """The table: a line for every row, method and matching, the paper's number | the measured."""
    from nefkern.summarize import COUNTED, spread

    lines = [
        f"**Table {table.number}: {table.title}** (protocol {table.protocol}, %)",
        "",
        "| | method | matching | accuracy: paper | measured | mIoU: paper | measured | runs |",
        "|---" * 8 + "|",
    ]
    for result, method, number in _lines(measured):
        accuracies = result.scores(method, number.matching, "accuracy")
        mean_ious = result.scores(method, number.matching, "mean_iou")
        cells = [
            result.row.title,
            method,
            COUNTED[number.matching],
            "" if number.accuracy is None else f"{number.accuracy:.1f}",
            spread(accuracies) if accuracies else "",
            "" if number.mean_iou is None else f"{number.mean_iou:.1f}",
            spread(mean_ious) if mean_ious else "",
            str(len(mean_ious)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    notes = [f"`{command_line}`"]
    if options.data == "folder":
        notes.append(
            f"Measured on {options.data_root} in place of the paper's data sets: what can be held "
            "against the paper is the order of the rows, not the numbers."
        )
    if options.scale_K != 1:
        notes.append(f"K: the paper's times {options.scale_K:g}.")
    if options.seeds > 1:
        notes.append("Measured: mean ± sample standard deviation over the seeds.")
    if not any(e["settings"]["crf"] for result in measured for e in result.evaluations):
        notes.append(
            "The paper's numbers are after a CRF (which gains little, it says), the measured ones "
            'without; `--evaluate="--crf classes"` adds it.'
        )
    notes += [f"{m.row.title} failed: {m.error}" for m in measured if m.error]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes), ""])


def as_dict(table: Table, measured: list[Measured]) -> dict[str, Any]:
    """The table as numbers, every seed's; JSON-ready."""
    from nefkern.runs import versions

    return {
        "table": table.number,
        "title": table.title,
        "protocol": table.protocol,
        "rows": [
            {
                "row": result.row.name,
                "title": result.row.title,
                "method": method,
                "matching": number.matching,
                "paper": {"accuracy": number.accuracy, "mean_iou": number.mean_iou},
                "measured": {
                    name: result.scores(method, number.matching, name)
                    for name in ("accuracy", "mean_iou")
                },
                "runs": result.runs,
                "error": result.error,
            }
            for result, method, number in _lines(measured)
        ],
        "versions": versions(),
    }


def listing() -> str:
    """Every table and its rows."""
    width = max(len(name) for table in TABLES.values() for name in table.rows)
    lines = []
    for table in TABLES.values():
        lines.append(f"{table.number:4}{table.title} ({table.protocol})")
        for row in table.rows.values():
            lines.append(f"    {row.name:{width}}  {row.title}: {', '.join(row.methods)}")
    return "\n".join(lines)


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
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("timm").setLevel(logging.WARNING)
    return reproduce(options, shlex.join(["python", "-m", "nefkern.reproduce", *given]))


if __name__ == "__main__":
    sys.exit(main())
