"""Draw the pictures of ``docs/kernels.md``: ``python docs/kernels.py``.

Each is a row of panels, matrices of a few cells, with an arrow from one to the next. What is
highlighted is what the step reads or writes. Colours follow the reader's light or dark mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

CELL, GAP, TOP, LINE = 13, 74, 46, 15
FOLDER = Path(__file__).with_suffix("")

#: Light and dark colour, by class.
THEMES = {
    "ink": ("#1f2328", "#f0f6fc"),
    "muted": ("#59636e", "#9198a1"),
    "none": ("#eef1f4", "#21262d"),
    "some": ("#b6dcd8", "#1d4f4b"),
    "read": ("#0b7a75", "#4cc9b0"),
    "write": ("#8250df", "#b794f6"),
    "sure": ("#d4870f", "#f0b347"),
}


@dataclass(frozen=True)
class Panel:
    """A matrix of cells.

    Attributes:
        title: above it.
        size: rows and columns.
        shade: (row, column) to the class of a cell; "" draws none.
        lines: below it.
        step: beside the arrow to the next panel.
    """

    title: str
    size: tuple[int, int]
    shade: Callable[[int, int], str]
    lines: tuple[str, ...]
    step: str = ""


def panel(
    title: str, size: tuple[int, int], shade: Callable[[int, int], str], text: str, step: str = ""
) -> Panel:
    """A panel with its text cut at "|"."""
    return Panel(title, size, shade, tuple(text.split("|")), step)


def _triangle(i: int, j: int) -> str:
    return "write" if (i, j) == (1, 4) else "some" if j >= i else "none"


def _edge(i: int, j: int) -> bool:
    return i != j and ((i + j) % 4 == 1 or abs(i - j) == 1)


PICTURES = {
    "knn": (
        panel("X", (8, 4), lambda i, j: "read" if i in (1, 4) else "some",
              "N rows, C channels,|packed in float16 or|bfloat16 by rows", "products"),
        panel("tiles of XXᵀ", (8, 8), _triangle,
              "half of them: a tile|serves its rows|and its columns", "threshold"),
        panel("candidates", (8, 8), lambda i, j: "sure" if (i * 5 + j * 3) % 8 < 2 else "none",
              "what a proved bound|leaves of a row;|the rest is forgotten", "float32"),
        panel("re-rank, sort", (8, 3), lambda i, j: "write",
              "values from unrounded|rows; ties go to the|lower index"),
    ),
    "kappa": (
        panel("lists", (8, 3), lambda i, j: "read", "k neighbours of|each row, with weights",
              "transpose"),
        panel("incoming", (8, 5), lambda i, j: "sure" if j < (i * 3) % 5 + 1 else "",
              "who lists me: a|counting sort", "union"),
        panel("a row of A", (1, 12), lambda i, j: "write" if j % 3 == 0 or j == 7 else "none",
              "(A + Aᵀ)/2: one byte|a node says what the|row has already", "degrees"),
        panel("κ", (8, 8), lambda i, j: "write" if _edge(i, j) else "none",
              "scaled by D^(-1/2) on|both sides, the pixel|graph's α P added in place"),
    ),
    "spmm": (
        panel("row i of κ", (1, 12), lambda i, j: "read" if j in (1, 4, 5, 9) else "none",
              "columns and values,|a few hundred of N", "gather"),
        panel("x", (12, 6), lambda i, j: "read" if i in (1, 4, 5, 9) else "none",
              "the rows that it names|stream by, prefetched", "add up"),
        panel("row i of y", (1, 6), lambda i, j: "write",
              "stays in registers,|in float32, in the|entries' order"),
    ),
    "neuralef_loss": (
        panel("U", (8, 4), lambda i, j: "read", "unit columns", "spmm"),
        panel("Y = κU", (8, 4), lambda i, j: "write", "kept for the|backward pass", "Uᵀ Y"),
        panel("R", (4, 4), lambda i, j: "sure" if i == j else "some" if j > i else "none",
              "diagonal: the trace,|above it: the penalty", "backward"),
        panel("dU", (8, 4), lambda i, j: "write",
              "one product:|−(2t/K) Y +|(2βt²/K) Y triu(R)"),
    ),
    "linear_attention": (
        panel("φ(k)ᵀ", (3, 10), lambda i, j: "read" if j < 5 else "some",
              "keys by chunks of|tokens; φ is computed|as it is needed", "· v"),
        panel("state", (3, 3), lambda i, j: "sure", "D × D a head: all|that is kept of the|tokens",
              "φ(q) ·"),
        panel("out", (10, 3), lambda i, j: "write" if i < 5 else "some",
              "never an N × N|matrix; time grows|with N"),
    ),
    "add": (
        panel("row of a", (1, 12), lambda i, j: "read" if j % 2 or j == 4 else "none",
              "some 300 entries", "find"),
        panel("row of b", (1, 12), lambda i, j: "sure" if j in (4, 8) else "none",
              "some 15: the merge|walks these, by steps|that double", "copy runs"),
        panel("row of a + α b", (1, 12),
              lambda i, j: "sure" if j in (4, 8) else "write" if j % 2 else "none",
              "columns ascending,|each once"),
    ),
    "sddmm": (
        panel("row i of x", (1, 6), lambda i, j: "read", "stays in the|first-level cache", "·"),
        panel("y", (8, 6), lambda i, j: "read" if i in (1, 3, 4, 7) else "none",
              "rows of the entries,|four at a time", "sums"),
        panel("values", (1, 8), lambda i, j: "write" if j in (1, 3, 4, 7) else "none",
              "x_i · y_j where the|graph has an entry"),
    ),
}  # fmt: skip


def picture(panels: tuple[Panel, ...]) -> str:
    """One SVG."""
    widths = [max(p.size[1] * CELL, 7 * max(map(len, (p.title, *p.lines)))) for p in panels]
    tallest = max(p.size[0] for p in panels) * CELL
    width = sum(widths) + GAP * (len(panels) - 1) + 20
    height = TOP + tallest + 12 + LINE * max(len(p.lines) for p in panels) + 6
    parts, x = [], 10
    for number, (one, room) in enumerate(zip(panels, widths, strict=True)):
        parts += _panel(one, x, room, tallest)
        if number < len(panels) - 1:
            parts += _arrow(one.step, x + room, TOP + tallest / 2)
        x += room + GAP
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" font-size="12">\n'
        f"<style>{_style()}</style>\n{body}\n</svg>\n"
    )


def _style() -> str:
    def rules(which: int) -> str:
        return "".join(f".{name}{{fill:{pair[which]}}}" for name, pair in THEMES.items())

    return f"{rules(0)}@media(prefers-color-scheme:dark){{{rules(1)}}}"


def _panel(one: Panel, x: int, room: int, tallest: int) -> Iterator[str]:
    rows, columns = one.size
    left, top = x + (room - columns * CELL) / 2, TOP + (tallest - rows * CELL) / 2
    middle = x + room / 2
    yield f'<text class="ink" x="{middle:g}" y="{TOP - 16}" {_MIDDLE}>{escape(one.title)}</text>'
    for i in range(rows):
        for j in range(columns):
            if name := one.shade(i, j):
                yield (
                    f'<rect class="{name}" x="{left + j * CELL:g}" y="{top + i * CELL:g}" '
                    f'width="{CELL - 2}" height="{CELL - 2}" rx="2"/>'
                )
    for number, line in enumerate(one.lines):
        y = TOP + tallest + 12 + LINE * (number + 0.7)
        yield f'<text class="muted" x="{middle:g}" y="{y:g}" {_MIDDLE}>{escape(line)}</text>'


_MIDDLE = 'text-anchor="middle"'


def _arrow(step: str, x: float, y: float) -> Iterator[str]:
    end = x + GAP - 10
    yield f'<rect class="muted" x="{x + 10:g}" y="{y - 0.75:g}" width="{GAP - 24}" height="1.5"/>'
    yield f'<path class="muted" d="M{end:g} {y:g}l-7 -4v8z"/>'
    yield f'<text class="ink" x="{x + GAP / 2:g}" y="{y - 8:g}" {_MIDDLE}>{escape(step)}</text>'


def main() -> None:
    """Write all of them."""
    FOLDER.mkdir(exist_ok=True)
    for name, panels in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(picture(panels), "utf-8")


if __name__ == "__main__":
    main()
