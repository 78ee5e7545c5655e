"""Counts of clusters against classes, image by image: what resampling over images starts from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

#: An image's cells that are not 0, as positions in its flattened table, and their pixels.
ImageCells = tuple[Tensor, Tensor]


class Cells(NamedTuple):
    """All cells that are not 0, int64 ``[n]`` each: image, cluster, class, and pixels."""

    image: Tensor
    cluster: Tensor
    label: Tensor
    pixels: Tensor


class ImageCounts:
    """One table ``[K, C]`` an image, of which only the cells that are not 0 are kept.

    A picture holds a few clusters and classes of hundreds: 2,000 pictures with K = 256 and C = 60
    take some megabytes, where full tables would take 240.

    Args:
        num_clusters, num_classes: K and C.
        images: the images so far, as another one kept them.
    """

    def __init__(
        self, num_clusters: int, num_classes: int, images: Sequence[ImageCells] = ()
    ) -> None:
        self.num_clusters, self.num_classes = num_clusters, num_classes
        self.images = list(images)
        self._cells: Cells | None = None  # of the images so far, once they were asked for

    def __len__(self) -> int:
        return len(self.images)

    def add(self, table: Tensor) -> None:
        """Take the next image's counts, int64 ``[K, C]``."""
        flat = table.flatten().cpu()
        cells = flat.nonzero().flatten()
        self.images.append((cells.int(), flat[cells]))
        self._cells = None

    def cells(self) -> Cells:
        """All images together."""
        if self._cells is None:
            self._cells = self._joined()
        return self._cells

    def _joined(self) -> Cells:
        sizes = torch.tensor([len(cells) for cells, _ in self.images], dtype=torch.int64)
        image = torch.arange(len(self.images)).repeat_interleave(sizes)
        none = torch.zeros(0, dtype=torch.int64)
        flat = torch.cat([none, *(cells.long() for cells, _ in self.images)])
        pixels = torch.cat([none, *(pixels for _, pixels in self.images)])
        return Cells(image, flat // self.num_classes, flat % self.num_classes, pixels)

    def total(self, chosen: Tensor | None = None) -> Tensor:
        """The sum over all images, or over those where ``chosen`` (bool ``[I]``) is true: int64
        ``[K, C]``."""
        image, cluster, label, pixels = self.cells()
        if chosen is not None:
            pixels = pixels * chosen[image]
        total = torch.zeros(self.num_clusters * self.num_classes, dtype=torch.int64)
        total.index_add_(0, cluster * self.num_classes + label, pixels)
        return total.view(self.num_clusters, self.num_classes)

    def merged(self, groups: Tensor, count: int) -> ImageCounts:
        """The same of groups of clusters: ``groups`` is int64 ``[K]``, 0 to ``count`` − 1."""
        c, images = self.num_classes, []
        for flat, pixels in self.images:
            cells, at = (groups[flat // c] * c + flat % c).unique(return_inverse=True)
            total = torch.zeros(len(cells), dtype=torch.int64).index_add_(0, at, pixels)
            images.append((cells.int(), total))
        return ImageCounts(count, c, images)

    def annotated(self) -> Tensor:
        """Annotated pixels of each image, int64 ``[I]``."""
        image, _, _, pixels = self.cells()
        return torch.zeros(len(self), dtype=torch.int64).index_add_(0, image, pixels)
