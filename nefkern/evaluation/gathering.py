"""Counts of the images of all processes."""

from __future__ import annotations

from torch import Tensor

from nefkern.runtime import distributed
from nefkern.segmentation.image_counts import ImageCounts

#: By method, and by stage or matching.
Counts = dict[str, dict[str, ImageCounts]]


def gathered(counts: Counts) -> Counts:
    """All images in their order, in the main process; in the others those of their share."""
    return {
        name: {
            key: ImageCounts(c.num_clusters, c.num_classes, distributed.collected(c.images))
            for key, c in tables.items()
        }
        for name, tables in counts.items()
    }


def summed(counts: Counts) -> dict[str, dict[str, Tensor]]:
    """What was gathered, added up over the images, in all processes."""
    return {
        name: {key: distributed.from_main(table.total) for key, table in tables.items()}
        for name, tables in counts.items()
    }
