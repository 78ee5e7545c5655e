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
    parts = [title, summary_table(evaluation), "IoU, majority by IoU:", class_table(evaluation)]
    pixels = evaluation["pixels"]
    absent = absent_classes(list(pixels), list(pixels.values()), evaluation.get("void_pixels"))
    parts += [f"note: {absent}"] if absent else []
    parts += [crf_times(evaluation["crf"])] if "crf" in evaluation else []
    return "\n\n".join([*parts, *sorted(reasons)])


def crf_times(times: dict[str, float]) -> str:
    """What the CRF took, in a line."""
    return (
        f"CRF: {times['seconds_per_image']:.2f} s an image in the pass with it, worker processes: "
        f"{times['workers']}; {times['inferences']} inferences, each "
        f"{times['seconds_per_inference']:.2f} s"
    )


def summary_table(evaluation: dict[str, Any]) -> str:
    """Accuracy and mean IoU of every method and matching, in percent."""
    rows = [("method", "CRF on", "matching", "accuracy", "mIoU", "classes", "clusters")]
    count, clusters = len(evaluation["classes"]), evaluation["num_clusters"]
    for name, method in evaluation["methods"].items():
        for crf, stage in method["stages"].items():
            for matching, result in stage["matchings"].items():
                rows.append(
                    (
                        name,
                        "-" if crf == "none" else crf,
                        MATCHINGS[matching],
                        _percent(result["accuracy"]),
                        _percent(result["mean_iou"]),
                        f"{result['classes_matched']}/{count}",
                        "-" if matching == "own" else f"{stage['clusters_used']}/{clusters}",
                    )
                )
    return aligned(rows, left=3)


def class_table(evaluation: dict[str, Any], matching: str = "iou") -> str:
    """IoU of every class, in percent, a column for each method; largest class first."""
    columns = [
        (
            name if crf == "none" else f"{name}+crf",
            stage["matchings"][shown(stage["matchings"], matching)]["iou"],
        )
        for name, method in evaluation["methods"].items()
        for crf, stage in method["stages"].items()
    ]
    pixels = evaluation["pixels"]
    total = max(1, sum(pixels.values()))
    rows = [("class", "pixels %", *(name for name, _ in columns))]
    for label in sorted(pixels, key=pixels.get, reverse=True):
        share = f"{100 * pixels[label] / total:.1f}"
        rows.append((label, share, *(_percent(iou[label]) for _, iou in columns)))
    return aligned(rows, left=1)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


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
