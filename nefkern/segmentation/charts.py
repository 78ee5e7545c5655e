"""Scores to look at: bars of IoU by class, the confusion matrix, images beside their segments."""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from nefkern.segmentation.evaluation import shown
from nefkern.segmentation.pictures import GAP, colorize, grid, shrunk

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAMED = 30  # classes whose names and numbers still fit a confusion matrix
_BARS = 40  # classes whose bars stand in one row
_HEAD = 24  # pixels of a line of names above pictures
_FUNCTION = 224  # pixels of the longer side of an eigenfunction's map


def iou_bars(evaluation: dict[str, Any], matching: str = "iou") -> str:
    """IoU of every class that occurs by method, largest class first, as SVG.

    Args:
        evaluation: what ``python -m nefkern.evaluate`` writes as JSON.
        matching: which of its matchings.
    """
    from matplotlib.figure import Figure

    pixels = evaluation["pixels"]
    methods = {
        name: matchings[shown(matchings, matching)]["iou"]
        for name, method in evaluation["methods"].items()
        for matchings in [method["stages"]["none"]["matchings"]]
    }
    # A class that is neither annotated nor predicted has no IoU.
    met = [label for label in pixels if any(iou[label] is not None for iou in methods.values())]
    classes = sorted(met, key=pixels.get, reverse=True)
    rows = [classes[first : first + _BARS] for first in range(0, len(classes), _BARS)] or [[]]
    size = max(6.0, 0.45 * len(rows[0]) + 2), 3.6 * len(rows)
    figure = Figure(figsize=size, layout="constrained")
    every = figure.subplots(len(rows), sharey=True, squeeze=False)[:, 0]
    for axes, row in zip(every, rows, strict=True):
        place, width = np.arange(len(row)), 0.8 / len(methods)
        for number, (name, iou) in enumerate(methods.items()):
            heights = [100 * (iou[label] or 0) for label in row]
            axes.bar(place + (number + 0.5) * width - 0.4, heights, width, label=name)
        axes.set_xticks(place, map(_literal, row), rotation=90, fontsize=8)
        axes.set(ylabel="IoU, %", xlim=(-0.6, len(rows[0]) - 0.4))
        axes.grid(alpha=0.3, axis="y")
    every[0].legend(fontsize=8, ncols=len(methods))
    return svg(figure)


def confusion_matrix(confusion: Tensor, classes: Sequence[str], title: str) -> str:
    """Where each annotated class went, in percent of its pixels, as SVG.

    Args:
        confusion: int64 ``[C, C]``, rows predicted, columns annotated.
        classes: C names.
    """
    from matplotlib.figure import Figure

    total = confusion.sum(0, keepdim=True).clamp(min=1)
    share = (100 * confusion / total).T.numpy()  # a row an annotated class
    count = len(classes)
    side = 2.2 + 0.32 * min(count, 60)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    axes.set(title=title, xlabel="predicted", ylabel="annotated")
    names = [_literal(name) for name in classes]
    axes.set_xticks(range(count), names, rotation=90, fontsize=7)
    axes.set_yticks(range(count), names, fontsize=7)
    if count <= _NAMED:
        for (row, column), value in np.ndenumerate(share):
            if value >= 0.5:
                colour = "white" if value > 60 else "black"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=6,
                          color=colour)  # fmt: skip
    return svg(figure)


def legend(classes: Sequence[str], colours: np.ndarray) -> str:
    """The colour of every class, as SVG.

    Args:
        classes: C names.
        colours: uint8 ``[C, 3]``.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    columns = min(6, max(1, len(classes)))
    figure = Figure(figsize=(1.9 * columns, 0.2 + 0.18 * -(-len(classes) // columns)))
    patches = [Patch(color=colour / 255, label="-") for colour in colours.astype(float)]
    made = figure.legend(handles=patches, ncols=columns, fontsize=8, frameon=False, loc="center")
    # Only here: a label that begins with an underscore would be left out, as of "_background_".
    for text, name in zip(made.get_texts(), classes, strict=True):
        text.set_text(_literal(name))
    return svg(figure)


def _literal(name: str) -> str:
    """A name as it is, where a pair of dollars would begin and end a formula."""
    return name.replace("$", r"\$")


def comparison_row(
    image: Tensor, labels: Tensor, predicted: Sequence[Tensor], colours: np.ndarray
) -> Image.Image:
    """The picture "image | annotation | first method | second | ..." of the paper's figure 2.

    Large images are drawn smaller, see :func:`nefkern.segmentation.pictures.shrunk`.

    Args:
        image: uint8 ``[3, H, W]``.
        labels: ``[H, W]``, 255 = void, black.
        predicted: every method's classes, int64 ``[H, W]``, −1 = unmatched, black.
        colours: of the classes, uint8 ``[C, 3]``.
    """
    maps = (classes.numpy() for classes in (labels, *predicted))
    photo, *small = shrunk(image.permute(1, 2, 0).contiguous().numpy(), *maps)
    return grid([[photo, *(colorize(index.astype(np.int64), colours) for index in small)]])


def panels(row: Image.Image, count: int) -> list[Image.Image]:
    """The ``count`` pictures that :func:`comparison_row` has set side by side."""
    width = (row.width - GAP * (count - 1)) // count
    lefts = [i * (width + GAP) for i in range(count)]
    return [row.crop((left, 0, left + width, row.height)) for left in lefts]


def comparison_sheet(rows: Sequence[Sequence[Image.Image]], heads: Sequence[str]) -> Image.Image:
    """Pictures in rows and columns, as the paper's figures 2 and 3 are.

    Args:
        rows: at least one; of equally many pictures, each row of one size.
        heads: what the columns show, written above them.
    """
    below = grid(rows)
    sheet = Image.new("RGB", (below.width, below.height + _HEAD), "white")
    sheet.paste(below, (0, _HEAD))
    draw, left = ImageDraw.Draw(sheet), 0
    for number, head in enumerate(heads):
        width = max(row[number].width for row in rows)
        _write(draw, head, left, 0, width)
        left += width + GAP
    return sheet


def _write(draw: ImageDraw.ImageDraw, text: str, left: int, top: int, width: int) -> None:
    """A line of text in the middle of the ``_HEAD`` pixels above a picture."""
    draw.text((left + width / 2, top + _HEAD / 2), text, "black", _font(), anchor="mm")


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    import matplotlib

    # Pillow's own has no Greek.
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", 13)


def eigenfunction_maps(image: Tensor, probabilities: Tensor, count: int = 15) -> Image.Image:
    """An image beside its ``count`` eigenfunctions of most weight, bright where they are large.

    Args:
        image: uint8 ``[3, H, W]``.
        probabilities: ψ's outputs at any resolution, ``[K, h, w]``; each map is scaled to its own
            largest value.
    """
    order = probabilities.flatten(1).sum(1).argsort(descending=True)[:count]
    photo = Image.fromarray(image.permute(1, 2, 0).numpy())
    photo.thumbnail((240, 240))
    maps = []
    for values in probabilities[order]:
        grey = (255 * values / values.max().clamp(min=1e-9)).to(torch.uint8).numpy()
        maps.append(Image.fromarray(grey).resize(photo.size, Image.Resampling.NEAREST))
    cells = [photo, *maps]
    return grid([cells[first : first + 4] for first in range(0, len(cells), 4)])


class Functions(NamedTuple):
    """Functions on an image's patches, to be drawn side by side.

    ``heads``: a name for each; ``values``: ``[n, h, w]``; ``signed``: whether 0 has a meaning, and
    is drawn white between red above and blue below.
    """

    heads: list[str]
    values: Tensor
    signed: bool


def function_sheet(
    image: Tensor, rows: Sequence[Functions], covered: tuple[float, float] = (1.0, 1.0)
) -> Image.Image:
    """An image beside functions on its patches, patch by patch, each over its own range.

    Args:
        image: uint8 ``[3, H, W]``.
        rows: each a row of the sheet.
        covered: the share of the grid's rows and columns that the image covers, the rest is
            padding.
    """
    photo = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    scale = _FUNCTION / max(photo.size)
    photo = photo.resize([max(1, round(scale * side)) for side in photo.size])
    empty = Image.new("RGB", photo.size, "white")
    sheets = []
    for number, (heads, values, signed) in enumerate(rows):
        maps = [_function_map(v, photo.size, covered, signed=signed) for v in values]
        first = photo if number == 0 else empty
        sheets.append(comparison_sheet([[first, *maps]], ["", *heads]))
    return grid([[sheet] for sheet in sheets])


def _function_map(
    values: Tensor, size: tuple[int, int], covered: tuple[float, float], *, signed: bool
) -> Image.Image:
    import matplotlib

    values = values.double().cpu()
    low, high = values.min(), values.max()
    if signed:
        high = values.abs().max()
        low = -high
    shares = ((values - low) / (high - low).clamp(min=1e-12)).numpy()
    if high == low:  # constant: the middle of the range
        shares = np.full_like(shares, 0.5)
    colours = matplotlib.colormaps["RdBu_r" if signed else "viridis"](shares, bytes=True)
    whole = [round(side / share) for side, share in zip(size, covered[::-1], strict=True)]
    painted = Image.fromarray(np.ascontiguousarray(colours[..., :3]))
    return painted.resize(whole, Image.Resampling.NEAREST).crop((0, 0, *size))


def svg(figure: Figure) -> str:
    """A figure as SVG text, the same every time and without metadata."""
    import matplotlib

    text = io.StringIO()
    # Without metadata a page neither changes from run to run nor mentions other hosts.
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": "nefkern"}):
        figure.savefig(text, format="svg", metadata=nothing)
    return text.getvalue().partition("<svg")[1] + text.getvalue().partition("<svg")[2]
