"""Rows become runs: what is not trained and scored yet is, and what comes of it is collected."""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nefkern import eigenmaps, evaluate, train
from nefkern.reproduction.paper import Row, Table
from nefkern.reproduction.planning import Job, Planner
from nefkern.runtime.errors import UserError, first_line, visible
from nefkern.training.options import TrainOptions

if TYPE_CHECKING:
    from nefkern.summarize import Resampled

log = logging.getLogger(__name__)


@dataclass
class Measured:
    """What came of a row: for each seed an evaluation, if it has one, its scores on resamples of
    the images, if they were asked for, the run folder and the pictures drawn; or why there are none
    (more)."""

    row: Row
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    resampled: list[Resampled | None] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    pictures: list[list[Path]] = field(default_factory=list)
    error: str | None = None

    def scores(self, method: str, matching: str, name: str) -> list[float]:
        """One figure of every seed, in percent; after the CRF where there was one."""
        found = []
        for evaluation in self.evaluations:
            stage = evaluation["methods"][method]["stages"][drawn_by(evaluation)]
            if matching in stage["matchings"]:  # Hungarian needs as many clusters as classes
                found.append(100 * stage["matchings"][matching][name])
        return found


def drawn_by(evaluation: dict[str, Any]) -> str:
    """The stage whose figures count: after the CRF, where there was one."""
    return evaluation["settings"]["crf"] or "none"


def perform(job: Job) -> dict[str, Any]:
    """Train and evaluate what is not done yet; returns the evaluation.

    Raises:
        UserError: an option, a data set or weights that cannot be used.
    """
    from nefkern.evaluation.evaluator import Evaluator

    scoring = job.evaluate_options()
    train_if_needed(job)
    found = find_evaluation(job.folder, scoring)
    if found is None:
        return Evaluator(scoring, evaluate.chosen_methods(scoring)).run()
    log.info("%s: done", job.folder)
    return found


def train_if_needed(job: Job) -> None:
    """Train what is not trained yet; errors as :func:`perform`."""
    options = job.train_options()
    if not is_trained(options):
        train.train(options)


def is_trained(options: TrainOptions) -> bool:
    """Whether the run is complete, up to its report.

    Raises:
        UserError: the folder holds a run of other options.
    """
    from nefkern.evaluation.report import REPORT
    from nefkern.training.runs import CHECKPOINT, Run

    if not Run(options.run_folder()).path(CHECKPOINT).exists():
        return False
    run = Run.create(options)
    return run.path(REPORT).exists() and run.is_trained(options)


def find_evaluation(folder: Path, scoring: argparse.Namespace) -> dict[str, Any] | None:
    """The evaluation of this checkpoint, asked for alike, that has all the methods and as many
    pictures; if any.

    Raises:
        UserError: a damaged evaluation.
    """
    from nefkern.evaluation.records import asked
    from nefkern.summarize import read_evaluation
    from nefkern.training.runs import CHECKPOINT

    methods = {method.name for method in evaluate.chosen_methods(scoring)}
    trained_at = (folder / CHECKPOINT).stat().st_mtime_ns
    for file in sorted(folder.glob("evaluation-*.json")):
        content = read_evaluation(file)
        same = content.get("asked") == asked(scoring)
        drawn = len(drawn_pictures(file.with_suffix("")))
        enough = drawn >= min(scoring.pictures, content["images"])
        new = file.stat().st_mtime_ns >= trained_at
        if same and methods <= content["methods"].keys() and enough and new:
            return content
    return None


def drawn_pictures(folder: Path) -> list[Path]:
    """The comparisons of single images that an evaluation drew to ``folder``, in their order."""
    return sorted(folder.glob("*-image-annotation-*.png"))


def measure(planner: Planner, table: Table, row: Row, rows: list[Row]) -> Measured:
    """Run a row with every seed, up to the first that fails."""
    from nefkern.evaluation.records import free_name
    from nefkern.summarize import read_resampled

    result = Measured(row)
    for seed in range(planner.options.seeds):
        try:
            job = planner.job(table, row, rows, seed)
            log.info("%s, %s, seed %d", table, row.name, seed)
            if table.is_of_eigenfunctions:
                train_if_needed(job)
                result.pictures.append(eigenmaps.eigenmaps(job.draw_options()))
            else:
                evaluation = perform(job)
                file = free_name(job.folder, evaluation["settings"])
                resampled = read_resampled(file)
                result.evaluations.append(evaluation)
                result.resampled.append(resampled)
                result.pictures.append(drawn_pictures(file.with_suffix("")))
            result.runs.append(str(job.folder))
        except (UserError, OSError, RuntimeError) as error:
            result.error = first_line(error, limit=1000)
            place = f"{table}, {row.name}, seed {seed}"
            print(visible(f"error: {place}: {result.error}"), file=sys.stderr)
            break
    return result
