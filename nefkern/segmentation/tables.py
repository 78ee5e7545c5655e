"""Evaluation results as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nefkern.data.labels import absent_classes
from nefkern.segmentation.evaluation import MATCHINGS, shown


def describe(evaluation: dict[str, Any]) -> str:
    """All there is to read: what was evaluated, the summary, the classes, and what is missing.

    Args:
        evaluation: what ``python -m nefkern.evaluate`` writes as JSON.
    """
    s = evaluation["settings"]
    window = f"window {s['window']}, stride {s['stride']}"
    # Scores from before images were resized do not have it.
    window += f", shorter side {s['resize']}" if s.get("resize") else ""
    ignored = f", without {', '.join(s['ignored'])}" if s["ignored"] else ""
    title = (
        f"{s['data_root']}, {s['split']}{ignored}: {evaluation['images']} images, "
        f"protocol {s['protocol']} ({window}), seed {s['seed']}"
    )
    reasons = {
        stage["no_hungarian"]
        for method in evaluation["methods"].values()
        for stage in method["stages"].values()
        if "no_hungarian" in stage
    }
    parts = [title, summary_table(evaluation), *honesty(evaluation)]
    parts += boundaries(evaluation)
    parts += ["IoU, majority by IoU:", class_table(evaluation)]
    pixels = evaluation["pixels"]
    absent = absent_classes(list(pixels), list(pixels.values()), evaluation.get("void_pixels"))
    parts += [f"note: {absent}"] if absent else []
    parts += [graph_times(evaluation["graph"])] if "graph" in evaluation else []
    parts += [crf_times(evaluation["crf"])] if "crf" in evaluation else []
    return "\n\n".join([*parts, *sorted(reasons)])


#: What drew the edges, by the names of stages in evaluations.
EDGE_TITLES = {
    "none": "-",
    "graph": "graph",
    "clusters": "CRF on clusters",
    "classes": "CRF on classes",
}


def column(method: str, stage: str) -> str:
    """A method's name at the head of a column, with what drew its edges."""
    return {"none": method, "graph": f"{method}+graph"}.get(stage, f"{method}+crf")


def graph_times(times: dict[str, float]) -> str:
    """What the solve on the pixel graph took, in a line."""
    return (
        f"edges on the pixel graph: {times['solves']} solves, each "
        f"{times['seconds_per_solve']:.2f} s"
    )


def crf_times(times: dict[str, float]) -> str:
    """What the CRF took, in a line."""
    return (
        f"CRF: {times['seconds_per_image']:.2f} s an image in the pass with it, worker processes: "
        f"{times['workers']}; {times['inferences']} inferences, each "
        f"{times['seconds_per_inference']:.2f} s"
    )


def summary_table(evaluation: dict[str, Any]) -> str:
    """Accuracy and mean IoU of every method and matching, in percent."""
    rows = [("method", "edges", "matching", "accuracy", "mIoU", "classes", "clusters")]
    count, clusters = len(evaluation["classes"]), evaluation["num_clusters"]
    for name, method in evaluation["methods"].items():
        for edges, stage in method["stages"].items():
            for matching, result in stage["matchings"].items():
                rows.append(
                    (
                        name,
                        EDGE_TITLES[edges],
                        MATCHINGS[matching],
                        _percent(result["accuracy"]),
                        _percent(result["mean_iou"]),
                        f"{result['classes_matched']}/{count}",
                        "-" if matching == "own" else f"{stage['clusters_used']}/{clusters}",
                    )
                )
    return aligned(rows, left=3)


#: As evaluations name the two scores.
_SCORES = ("accuracy", "mean_iou")


def honesty(evaluation: dict[str, Any]) -> list[str]:
    """How sure the scores are, as paragraphs; none of an evaluation from before they were asked."""
    if not evaluation.get("resampling"):
        return []
    asked, parts = evaluation["resampling"], []
    if asked["bootstrap"] or asked["splits"] or "bounds" in evaluation:
        how = ["beside what random clusters and the best class of every region get"]
        how = how if "bounds" in evaluation else []
        if asked["bootstrap"]:
            how.append(f"[95% intervals] by {asked['bootstrap']} resamples of the images")
        if asked["splits"]:
            how.append(
                "other half: matched on one half of the images, scored on the other, mean of "
                f"{2 * asked['splits']} halves"
            )
        parts += [f"How sure: {'; '.join(how)}", honest_table(evaluation)]
    if evaluation.get("differences"):
        parts += [
            "Differences between methods, on the other half where that was scored; called one only "
            "if the interval excludes 0:",
            difference_table(evaluation),
        ]
    return parts


def honest_table(evaluation: dict[str, Any]) -> str:
    """Every method and bound with intervals, on the same images and on the other half."""
    heads = ("accuracy", "mIoU", "other half: accuracy", "mIoU")
    rows = [("method", "edges", "matching", *heads)]
    bounds = {
        f"{bound['title'].split(':')[0]}: {name}": bound
        for name, bound in evaluation.get("bounds", {}).items()
    }
    for name, method in {**evaluation["methods"], **bounds}.items():
        for edges, stage in method["stages"].items():
            for matching, result in stage["matchings"].items():
                same = result | {"interval": stage.get("intervals", {}).get(matching)}
                cross = stage.get("cross", {}).get(matching)
                rows.append(
                    (
                        name,
                        EDGE_TITLES[edges],
                        MATCHINGS[matching],
                        *(with_interval(same, score) for score in _SCORES),
                        *(with_interval(cross, score) if cross else "-" for score in _SCORES),
                    )
                )
    return aligned(rows, left=3)


def with_interval(result: dict[str, Any], score: str, sign: str = "") -> str:
    """A score in percent with its interval in brackets, where there is one."""
    value, between = result[score], (result.get("interval") or {}).get(score)
    text = _percent(value, sign)
    return f"{text} {brackets(between, sign)}" if between else text


def brackets(between: Sequence[float], sign: str = "") -> str:
    """An interval in percent."""
    return f"[{', '.join(_percent(value, sign) for value in between)}]"


def difference_table(evaluation: dict[str, Any]) -> str:
    """Of every method less the first, under each matching."""
    rows = [("difference", "matching", "accuracy", "", "mIoU", "")]
    first = next(iter(evaluation["methods"]))
    found = [d for d in evaluation["differences"] if d["first"] == first]
    crossed = {(d["second"], d["matching"]) for d in found if d["images"] == "cross"}
    for d in found:
        pair = d["second"], d["matching"]
        if d["images"] == "cross" or pair not in crossed:
            cells = [cell for score in _SCORES for cell in difference_cells(d[score])]
            rows.append((f"{d['second']} - {first}", MATCHINGS[d["matching"]], *cells))
    return aligned(rows, left=2) if len(rows) > 1 else ""


def difference_cells(found: dict[str, Any]) -> tuple[str, str]:
    """A difference with its interval, and what may be said of it."""
    value, between = found["difference"], found["interval"]
    text = f"{_percent(value, '+')} {brackets(between, '+')}" if between else _percent(value, "+")
    if not found["differs"]:
        return text, "not told apart"
    return text, "higher" if between[0] > 0 else "lower"


def class_table(evaluation: dict[str, Any], matching: str = "iou") -> str:
    """IoU of every class, in percent, a column for each method; largest class first."""
    columns = [
        (
            column(name, edges),
            stage["matchings"][shown(stage["matchings"], matching)]["iou"],
        )
        for name, method in evaluation["methods"].items()
        for edges, stage in method["stages"].items()
    ]
    pixels = evaluation["pixels"]
    total = max(1, sum(pixels.values()))
    rows = [("class", "pixels %", *(name for name, _ in columns))]
    for label in sorted(pixels, key=pixels.get, reverse=True):
        share = f"{100 * pixels[label] / total:.1f}"
        rows.append((label, share, *(_percent(iou[label]) for _, iou in columns)))
    return aligned(rows, left=1)


def boundaries(evaluation: dict[str, Any]) -> list[str]:
    """The boundary F-scores, as paragraphs; none where they were not asked for."""
    rows = [("method", "edges", "matching", "boundary F")]
    for name, method in evaluation["methods"].items():
        for edges, stage in method["stages"].items():
            for matching, told in stage.get("boundary", {}).items():
                cell = with_interval(told, "f")
                rows.append((name, EDGE_TITLES[edges], MATCHINGS[matching], cell))
    if len(rows) == 1:
        return []
    parts = [
        "Boundary F-score (within 0.75% of the diagonal), mean over the images:",
        aligned(rows, left=3),
    ]
    rows = [("difference", "matching", "boundary F", "")]
    for d in evaluation.get("boundary_differences", []):
        pair = " - ".join(column(*d[side]) for side in ("second", "first"))
        rows.append((pair, MATCHINGS[d["matching"]], *difference_cells(d)))
    return [*parts, aligned(rows, left=2)] if len(rows) > 1 else parts


def _percent(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{100 * value:{sign}.1f}"


def aligned(rows: Sequence[Sequence[str]], left: int) -> str:
    """Rows of cells as lines, the first a heading; the first ``left`` columns flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
