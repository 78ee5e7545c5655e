"""``python -m nefkern.summarize``: scores of several runs as mean and spread."""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from nefkern.runtime.commandline import command_parser
from nefkern.runtime.errors import UserError, command
from nefkern.training.options import TrainOptions
from nefkern.training.runs import FREE_OPTIONS, Run

EXAMPLES = """\
example: three seeds, scored and summarised
  for s in 0 1 2; do
    python -m nefkern.train --data folder --data-root voc -K 128 --seed $s --out runs/voc-$s
    python -m nefkern.evaluate runs/voc-$s --data-root voc --methods ours,hidden,kmeans --seed $s
  done
  python -m nefkern.summarize runs/voc-*
"""

COUNTED = {
    "iou": "IoU vote",
    "count": "count vote",
    "hungarian": "Hungarian by count",
    "hungarian-iou": "Hungarian by IoU",
    "own": "its own classes",
}


class Score(NamedTuple):
    """One method's scores in one run, in percent."""

    accuracy: float
    mean_iou: float


class Key(NamedTuple):
    """What scores must share to be averaged; ``evaluation`` tells all settings but the seed."""

    evaluation: str
    method: str
    crf: str
    matching: str


def read_scores(run: Path) -> Iterator[tuple[Key, int, Score]]:
    """All scores that ``python -m nefkern.evaluate`` left in a run folder, with their seeds.

    Raises:
        UserError: there are none.
    """
    files = sorted(run.glob("evaluation-*.json"))
    if not files:
        raise UserError(f"{run}: holds no scores; make them with python -m nefkern.evaluate")
    for file in files:
        content = read_evaluation(file)
        evaluation = title(content["settings"])
        for method, result in content["methods"].items():
            for crf, stage in result["stages"].items():
                for matching, scores in stage["matchings"].items():
                    key = Key(evaluation, method, crf, matching)
                    score = Score(100 * scores["accuracy"], 100 * scores["mean_iou"])
                    yield key, content["settings"]["seed"], score


def read_evaluation(file: Path) -> dict[str, Any]:
    """What one evaluation wrote.

    Raises:
        UserError: it is damaged.
    """
    try:
        content = json.loads(file.read_text("utf-8"))
        content["settings"]["seed"], content["methods"].items()
        return content
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{file}: expected scores written by python -m nefkern.evaluate; remove it, or score "
            "the run again"
        ) from None


def title(settings: dict[str, Any]) -> str:
    """An evaluation in a line: data, split and protocol, then whatever else decides its scores.

    Not the seed, which averages are over, and not which methods were scored beside each other.
    """
    s = dict(settings)
    name = f"{Path(s.pop('data_root')).name}-{s.pop('split')}-{s.pop('protocol')}"
    ignored = [
        f"without {', '.join(map(str, classes))}" for classes in [s.pop("ignored")] if classes
    ]
    for free in ("seed", "methods", "crf"):  # a CRF is a stage of its own in the scores
        s.pop(free)
    others = [f"{key.replace('_', ' ')} {value}" for key, value in s.items() if value is not None]
    return ", ".join([name, *ignored, *others])


def differing_options(runs: list[Path]) -> dict[Path, str]:
    """How each run was trained, as far as the runs differ in more than the seed."""
    # A run from before an option existed was trained with what is now its default.
    options = {run: {**asdict(TrainOptions()), **Run(run).config()["options"]} for run in runs}
    apart = FREE_OPTIONS | {"seed", "feature_cache"}
    names = [
        name
        for name in dict.fromkeys(name for its in options.values() for name in its)
        if name not in apart and len({repr(its.get(name)) for its in options.values()}) > 1
    ]
    return {
        run: ", ".join(f"{name.replace('_', ' ')} {its.get(name)}" for name in names)
        for run, its in options.items()
    }


def collect(runs: list[Path]) -> dict[Key, list[Score]]:
    """Scores of all runs by what they share, training and evaluation, in the order met."""
    found: dict[Key, list[Score]] = defaultdict(list)
    scores = {run: list(read_scores(run)) for run in runs}
    trained = differing_options(runs)
    for run in runs:
        # A method scored twice alike, beside others the second time, counts once.
        once = {}
        for key, seed, score in scores[run]:
            evaluation = "; ".join(filter(None, (trained[run], key.evaluation)))
            once[key._replace(evaluation=evaluation), seed] = score
        for (key, _), score in once.items():
            found[key].append(score)
    return dict(found)


def spread(values: list[float]) -> str:
    """Mean ± sample standard deviation; the value alone where there is one."""
    mean = statistics.fmean(values)
    return f"{mean:.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{mean:.1f}"


def table(found: dict[Key, list[Score]]) -> str:
    """Markdown: a section per evaluation, a row per method, "accuracy / mIoU" per matching."""
    lines = []
    for evaluation in dict.fromkeys(key.evaluation for key in found):
        part = {k: v for k, v in found.items() if k.evaluation == evaluation}
        matchings = list(dict.fromkeys(k.matching for k in part))
        titles = [f"{COUNTED.get(m, m)}: accuracy | mIoU" for m in matchings]
        runs = max(len(v) for v in part.values())
        what = f"{runs} runs, mean ± standard deviation" if runs > 1 else "1 run"
        lines += [f"**{evaluation}**, {what}, %", ""]
        lines += [f"| method | {' | '.join(titles)} |", "|---" * (1 + 2 * len(matchings)) + "|"]
        for method, crf in dict.fromkeys((k.method, k.crf) for k in part):
            cells: list[Any] = []
            for matching in matchings:
                scores = part.get(Key(evaluation, method, crf, matching), [])
                cells += [
                    spread([getattr(s, field) for s in scores]) if scores else ""
                    for field in Score._fields
                ]
            name = method if crf == "none" else f"{method}, CRF on {crf}"
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


@command
def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = command_parser(
        "summarize",
        "Mean and spread of the scores of several runs (seeds), as a Markdown table.",
        EXAMPLES,
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="scored run folders")
    print(table(collect(parser.parse_args(arguments).runs)))


if __name__ == "__main__":
    sys.exit(main())
