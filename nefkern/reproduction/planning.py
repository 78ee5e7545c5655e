"""From rows of the paper's tables to commands."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nefkern import eigenmaps, evaluate, train
from nefkern.reproduction.paper import TABLES, Row, Table
from nefkern.runtime.errors import UserError
from nefkern.segmentation.methods import parse_methods
from nefkern.training.option_parsing import resolve
from nefkern.training.options import TrainOptions
from nefkern.training.presets import CLASSES, NEURAL_ONLY, PRESETS

#: Training options that rows compare, as they appear in the names of run folders.
COMPARED = {"num_eigenfunctions": "K", "alpha": "alpha", "beta": "beta"}

#: Options of the two commands that this one sets itself.
_TRAIN_SET = ("data", "data_root", "out", "resume", "seed", "config")
_EVALUATE_SET = ("data", "data_root", "methods", "protocol", "seed", "baseline", "features")
_EVALUATE_SET += ("untrained",)


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


@dataclass(frozen=True)
class Job:
    """A row with a seed: the arguments of its commands, and where its run goes.

    After training a run is scored or, where the row shows eigenfunctions, these are drawn; the
    arguments of the other command are then empty.
    """

    folder: Path
    train: list[str]
    evaluate: list[str]
    draw: list[str]

    def train_options(self) -> TrainOptions:
        """As ``python -m nefkern.train`` reads them."""
        return _resolved(self.train)

    def evaluate_options(self) -> argparse.Namespace:
        """As ``python -m nefkern.evaluate`` reads them."""
        options = evaluate.parser().parse_args(self.evaluate)
        evaluate.check(options)
        return options

    def draw_options(self) -> argparse.Namespace:
        """As ``python -m nefkern.eigenmaps`` reads them."""
        options = eigenmaps.parser().parse_args(self.draw)
        eigenmaps.check(options)
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
        evaluate.check_edges(self.scoring)
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
            if name not in self.given and not self._has_no(name):
                arguments += [f"--{name.replace('_', '-')}", str(value)]
        arguments += [*self.more_train, "--seed", str(seed)]
        folder = self.options.out / f"{_run_name(_resolved(arguments))}-seed{seed}"
        training = [*arguments, "--out", str(folder), "--resume"]
        shown = [str(folder), *_data(*self._home(row.data, self._scored_root(table, row)))]
        if table.is_of_eigenfunctions:
            first = ["--first", str(max(1, self.scoring.pictures))]
            return Job(
                folder, training, [], [*shown, "--split", self.scoring.split, *first, "--exact"]
            )
        scoring = ["--protocol", table.protocol, "--methods", ",".join(row.methods)]
        scoring = [*shown, *scoring, *self.more_evaluate, "--seed", str(seed)]
        return Job(folder, training, scoring, [])

    def _has_no(self, name: str) -> bool:
        """Whether the method that ``--train`` asks for has no such option."""
        return self.given.get("method") == "spectral" and name in NEURAL_ONLY

    def _settings(self, table: Table, row: Row) -> dict[str, Any]:
        """Training options that make the row what it is."""
        if row.beta is not None and self._has_no("beta"):
            raise UserError(f"--train: --method spectral has no --beta, which {table} compares")
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
                f"--transfer-root: {table} trains on --data-root and is scored on "
                "another data set; expected its folder"
            )
        return self.options.transfer_root


def _data(name: str, root: Path) -> list[str]:
    return ["--data", name, "--data-root", str(root)]


def _run_name(options: TrainOptions) -> str:
    """Data, backbone, and what else rows compare, where it is not the data set's default."""
    usual = {"data": options.data, "data_root": options.data_root, "method": "neural"}
    default = resolve(usual)
    parts = [
        f"{short}{getattr(options, name):g}"
        for name, short in COMPARED.items()
        if getattr(options, name) != getattr(default, name)
    ]
    method = [options.method] if options.method != default.method else []
    return "-".join([options.run_folder().name, *method, *parts])


def command_lines(jobs: list[Job]) -> list[str]:
    """Commands to paste into a shell, in order, without those that an earlier one covers."""
    lines: dict[str, None] = {}
    scored: dict[str, set[str]] = {}
    for job in jobs:
        lines[shlex.join(["python", "-m", "nefkern.train", *job.train])] = None
        if job.draw:
            lines[shlex.join(["python", "-m", "nefkern.eigenmaps", *job.draw])] = None
            continue
        asked = vars(job.evaluate_options())
        methods = set(asked.pop("methods").split(","))
        before = scored.setdefault(repr(asked), set())
        if not methods <= before:
            before |= methods
            lines[shlex.join(["python", "-m", "nefkern.evaluate", *job.evaluate])] = None
    return list(lines)


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
