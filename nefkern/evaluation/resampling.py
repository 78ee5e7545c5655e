"""How sure a score is: matching learnt on other images than are scored, and the bootstrap.

A score is of the images that happened to be annotated. Two things are told beside it:

- what it is where clusters take their classes on one half of the images and are scored on the other
  (:func:`cross_matched`): matching on the very images that are scored flatters many clusters;
- between what it would lie for other images of the same kind: the percentile bootstrap (Efron 1979)
  over images, with matchings held as they were learnt. Every method sees the same resamples, so
  that the interval of a difference is a paired one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nefkern.segmentation.image_counts import ImageCounts

LEVEL = 0.95
"""Coverage of every interval."""
SCORES = ("accuracy", "mean_iou")
"""The rows of what :func:`figures` returns."""
#: Resamples and halves are the same in every evaluation of the same images, whatever the seed of
#: the methods: scores of several runs are then paired too.
SEED = 0


class Part(NamedTuple):
    """Images scored under one matching: pixels of every class, image by image.

    Attributes:
        images: int64 ``[i]``: which images.
        hits, predicted, annotated: float64 ``[i, C]``: pixels of the class that are predicted as
            it, that are predicted as it, and that are annotated as it. Whole numbers below 2^53.
    """

    images: Tensor
    hits: Tensor
    predicted: Tensor
    annotated: Tensor


def part(counts: ImageCounts, assignment: Tensor, chosen: Tensor | None = None) -> Part:
    """Score images under a matching.

    Args:
        counts: of I images.
        assignment: int64 ``[K]``: the class of each cluster. Pixels of an unmatched one (−1), one
            that the matching has not met, are predicted as nothing, which is wrong.
        chosen: bool ``[I]``: only these images.
    """
    image, cluster, label, pixels = counts.cells()
    found, pixels = assignment.cpu()[cluster], pixels.double()

    def by_class(classes: Tensor, counted: Tensor) -> Tensor:
        table = torch.zeros(len(counts), counts.num_classes, dtype=torch.float64)
        index = (image[counted], classes[counted])
        return table.index_put_(index, pixels[counted], accumulate=True)

    hits, predicted = by_class(label, found == label), by_class(found, found >= 0)
    annotated = by_class(label, torch.ones_like(label, dtype=torch.bool))
    images = torch.arange(len(counts)) if chosen is None else chosen.nonzero().flatten()
    return Part(images, hits[images], predicted[images], annotated[images])


def from_confusions(confusions: ImageCounts) -> Part:
    """Score images of which the confusion is known, rows predicted, columns annotated."""
    return part(confusions, torch.arange(confusions.num_clusters))


def figures(parts: Sequence[Part], weights: Tensor) -> Tensor:
    """Pixel accuracy and mean IoU, the mean over parts: float64 ``[2, B]``, as fractions.

    Args:
        parts: at least one.
        weights: float64 ``[B, I]``: how often each image counts.

    Returns:
        NaN where no image with an annotated pixel counts. As in
        :func:`nefkern.segmentation.metrics.scores`, a class that neither occurs nor is predicted is
        left out.
    """
    return torch.stack([_figures(p, weights[:, p.images]) for p in parts]).nanmean(0)


def _figures(p: Part, weights: Tensor) -> Tensor:
    hits, predicted, annotated = (weights @ x for x in p[1:])
    iou = hits / (predicted + annotated - hits)  # 0/0 is NaN, which nanmean leaves out
    accuracy = hits.sum(1) / annotated.sum(1)
    mean_iou = torch.where(accuracy.isnan(), accuracy, iou.nanmean(1))
    return torch.stack([accuracy, mean_iou])


# ---- matching on other images ----


def halves(annotated: Tensor, splits: int, seed: int = SEED) -> list[Tensor]:
    """Random halves of the images with an annotated pixel.

    Args:
        annotated: int64 ``[I]``, annotated pixels of each image.
        splits: how often to halve.

    Returns:
        ``2 · splits`` masks bool ``[I]``, the two halves of a split beside each other; none where
        fewer than two images are annotated. The first half of an odd number is the smaller.
    """
    usable = (annotated > 0).nonzero().flatten()
    if len(usable) < 2:
        return []
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(splits):
        mixed = usable[torch.randperm(len(usable), generator=generator)]
        for own in (mixed[: len(mixed) // 2], mixed[len(mixed) // 2 :]):
            found.append(torch.zeros(len(annotated), dtype=torch.bool).index_fill_(0, own, True))
    return found


def cross_matched(
    counts: ImageCounts, find: Callable[[Tensor], dict[str, Tensor]], masks: Sequence[Tensor]
) -> dict[str, list[Part]]:
    """Score each half of the images under matchings learnt on the other.

    Args:
        counts: of I images.
        find: from counts int64 ``[K, C]`` to matchings by name, int64 ``[K]`` each.
        masks: of :func:`halves`.

    Returns:
        By matching, a part for each half; :func:`figures` is then the mean over halves.
    """
    found: dict[str, list[Part]] = {}
    for first, second in zip(masks[::2], masks[1::2], strict=True):
        for learnt, scored in ((first, second), (second, first)):
            for name, assignment in find(counts.total(learnt)).items():
                found.setdefault(name, []).append(part(counts, assignment, scored))
    return found


# ---- the bootstrap ----


def resamples(images: int, count: int, seed: int = SEED) -> Tensor:
    """How often each image is drawn in each resample, with replacement: float64 ``[B, I]``."""
    drawn = torch.randint(images, (count, images), generator=torch.Generator().manual_seed(seed))
    ones = torch.ones(drawn.shape, dtype=torch.float64)
    return torch.zeros(count, images, dtype=torch.float64).scatter_add_(1, drawn, ones)


def interval(values: Tensor) -> tuple[float, float] | None:
    """The middle 95% of resampled figures ``[B]``; None where there is none."""
    finite = values[values.isfinite()].double()
    if not len(finite):
        return None
    tail = (1 - LEVEL) / 2
    low, high = finite.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def differs(between: tuple[float, float] | None) -> bool:
    """Whether the interval of a difference excludes zero: only then it is called one."""
    return between is not None and (between[0] > 0 or between[1] < 0)
