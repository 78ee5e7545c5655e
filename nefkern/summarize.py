"""``python -m nefkern.summarize``: scores of several runs as mean and spread."""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nefkern.evaluation.honesty import (
    CROSS,
    SAME,
    Estimate,
    differences,
    unpacked,
)
from nefkern.evaluation.honesty import Key as Scored
from nefkern.evaluation.resampling import SCORES
from nefkern.runtime.commandline import command_parser
from nefkern.runtime.errors import ArgumentParser, UserError, command
from nefkern.runtime.structured import parse_json
from nefkern.segmentation.tables import EDGE_TITLES, difference_cells, with_interval
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
    boundary: float | None = None


class Key(NamedTuple):
    """What scores must share to be averaged; ``evaluation`` tells all settings but the seed."""

    evaluation: str
    method: str
    edges: str
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
            for edges, stage in result["stages"].items():
                for matching, scores in stage["matchings"].items():
                    key = Key(evaluation, method, edges, matching)
                    boundary = stage.get("boundary", {}).get(matching)
                    score = Score(
                        100 * scores["accuracy"],
                        100 * scores["mean_iou"],
                        100 * boundary["f"] if boundary else None,
                    )
                    yield key, content["settings"]["seed"], score


def read_evaluation(file: Path) -> dict[str, Any]:
    """What one evaluation wrote.

    Raises:
        UserError: it is damaged.
    """
    try:
        content = parse_json(file.read_text("utf-8"))
        _check_scores(content)
        return content
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{file}: expected scores written by python -m nefkern.evaluate; remove it, or score "
            "the run again"
        ) from None


def _check_scores(content: dict[str, Any]) -> None:
    """Raise whatever comes first if these are not the scores of an evaluation."""
    settings = content["settings"]
    kinds = {"data_root": str, "split": str, "protocol": str, "ignored": list, "seed": int}
    for name, kind in kinds.items():
        if not isinstance(settings[name], kind):
            raise TypeError(f"{name}: expected {kind.__name__}")
    for method in content["methods"].values():
        for edges, stage in method["stages"].items():
            if edges not in EDGE_TITLES:
                raise ValueError(f"stages: {edges!r}")
            for scores in stage["matchings"].values():
                float(scores["accuracy"]), float(scores["mean_iou"])
            for told in stage.get("boundary", {}).values():
                float(told["f"])


def title(settings: dict[str, Any]) -> str:
    """An evaluation in a line: data, split and protocol, then whatever else decides its scores.

    Not the seed, which averages are over, and not which methods were scored beside each other.
    """
    s = dict(settings)
    name = f"{Path(s.pop('data_root')).name}-{s.pop('split')}-{s.pop('protocol')}"
    ignored = [
        f"without {', '.join(map(str, classes))}" for classes in [s.pop("ignored")] if classes
    ]
    for free in ("seed", "methods", "crf", "edges"):  # edges are stages of their own in the scores
        s.pop(free, None)
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
        told = any(score.boundary is not None for scores in part.values() for score in scores)
        fields = Score._fields if told else Score._fields[:2]
        heads = " | ".join(("accuracy", "mIoU", "boundary F")[: len(fields)])
        titles = [f"{COUNTED.get(m, m)}: {heads}" for m in matchings]
        runs = max(len(v) for v in part.values())
        what = f"{runs} runs, mean ± standard deviation" if runs > 1 else "1 run"
        lines += [f"**{evaluation}**, {what}, %", ""]
        lines += [
            f"| method | {' | '.join(titles)} |",
            "|---" * (1 + len(fields) * len(matchings)) + "|",
        ]
        for method, edges in dict.fromkeys((k.method, k.edges) for k in part):
            cells: list[Any] = []
            for matching in matchings:
                scores = part.get(Key(evaluation, method, edges, matching), [])
                for field in fields:
                    known = [getattr(s, field) for s in scores if getattr(s, field) is not None]
                    cells.append(spread(known) if known else "")
            name = method if edges == "none" else f"{method}, {EDGE_TITLES[edges]}"
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


# ---- over the images ----


class Resampled(NamedTuple):
    """One evaluation's scores, as they are and on resamples of its images."""

    images: str
    estimates: dict[Scored, Estimate]


def read_resampled(file: Path) -> Resampled | None:
    """What ``python -m nefkern.evaluate`` left beside the scores in ``file``; None: nothing, as
    with ``--bootstrap 0``.

    Raises:
        UserError: it is damaged.
    """
    beside = file.with_suffix(".npz")
    if not beside.exists():
        return None
    methods, estimates = read_evaluation(file)["methods"], {}
    try:
        images, found = unpacked(beside.read_bytes())
        for key, resampled in found.items():
            stage = methods[key.method]["stages"][key.stage]
            scores = stage["matchings" if key.images == SAME else "cross"][key.matching]
            value = torch.tensor([scores[name] for name in SCORES], dtype=torch.float64)
            estimates[key] = Estimate(value, resampled)
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{beside}: expected what python -m nefkern.evaluate wrote beside {file.name}; remove "
            "it, or score the run again"
        ) from None
    return Resampled(images, estimates) if estimates else None


def collect_resampled(runs: list[Path]) -> dict[str, Resampled]:
    """By evaluation, every score's mean over runs, as it is and resample by resample.

    Resamples draw the same images in every run that was scored on them, so that a mean over runs
    has its own; scores of different images have none in common and are left out.
    """
    trained = differing_options(runs)
    found: dict = defaultdict(dict)
    for run in runs:
        for file in sorted(run.glob("evaluation-*.json")):
            resampled = read_resampled(file)
            if resampled is None:
                continue
            settings = read_evaluation(file)["settings"]
            evaluation = "; ".join(filter(None, (trained[run], title(settings))))
            for key, estimate in resampled.estimates.items():
                shape = resampled.images, estimate.resampled.shape
                once = found[evaluation].setdefault(key, {})
                once[run, settings["seed"]] = shape, estimate
    means = {evaluation: _means(scores) for evaluation, scores in found.items()}
    return {evaluation: mean for evaluation, mean in means.items() if mean.estimates}


def _means(scores: dict[Scored, dict[Any, tuple[Any, Estimate]]]) -> Resampled:
    """Means over runs of the scores on the images that the first was scored on."""
    shapes = {key: {shape for shape, _ in its.values()} for key, its in scores.items()}
    same = next(iter(shapes.values()))
    images, _ = next(iter(same))
    means = {
        key: mean_estimate([estimate for _, estimate in its.values()])
        for key, its in scores.items()
        if shapes[key] == same and len(same) == 1
    }
    return Resampled(images, means)


def mean_estimate(estimates: list[Estimate]) -> Estimate:
    """The mean of scores of the same images, as they are and resample by resample."""
    value, resampled = (torch.stack(part).mean(0) for part in zip(*estimates, strict=True))
    return Estimate(value, resampled)


def interval_table(found: dict[str, Resampled]) -> str:
    """Markdown: a section per evaluation, scores and differences with their intervals; last, how
    evaluations differ."""
    lines = []
    for evaluation, (_, estimates) in found.items():
        lines += [
            f"**{evaluation}**, over the images, %: mean over runs [95% interval]; other half: "
            "matched on one half of the images, scored on the other",
            "",
            "| method | matching | accuracy | mIoU | other half: accuracy | mIoU |",
            "|---" * 6 + "|",
        ]
        for key, estimate in estimates.items():
            if key.images != SAME:
                continue
            cells = _cells(estimate) + _cells(estimates.get(key._replace(images=CROSS)))
            matching = COUNTED.get(key.matching, key.matching)
            lines.append(f"| {key.column} | {matching} | {' | '.join(cells)} |")
        lines += ["", *_difference_lines(estimates)]
    return "\n".join([*lines, *_evaluation_lines(found)])


def _cells(estimate: Estimate | None) -> list[str]:
    if estimate is None:
        return ["", ""]
    told = estimate.as_dict()
    return [with_interval(told, score) for score in SCORES]


def _difference_lines(estimates: dict[Scored, Estimate]) -> list[str]:
    """Of every method less the first, on the other half where that was scored."""
    images = CROSS if any(key.images == CROSS for key in estimates) else SAME
    first = next(iter(estimates)).column if estimates else ""
    told = [d for d in differences(estimates) if d["first"] == first and d["images"] == images]
    if not told:
        return []
    where = ", other half" if images == CROSS else ""
    lines = [
        f"| difference{where} | matching | accuracy | | mIoU | |",
        "|---" * 6 + "|",
    ]
    for d in told:
        cells = [cell for score in SCORES for cell in difference_cells(d[score])]
        matching = COUNTED.get(d["matching"], d["matching"])
        lines.append(f"| {d['second']} - {first} | {matching} | {' | '.join(cells)} |")
    return [*lines, ""]


def _evaluation_lines(found: dict[str, Resampled]) -> list[str]:
    """Of every evaluation less the first of the same images, method by method, on the other half
    where both were scored there."""
    told: list[str] = []
    firsts: dict[Any, tuple[str, Resampled]] = {}
    for evaluation, second in found.items():
        same = second.images, next(iter(second.estimates.values())).resampled.shape
        name, first = firsts.setdefault(same, (evaluation, second))
        for key in second.estimates if first is not second else ():
            images = _shared(key, first.estimates, second.estimates)
            if key.images != SAME or images is None:
                continue
            other = key._replace(images=images)
            apart = second.estimates[other].minus(first.estimates[other])
            cells = [cell for score in SCORES for cell in difference_cells(apart[score])]
            names = [_apart(evaluation, name), _apart(name, evaluation), key.column]
            names.append(COUNTED.get(key.matching, key.matching))
            told.append(f"| {' | '.join([*names, *cells])} |")
    if not told:
        return []
    head = "| evaluation | less | method | matching | accuracy | | mIoU | |"
    what = "**Differences between evaluations of the same images**, paired over them"
    return [f"{what}, other half where both have it", "", head, "|---" * 8 + "|", *told, ""]


def _apart(evaluation: str, other: str) -> str:
    """What an evaluation is told by that the other is not."""
    parts, others = (name.replace("; ", ", ").split(", ") for name in (evaluation, other))
    return ", ".join(part for part in parts if part not in others) or "as it is"


def _shared(key: Scored, *estimates: dict[Scored, Estimate]) -> str | None:
    """The images that all have the score on."""
    for images in (CROSS, SAME):
        if all(key._replace(images=images) in its for its in estimates):
            return images
    return None


def parser() -> ArgumentParser:
    """The command line."""
    result = command_parser(
        "summarize",
        "Mean and spread of the scores of several runs (seeds), as a Markdown table; and, where\n"
        "they were scored on the same images, how sure that mean is over images, and which\n"
        "differences between methods, and between settings (options of training, --merge), are\n"
        "some: those whose 95% interval excludes 0.",
        EXAMPLES,
    )
    result.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="scored run folders")
    return result


@command
def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    given = parser().parse_args(arguments).runs
    runs = list({run.resolve(): run for run in given}.values())  # a run counts once
    print(table(collect(runs)))
    if resampled := collect_resampled(runs):
        print(interval_table(resampled))


if __name__ == "__main__":
    sys.exit(main())
