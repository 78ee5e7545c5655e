"""A table as Markdown, as numbers, and what tables there are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from nefkern.reproduction.paper import TABLES, Number, Table
from nefkern.reproduction.planning import COMPARED, Planner
from nefkern.reproduction.running import Measured

if TYPE_CHECKING:
    from PIL import Image


def _lines(measured: list[Measured]) -> Iterator[tuple[Measured, str, Number]]:
    for result in measured:
        for method, number in result.row.numbers:
            yield result, method, number


def markdown(table: Table, measured: list[Measured], planner: Planner, command_line: str) -> str:
    """The table: a line for every row, method and matching, the paper's number | the measured."""
    from nefkern.summarize import COUNTED, spread

    lines = [
        f"**{str(table).capitalize()}: {table.title}** (protocol {table.protocol}, %)",
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
    if table.is_figure:
        lines[2:2] = [f"![{table}]({table.stem}.png)", ""]
    notes = [f"`{command_line}`", *_notes(measured, planner)]
    notes += [f"{m.row.title} failed: {m.error}" for m in measured if m.error]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes), ""])


def _notes(measured: list[Measured], planner: Planner) -> Iterator[str]:
    """What sets the measured numbers apart from the paper's."""
    options = planner.options
    if options.data == "folder":
        yield (
            f"Measured on {options.data_root} in place of the paper's data sets: what can be held "
            "against the paper is the order of the rows, not the numbers. Rows that differ in the "
            "data set alone are one run."
        )
    for name in ("backbone", *COMPARED):
        if name in planner.given:
            yield f"--{name.replace('_', '-')} {planner.given[name]} in place of the rows' own."
    if options.scale_K != 1:
        yield f"K: the paper's times {options.scale_K:g}."
    if options.seeds > 1:
        yield "Measured: mean ± sample standard deviation over the seeds."
    if not any(e["settings"]["crf"] for result in measured for e in result.evaluations):
        yield (
            "The paper's numbers are after a CRF (which gains little, it says), the measured ones "
            'without; `--evaluate="--crf classes"` adds it.'
        )


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


def figure(measured: list[Measured]) -> Image.Image | None:
    """The pictures of a figure's rows, each of its first seed, below each other; None if there are
    none (yet)."""
    from PIL import Image

    from nefkern.segmentation.charts import comparison_sheet

    files = [file for result in measured if result.pictures for file in result.pictures[0]]
    if not files:
        return None
    methods = next(result.evaluations[0]["methods"] for result in measured if result.pictures)
    return comparison_sheet([Image.open(f) for f in files], ["image", "annotation", *methods])


def listing() -> str:
    """Every table and its rows."""
    width = max(len(name) for table in TABLES.values() for name in table.rows)
    numbers = 1 + max(map(len, TABLES))
    lines = []
    for table in TABLES.values():
        lines.append(f"{table.number:{numbers}}{table.title} ({table.protocol})")
        for row in table.rows.values():
            lines.append(f"    {row.name:{width}}  {row.title}: {', '.join(row.methods)}")
    return "\n".join(lines)
