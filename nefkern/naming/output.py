"""What ``python -m nefkern.segment --names`` writes of an image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from nefkern.data.constants import VOID
from nefkern.naming.formats import WRITERS, Annotated, palette_image
from nefkern.naming.instances import instances, require_tools, without_specks
from nefkern.naming.names import Names, class_names
from nefkern.runtime.errors import UserError
from nefkern.runtime.files import make_folder, replace_file
from nefkern.segmentation.listing import CLASSES, CONFIDENCE, OVERLAY
from nefkern.segmentation.pictures import BACKGROUND, overlay, write_png
from nefkern.segmentation.segmenter import Segmenter
from nefkern.segmentation.windows import Replay, sliding_tiles

LEGEND, CLASS_LIST = "classes.legend.png", "classes.txt"

Confidence = Callable[[np.ndarray], np.ndarray]
"""From classes ``[H, W]`` (255 void) to the probability of each pixel's, uint8 in 1/255."""


class NamedOutput:
    """Writes classes, confidence, overlay and annotations of images; the legend once.

    Args:
        names: of the run's clusters.
        folder: to write to; it exists.
        formats: names in :data:`nefkern.naming.choices.FORMATS`.
        min_area: regions smaller than this many pixels go to those around them.

    Raises:
        UserError: a package is missing; a data set's ``classes.txt`` lies in the folder.
    """

    def __init__(
        self, names: Names, folder: Path, formats: Sequence[str] = (), min_area: int = 0
    ) -> None:
        if formats or min_area:
            require_tools()
        if (folder / CLASS_LIST).exists() and not (folder / LEGEND).exists():
            raise UserError(
                f"--out {folder}: would replace {CLASS_LIST}, which is another's there, as of a "
                "data set; expected another folder"
            )
        self.folder, self.min_area = folder, min_area
        self.table = names.class_of()
        self.colours = names.palette()
        self._writers = [WRITERS[name](folder, names.classes, self.colours) for name in formats]
        write_png(legend(names.classes, self.colours), folder / LEGEND)
        replace_file(folder / CLASS_LIST, class_names(names.classes))

    def classes(self, clusters: Tensor) -> np.ndarray:
        """The class of every pixel, uint8 ``[H, W]``, 255 void, of clusters ``[H, W]``."""
        classes = self.table[clusters.numpy()]
        return without_specks(classes, self.min_area) if self.min_area else classes

    def write(
        self,
        file: Path,
        name: str,
        pixels: Tensor,
        clusters: Tensor,
        confidence: Confidence,
        *,
        text: Mapping[str, str] | None = None,
    ) -> list[int]:
        """Write all of an image; returns the classes that occur in it.

        Args:
            file, name: of the image, and of what is written.
            pixels: uint8 ``[3, H, W]``.
            clusters: integers ``[H, W]``.
            confidence: see :func:`confidence`.
            text: goes into the index image.
        """
        classes = self.classes(clusters)
        make_folder(self.folder, (self.folder / name).parent)
        write_png(Image.fromarray(confidence(classes)), self.folder / f"{name}{CONFIDENCE}")
        sheet = overlay(pixels, classes, colours=self.colours)
        write_png(sheet, self.folder / f"{name}{OVERLAY}")
        # Last: by its text --resume sees that all is there.
        write_png(palette_image(classes, self.colours), self.folder / f"{name}{CLASSES}", text)
        if self._writers:
            annotated = Annotated(file, name, classes, instances(classes))
            for writer in self._writers:
                writer.add(annotated)
        return [i for i in np.unique(classes).tolist() if i != VOID]

    def finish(self) -> None:
        """Write what is of all images."""
        for writer in self._writers:
            writer.finish()


def confidence(
    segmenter: Segmenter,
    replay: Replay,
    pixels: Tensor,
    window: int,
    stride: int,
    table: np.ndarray,
) -> Confidence:
    """How probable each pixel's class is: of the patches, all its clusters', interpolated.

    Args:
        segmenter: whose answers ``replay`` keeps.
        replay: after a pass over ``pixels`` in windows of this size and stride.
        table: class of every cluster, uint8 ``[K]``, 255 void.
    """
    table = table.astype(np.int64)
    groups = int(table[table != VOID].max(initial=-1)) + 2  # the last one is void
    group_of = torch.from_numpy(np.where(table == VOID, groups - 1, table))

    def measure(classes: np.ndarray) -> np.ndarray:
        answers = replay.select(slice(None))

        def predict(crops: Tensor) -> tuple[Tensor, tuple[float, float]]:
            logits, extent = answers(crops)
            shares = segmenter.probabilities(logits.float().movedim(1, 0)).cpu()
            merged = shares.new_zeros(groups, *shares.shape[1:]).index_add_(0, group_of, shares)
            return merged.movedim(0, 1), extent

        found = torch.empty(classes.shape, dtype=torch.uint8)
        for tile in sliding_tiles(predict, pixels, window, stride, batch_size=1):
            rows, cols = slice(*tile.rows), slice(*tile.cols)
            part = classes[rows, cols].astype(np.int64)
            index = torch.from_numpy(np.where(part == VOID, groups - 1, part))
            share = tile.logits.gather(0, index[None])[0]
            found[rows, cols] = (255 * share).round_().clamp_(0, 255).byte()
        return found.numpy()

    return measure


def legend(classes: Sequence[str], colours: np.ndarray, *, rows: int = 32) -> Image.Image:
    """The classes' colours and names, in columns; void is black."""
    font = ImageFont.load_default(size=14)
    entries = [*zip(classes, map(tuple, colours.tolist()), strict=True), ("(no name)", BACKGROUND)]
    widths = [font.getlength(name) for name, _ in entries]
    line, swatch, gap = 22, 30, 10
    wide = round(max(widths)) + swatch + 3 * gap
    columns = -(-len(entries) // rows)
    size = (wide * columns, line * min(rows, len(entries)) + gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for number, (name, colour) in enumerate(entries):
        left, top = wide * (number // rows) + gap, line * (number % rows) + gap // 2
        draw.rectangle([left, top + 2, left + swatch, top + line - 4], fill=colour)
        draw.text((left + swatch + gap, top + 1), name, fill="black", font=font)
    return sheet
