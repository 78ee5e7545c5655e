"""Counts, pixel accuracy and mean IoU, over a whole data set at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

VOID = 255
"""Label of the pixels that no score looks at."""


@dataclass(frozen=True)
class Scores:
    """What a confusion matrix says, as fractions (0-1).

    ``mean_iou`` is the mean over the classes that occur in the annotations or in the prediction.
    A class that is there and never predicted counts as 0, as does one that is predicted and never
    there; one that is neither would be 0/0 and is left out (NaN in ``iou``). This is the
    convention of mmsegmentation and of torchmetrics' macro average, so that the figures compare;
    on a complete validation set every class occurs and all conventions agree.
    """

    accuracy: float
    mean_iou: float
    mean_class_accuracy: float
    iou: Tensor
    """float64 ``[C]``, NaN where the class occurs nowhere."""
    class_accuracy: Tensor
    """float64 ``[C]``, the recall; NaN where the annotations don't have the class."""
    support: Tensor
    """int64 ``[C]``, annotated pixels."""


def count_matrix(
    clusters: Tensor, labels: Tensor, num_clusters: int, num_classes: int, void: int = VOID
) -> Tensor:
    """How often cluster and class meet: int64 ``[num_clusters, num_classes]``.

    Args:
        clusters: integers of any shape, 0 to ``num_clusters − 1`` wherever the label isn't void.
        labels: integers of the same shape, 0 to ``num_classes − 1`` or ``void``.

    Raises:
        ValueError: shapes that differ, or an index outside its range.
    """
    if clusters.shape != labels.shape:
        raise ValueError(
            f"clusters and labels must have one shape, "
            f"got {tuple(clusters.shape)} and {tuple(labels.shape)}"
        )
    labels = labels.to(clusters.device)
    seen = labels != void
    clusters, labels = clusters[seen].long(), labels[seen].long()
    _check_range("clusters", clusters, num_clusters)
    _check_range("labels", labels, num_classes)
    pairs = clusters * num_classes + labels
    counts = torch.bincount(pairs, minlength=num_clusters * num_classes)
    return counts.view(num_clusters, num_classes)


def scores(confusion: Tensor) -> Scores:
    """Scores of a confusion matrix ``[C, C]``: rows predicted, columns annotated, counts of pixels.

    Without a single counted pixel all scores are NaN.
    """
    confusion = confusion.double().cpu()
    hit, predicted, annotated = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    iou = hit / (predicted + annotated - hit)  # 0/0 is NaN, which nanmean leaves out
    recall = hit / annotated
    return Scores(
        accuracy=(hit.sum() / confusion.sum()).item(),
        mean_iou=iou.nanmean().item(),
        mean_class_accuracy=recall.nanmean().item(),
        iou=iou,
        class_accuracy=recall,
        support=annotated.long(),
    )


def _check_range(name: str, values: Tensor, end: int) -> None:
    if values.numel() == 0:
        return
    low, high = (int(v) for v in values.aminmax())
    if low < 0 or high >= end:
        raise ValueError(f"{name} must lie in 0..{end - 1}, got values from {low} to {high}")
