"""Scores to look at: bars of IoU by class, the confusion matrix, images beside their segments."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from nefkern.segmentation.pictures import colorize, grid, shrunk

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAMED = 30  # classes whose names and numbers still fit a confusion matrix
_BARS = 40  # classes whose bars stand in one row
_HEAD = 24  # pixels of a line of names above pictures


def iou_bars(evaluation: dict[str, Any], matching: str = "iou") -> str:
    """IoU of every class that occurs by method, largest class first, as SVG.

    Args:
        evaluation: what ``python -m nefkern.evaluate`` writes as JSON.
        matching: which of its matchings.
    """
    from matplotlib.figure import Figure

    pixels = evaluation["pixels"]
    methods = {
        name: method["stages"]["none"]["matchings"][matching]["iou"]
        for name, method in evaluation["methods"].items()
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
        axes.set_xticks(place, row, rotation=90, fontsize=8)
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
    axes.set_xticks(range(count), classes, rotation=90, fontsize=7)
    axes.set_yticks(range(count), classes, fontsize=7)
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
    patches = [
        Patch(color=colour / 255, label=name)
        for name, colour in zip(classes, colours.astype(float), strict=True)
    ]
    figure.legend(handles=patches, ncols=columns, fontsize=8, frameon=False, loc="center")
    return svg(figure)


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
    photo, *maps = shrunk(image.permute(1, 2, 0).contiguous().numpy(), *maps)
    return grid([[photo, *(colorize(index.astype(np.int64), colours) for index in maps)]])


def comparison_sheet(rows: Sequence[Image.Image], heads: Sequence[str]) -> Image.Image:
    """Pictures of :func:`comparison_row` below each other, as the paper's figures 2 and 3 are.

    Args:
        rows: at least one.
        heads: what their panels show, written above them.
    """
    sheet = grid([[row] for row in rows])
    result = Image.new("RGB", (sheet.width, sheet.height + _HEAD), "white")
    result.paste(sheet, (0, _HEAD))
    draw, font = ImageDraw.Draw(result), ImageFont.load_default(14)
    for number, head in enumerate(heads):
        middle = (number + 0.5) * rows[0].width / len(heads)
        draw.text((middle, _HEAD / 2), head, "black", font, anchor="mm")
    return result


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


def svg(figure: Figure) -> str:
    """A figure as SVG text, the same every time and without metadata."""
    import matplotlib

    text = io.StringIO()
    # Without metadata a page neither changes from run to run nor mentions other hosts.
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": "nefkern"}):
        figure.savefig(text, format="svg", metadata=nothing)
    return text.getvalue().partition("<svg")[1] + text.getvalue().partition("<svg")[2]
