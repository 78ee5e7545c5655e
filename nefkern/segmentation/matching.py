"""Which class a cluster stands for (section 4): majority voting and Hungarian matching.

Both look at the counts of a whole validation set, int64 ``[K, C]`` as made by
:func:`nefkern.segmentation.metrics.count_matrix`, and return the class of each cluster.
"""

from __future__ import annotations

from typing import Literal

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

UNMATCHED = -1
"""The "class" of a cluster that meets no annotated pixel."""


def majority_vote(counts: Tensor, by: Literal["iou", "count"] = "iou") -> Tensor:
    """Each cluster takes the class it fits best; several clusters may take the same one.

    Args:
        counts: int64 ``[K, C]``.
        by: ``"iou"``: the class whose pixels have the highest intersection over union with the
            cluster's (the authors' implementation); ``"count"``: the class with the most pixels in
            the cluster, the best that any assignment can do for pixel accuracy. A small cluster
            inside a dominant class often fits a rare class by IoU.

    Returns:
        int64 ``[K]``; ties go to the lower class, an empty cluster gets :data:`UNMATCHED`.

    Raises:
        ValueError: another ``by``.
    """
    if by == "iou":
        score = cluster_iou(counts)
    elif by == "count":
        score = counts
    else:
        raise ValueError(f"by must be 'iou' or 'count', got {by!r}")
    return torch.where(counts.sum(1) > 0, score.argmax(1), UNMATCHED)


def hungarian(counts: Tensor, by: Literal["count", "iou"] = "count") -> Tensor:
    """The one-to-one matching of the highest total, for K = C.

    Args:
        counts: int64 ``[K, C]``.
        by: ``"count"``: the total of pixels in agreement, the best that one class a cluster can do
            for pixel accuracy (the authors' implementation in both protocols, and the custom of
            the field: table 4.4's row is by it); ``"iou"``: that of the IoU of each cluster with
            its class, which does more for rare classes.

    Returns:
        int64 ``[K]``, a permutation.

    Raises:
        ValueError: K and C differ: no one-to-one matching would cover both; another ``by``.
    """
    if by not in ("count", "iou"):
        raise ValueError(f"by must be 'count' or 'iou', got {by!r}")
    k, c = counts.shape
    if k != c:
        raise ValueError(
            f"Hungarian matching needs as many clusters as classes, got {k} clusters, {c} classes"
        )
    total = counts if by == "count" else cluster_iou(counts)
    _, classes = linear_sum_assignment(total.cpu().numpy(), maximize=True)
    return torch.as_tensor(classes, dtype=torch.int64, device=counts.device)


def matched_confusion(counts: Tensor, assignment: Tensor) -> Tensor:
    """Merge clusters of one class: int64 ``[C, C]``, rows predicted, columns annotated.

    Raises:
        ValueError: a cluster with annotated pixels is unmatched (they would drop out of the score).
    """
    matched = assignment >= 0
    if counts[~matched].any():
        lost = counts[~matched].sum(1).nonzero().flatten().tolist()
        raise ValueError(f"{len(lost)} unmatched clusters hold annotated pixels")
    confusion = counts.new_zeros(counts.shape[1], counts.shape[1])
    return confusion.index_add_(0, assignment[matched], counts[matched])


def class_logits(logits: Tensor, assignment: Tensor, num_classes: int) -> Tensor:
    """Logits of classes: the highest among each class's clusters.

    Their argmax is the class of the winning cluster, so refining them starts from exactly the
    segmentation that the matching scores. (Summed probabilities would favour a class for having
    many clusters.)

    Args:
        logits: ``[K, ...]``.
        assignment: int64 ``[K]``; unmatched clusters are left out.

    Returns:
        ``[num_classes, ...]``, −inf where a class has no cluster.
    """
    merged = logits.new_full((num_classes, *logits.shape[1:]), -torch.inf)
    for label in assignment[assignment >= 0].unique().tolist():
        merged[label] = logits[assignment == label].amax(0)
    return merged


def cluster_iou(counts: Tensor) -> Tensor:
    """IoU of every cluster with every class, float64 ``[K, C]``; 0 where both are empty."""
    intersection = counts.double()
    union = intersection.sum(1, keepdim=True) + intersection.sum(0, keepdim=True) - intersection
    return intersection / union.clamp(min=1)
