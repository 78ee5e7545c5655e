"""The images that clusterings are fitted on: augmented training crops, as the authors'."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nefkern.data import ImageDataset, Views
from nefkern.data.reading import usable
from nefkern.runtime.progress import image_bar
from nefkern.segmentation.clusterer import Clusterer
from nefkern.segmentation.methods import CONTINUOUS
from nefkern.training.options import TrainOptions

if TYPE_CHECKING:
    from nefkern.segmentation.segmenter import Segmenter


def default_passes(options: TrainOptions) -> int:
    """How often K-means sees every training image of a run.

    A run with a fixed number of views has kept their maps: all of them. Where every view is a new
    one, two: the authors fit on about one pass, five million rows, and make another online.
    """
    if not options.augmented:
        return 1
    return options.views or 2


def training_crops(
    dataset: ImageDataset,
    options: TrainOptions,
    *,
    passes: int,
    seed: int,
    batch_size: int,
    indices: Sequence[int] | None = None,
    quiet: bool = False,
) -> Iterator[Tensor]:
    """Crops as a run's training has them, each image once a pass; unreadable ones are skipped.

    View number p of an image is that of the run's epoch p, and so are its maps in a feature cache.

    Args:
        dataset: the images.
        options: of the run: sizes, augmentation, views, and the seed that draws them.
        passes: views of each image.
        seed: of the images' order, another one in every pass.
        batch_size: crops at once.
        indices: which images; None takes all.
        quiet: no progress bar.

    Yields:
        uint8 ``[B, 3, crop, crop]``.
    """
    transform = options.transform()
    views = Views(dataset, transform, seed=options.seed, distinct=options.num_views)
    chosen, draw = list(range(len(dataset)) if indices is None else indices), random.Random(seed)
    keys = []
    for epoch in range(passes):
        draw.shuffle(chosen)
        keys += [(epoch, index) for index in chosen]
    batch: list[Tensor] = []
    with image_bar(len(keys), "fitting", disable=quiet) as bar:
        for _, image in usable(views, keys, bar.update):
            batch.append(image)
            if len(batch) == batch_size:
                yield torch.stack(batch)
                batch.clear()
        if batch:
            yield torch.stack(batch)


@torch.inference_mode()
def fit_clusters(segmenter: Segmenter, dataset: ImageDataset) -> Clusterer:
    """K-means on the outputs of a continuous ψ over its training images, by the run's seed."""
    options = segmenter.options
    clusterer = Clusterer(CONTINUOUS, segmenter.num_clusters, seed=options.seed)
    crops = training_crops(
        dataset,
        options,
        passes=default_passes(options),
        seed=options.seed,
        batch_size=min(4, options.batch_size),
    )
    for images in crops:
        clusterer.observe({"logits": segmenter.maps(images).logits})
    return clusterer.finish(segmenter.device)
