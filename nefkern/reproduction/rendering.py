"""A table as Markdown, as numbers, and what tables there are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from nefkern.reproduction.paper import TABLES, TITLES, Cited, Number, Table
from nefkern.reproduction.planning import COMPARED, Planner
from nefkern.reproduction.running import Measured

if TYPE_CHECKING:
    from PIL import Image

    from nefkern.reproduction.comparing import Difference


def _lines(measured: list[Measured]) -> Iterator[tuple[Measured, str, Number]]:
    for result in measured:
        for method, number in result.row.numbers:
            yield result, method, number


def markdown(table: Table, measured: list[Measured], planner: Planner, command_line: str) -> str:
    """The table: a line for every row, method and matching, the paper's number | the measured."""
    title = f"**{str(table).capitalize()}: {table.title}**"
    lines = [title] if table.is_of_eigenfunctions else _rows(table, measured, planner, title)
    lines += _difference_lines(measured)
    if table.is_figure:
        lines[1:1] = ["", f"![{table}]({table.stem}.png)"]
    notes = [f"`{command_line}`", *_notes(table, measured, planner)]
    notes += [f"{m.row.title} failed: {m.error}" for m in measured if m.error]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes), ""])


def _rows(table: Table, measured: list[Measured], planner: Planner, title: str) -> list[str]:
    """Heading and cells."""
    from nefkern.summarize import COUNTED

    crf = planner.scoring.crf
    here = f"after a CRF on {crf}" if crf else "without a CRF"
    lines = [
        f"{title} (protocol {table.protocol}, %; paper: after a CRF on clusters, measured: {here})",
        "",
        "| | method | matching | accuracy: paper | measured | mIoU: paper | measured | runs |",
        "|---" * 8 + "|",
    ]
    for result, method, number in _lines(measured):
        cells = [
            result.row.title,
            method,
            COUNTED[number.matching],
            "" if number.accuracy is None else f"{number.accuracy:.1f}",
            _measured(result, method, number, "accuracy"),
            "" if number.mean_iou is None else f"{number.mean_iou:.1f}",
            _measured(result, method, number, "mean_iou"),
            str(len(result.scores(method, number.matching, "mean_iou"))),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for other in _cited(table, measured):
        lines.append(
            f"| {TITLES[other.data]} | {other.method} | cited | | | {other.mean_iou} | | |"
        )
    return lines


def _measured(result: Measured, method: str, number: Number, score: str) -> str:
    """Mean and spread over the seeds, and the interval of that mean over the images."""
    from nefkern.evaluation.honesty import SAME
    from nefkern.reproduction.comparing import estimates
    from nefkern.segmentation.tables import brackets
    from nefkern.summarize import spread

    values = result.scores(method, number.matching, score)
    if not values:
        return ""
    told = estimates(result, method, number.matching).get(SAME)
    between = told.intervals()[score] if told else None
    return f"{spread(values)} {brackets(between)}" if between else spread(values)


def _differences(measured: list[Measured]) -> list[Difference]:
    from nefkern.reproduction.comparing import Line, differences

    return differences([Line(r, method, n.matching) for r, method, n in _lines(measured)])


def _difference_lines(measured: list[Measured]) -> list[str]:
    """Which lines of the table are told apart; nothing where none have images in common."""
    from nefkern.evaluation.resampling import SCORES
    from nefkern.segmentation.tables import difference_cells
    from nefkern.summarize import COUNTED

    found = _differences(measured)
    if not found:
        return []
    lines = ["", "| difference | matching | accuracy | | mIoU | |", "|---" * 6 + "|"]
    for told in found:
        name = f"{told.second.name(told.first)} - {told.first.name(told.second)}"
        cells = [cell for score in SCORES for cell in difference_cells(told.scores[score])]
        lines.append(f"| {name} | {COUNTED[told.matching]} | {' | '.join(cells)} |")
    return lines


def _cited(table: Table, measured: list[Measured]) -> list[Cited]:
    """What the paper cites on the data sets of these rows."""
    shown = {result.row.data for result in measured}
    return [other for other in table.cited if other.data in shown]


#: What is to be told of the CRF, by the ``--crf`` of the measured.
CRF = {
    None: "Measured without a CRF. The paper's numbers are after one on clusters, before they are "
    'matched: `--evaluate="--crf clusters"` measures the same.',
    "clusters": "Measured after a CRF on clusters, before they are matched, as the paper's numbers "
    "are.",
    "classes": "Measured after a CRF on the matched classes. The paper's numbers are after one on "
    'clusters, before they are matched: `--evaluate="--crf clusters"` measures the same.',
}
BLACK = (
    "In protocol crop320 the authors' CRF saw black images (values in [0, 1] made whole numbers): "
    "what the paper says of its gain was measured without colours. Here it sees them."
)


def _notes(table: Table, measured: list[Measured], planner: Planner) -> Iterator[str]:
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
    if table.is_of_eigenfunctions:
        return
    if options.seeds > 1:
        yield "Measured: mean ± sample standard deviation over the seeds."
    if any(any(m.resampled) for m in measured):
        yield (
            "[95% intervals] over the images. Differences are paired over them, and of scores on "
            "the half of the images that classes were not matched on, where there are such; they "
            "are called some (higher, lower) only if their interval excludes 0."
        )
    yield CRF[planner.scoring.crf] + (f" {BLACK}" if table.protocol == "crop320" else "")
    if _cited(table, measured):
        yield "Cited: numbers of others that the paper has beside its own; not run here."


def as_dict(table: Table, measured: list[Measured], planner: Planner) -> dict[str, Any]:
    """The table as numbers, every seed's; JSON-ready."""
    from nefkern.reproduction.comparing import estimates
    from nefkern.training.runs import versions

    return {
        "table": table.number,
        "title": table.title,
        "protocol": table.protocol,
        "crf": {"paper": "clusters", "measured": planner.scoring.crf},
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
                "intervals": {
                    images: told.as_dict()
                    for images, told in estimates(result, method, number.matching).items()
                },
                "runs": result.runs,
                "error": result.error,
            }
            for result, method, number in _lines(measured)
        ],
        "differences": [told.as_dict() for told in _differences(measured)],
        "cited": [other._asdict() for other in _cited(table, measured)],
        "versions": versions(),
    }


def figure(table: Table, measured: list[Measured]) -> Image.Image | None:
    """The pictures of a figure's rows, each of its first seed, below each other; None if there are
    none (yet)."""
    from PIL import Image

    from nefkern.segmentation.charts import comparison_sheet
    from nefkern.segmentation.pictures import grid

    drawn = [result for result in measured if result.pictures and result.pictures[0]]
    if not drawn:
        return None
    if table.is_of_eigenfunctions:
        return grid([[Image.open(file)] for result in drawn for file in result.pictures[0]])
    heads = ["image", *(["annotation"] if table.annotation else []), *drawn[0].row.methods]
    return comparison_sheet([row for result in drawn for row in _shown(result, heads)], heads)


def _shown(result: Measured, heads: list[str]) -> Iterator[list[Image.Image]]:
    """Of every picture that an evaluation drew, perhaps for a table with more methods, the panels
    in question."""
    from PIL import Image

    from nefkern.segmentation.charts import panels

    names = ["image", "annotation", *result.evaluations[0]["methods"]]
    for file in result.pictures[0]:
        found = dict(zip(names, panels(Image.open(file), len(names)), strict=True))
        yield [found[head] for head in heads]


def listing() -> str:
    """Every table and its rows."""
    width = max(len(name) for table in TABLES.values() for name in table.rows)
    numbers = 1 + max(map(len, TABLES))
    lines = []
    for table in TABLES.values():
        protocol = "" if table.is_of_eigenfunctions else f" ({table.protocol})"
        lines.append(f"{table.number:{numbers}}{table.title}{protocol}")
        for row in table.rows.values():
            methods = f": {', '.join(row.methods)}" if row.methods else ""
            lines.append(f"    {row.name:{width}}  {row.title}{methods}")
    return "\n".join(lines)
