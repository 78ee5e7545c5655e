"""The images of an evaluation, as its protocol shows them: to fit on, and to score."""

from __future__ import annotations

import argparse
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from nefkern.data import BENCHMARKS, VOID, ImageDataset, Sample, eval_transform, open_dataset
from nefkern.data.reading import read_ahead
from nefkern.runtime import distributed
from nefkern.runtime.errors import UserError
from nefkern.runtime.progress import image_bar
from nefkern.segmentation.pictures import palette
from nefkern.segmentation.segmenter import Segmenter
from nefkern.training.presets import CLASSES

log = logging.getLogger(__name__)


class EvaluatedImages:
    """The annotated images that are scored, and those of other splits that are fitted on.

    Several processes (:mod:`nefkern.runtime.distributed`) share the images to score.

    Args:
        options: what :func:`nefkern.evaluate.parser` parses, with the data set known.
        segmenter: what sees them; an image that is too small for it is unusable.

    Attributes:
        dataset: the images to score.
        kept: indices of its classes that are scored, the ignored left out.
        void_pixels: of the images that :meth:`annotated` gave, in this process.

    Raises:
        UserError: no annotations, or no class to score.
    """

    def __init__(self, options: argparse.Namespace, segmenter: Segmenter) -> None:
        self.options, self.segmenter = options, segmenter
        self.dataset = self._open_annotated()
        self.kept = [i for i in range(len(self.dataset.classes)) if i not in self.dataset.ignored]
        if not self.kept:
            raise UserError("--ignore-class: every class is ignored, there is nothing to score")
        self.void_pixels = 0

    def __len__(self) -> int:
        """How many are scored, by all processes."""
        return len(self.indices(self.dataset))

    @property
    def classes(self) -> list[str]:
        """Names of the classes that are scored, the ignored left out."""
        return [self.dataset.classes[i] for i in self.kept]

    @property
    def colours(self) -> np.ndarray:
        """RGB of the classes that are scored, uint8 ``[C, 3]``: the publisher's, if there are."""
        if not self.dataset.colours:
            return palette(len(self.kept))
        return np.array(self.dataset.colours, np.uint8)[self.kept]

    def open(self, split: str) -> ImageDataset:
        """Another split of the data set, with the classes of the protocol."""
        o = self.options
        return open_dataset(
            o.data,
            root=o.data_root,
            split=split,
            classes=o.classes or CLASSES.get(o.data, {}).get(o.protocol),
            ignore_classes=o.ignore_class,
        )

    def indices(self, dataset: ImageDataset) -> list[int]:
        """The images of a data set that ``--limit`` leaves."""
        return list(range(len(dataset)))[: self.options.limit]

    def bar(self, title: str) -> tqdm:
        """Progress over this process's share of the images to score."""
        return image_bar(len(self._share()), title, disable=not distributed.is_main())

    def plain(self, dataset: ImageDataset) -> Iterator[Sample]:
        """Training images as those that are scored, without annotations, in an order drawn by the
        seed; unusable ones are reported and skipped."""
        yield from self._usable(dataset, dataset.image)

    def labelled(self, dataset: ImageDataset) -> Iterator[Sample]:
        """The same with annotations, in the classes that are scored.

        Raises:
            UserError: the data set has none.
        """
        if not dataset.annotated:
            raise UserError(
                f"--fit-split {self.options.fit_split}: has no annotations, which a linear probe "
                "is trained on"
            )
        for sample in self._usable(dataset, dataset.__getitem__):
            yield self._renumbered(sample)

    def annotated(self) -> Iterator[Sample]:
        """This process's share of the images, their labels numbered without the ignored classes.

        An unusable image is an error.
        """
        share = self._share()
        samples = self._samples(self.dataset.__getitem__, share)
        for index, future in zip(share, samples, strict=True):
            sample = future.result()
            self.segmenter.check_size(sample.image, self.dataset.paths[index])
            self.void_pixels += int((sample.annotation == VOID).sum())
            yield self._renumbered(sample)

    def _open_annotated(self) -> ImageDataset:
        o = self.options
        dataset = self.open(o.split)
        if not dataset.annotated:
            need = "scores need annotations/<split>/<image name>.png"
            if o.data in BENCHMARKS:
                part = BENCHMARKS[o.data].annotations
                need = f"get {part.source}" if part else f"{o.data} is only to train on"
            raise UserError(
                f"--data-root {o.data_root}: no annotations for split {o.split!r}; {need}"
            )
        return dataset

    def _share(self) -> Sequence[int]:
        """The images that this process scores."""
        return distributed.dealt(self.indices(self.dataset))

    def _samples(
        self, read: Callable[[int], Sample], indices: Sequence[int]
    ) -> Iterator[Future[Sample]]:
        """Samples as the protocol transforms them, each read while the one before is worked on."""
        protocol = "crop320" if self.options.protocol == "crop320" else "full"
        transform = eval_transform(protocol, size=self.options.size)
        yield from read_ahead(lambda index: transform(read(index)), indices)

    def _usable(
        self, dataset: ImageDataset, read: Callable[[int], Tensor | Sample]
    ) -> Iterator[Sample]:
        indices = self.indices(dataset)
        random.Random(self.options.seed).shuffle(indices)

        def sample(index: int) -> Sample:
            found = read(index)
            return found if isinstance(found, Sample) else Sample(dataset.names[index], found)

        with image_bar(len(indices), "fitting", disable=not distributed.is_main()) as bar:
            for index, future in zip(indices, self._samples(sample, indices), strict=True):
                try:
                    found = future.result()
                    self.segmenter.check_size(found.image, dataset.paths[index])
                except UserError as error:
                    log.warning("skipped: %s", error)
                else:
                    yield found
                bar.update()

    def _renumbered(self, sample: Sample) -> Sample:
        """A sample whose labels count the classes that are scored."""
        renumbered = torch.full((256,), VOID, dtype=torch.uint8)
        renumbered[self.kept] = torch.arange(len(self.kept), dtype=torch.uint8)
        return replace(sample, annotation=renumbered[sample.annotation.int()])
