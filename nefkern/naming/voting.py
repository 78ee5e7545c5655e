"""Names from a few annotated pictures."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from nefkern.data.dataset import ImageDataset
from nefkern.naming.names import Names
from nefkern.segmentation.matching import UNMATCHED, majority_vote
from nefkern.segmentation.metrics import count_matrix
from nefkern.segmentation.pictures import palette
from nefkern.segmentation.segmenter import Segmenter


def count_votes(segmenter: Segmenter, dataset: ImageDataset) -> Tensor:
    """How often cluster and class meet over annotated images, pixel by pixel: int64 ``[K, C]``.

    Raises:
        UserError: an image or annotation cannot be used.
    """
    counts = torch.zeros(segmenter.num_clusters, len(dataset.classes), dtype=torch.int64)
    for sample in dataset:
        segmenter.check_size(sample.image, sample.name)
        clusters = segmenter(sample.image)
        counts += count_matrix(clusters, sample.annotation.long(), *counts.shape)
    return counts


def vote(
    counts: Tensor, similarity: np.ndarray | None = None, by: Literal["iou", "count"] = "count"
) -> Tensor:
    """The class of every cluster, int64 ``[K]``, −1 where nothing tells.

    Args:
        counts: int64 ``[K, C]``.
        similarity: ``[K, K]`` of the clusters. With it, one that meets no annotated pixel takes
            the class of the most similar one that does.
        by: see :func:`nefkern.segmentation.matching.majority_vote`.
    """
    classes = majority_vote(counts, by)
    known = classes != UNMATCHED
    if similarity is None or not known.any():
        return classes
    like = torch.from_numpy(np.where(known.numpy()[None], similarity, -np.inf)).argmax(1)
    nearest = torch.from_numpy((similarity != 0).any(1)) & ~known  # one that wins somewhere
    return torch.where(nearest, classes[like], classes)


def voted_names(classes: Tensor, dataset: ImageDataset, checkpoint: str | None = None) -> Names:
    """Names by :func:`vote`: all classes of the data set in its order, so indices agree."""
    colours = list(dataset.colours) or palette(len(dataset.classes)).tolist()
    texts = ["#{:02x}{:02x}{:02x}".format(*colour) for colour in colours]
    names = {k: dataset.classes[c] for k, c in enumerate(classes.tolist()) if c != UNMATCHED}
    return Names(len(classes), names, dict(zip(dataset.classes, texts, strict=True)), checkpoint)
