"""Batches for training: reproducible item by item, resumable step by step."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from nefkern.data.dataset import ImageDataset
from nefkern.data.transforms import TrainTransform
from nefkern.runtime.errors import UserError

logger = logging.getLogger(__name__)

_MASK64 = 2**64 - 1


class View(NamedTuple):
    """One augmented image.

    Attributes:
        index: of the image that was used, which is not the one asked for if that was bad.
        image: uint8 ``[3, crop, crop]``.
        problems: what was wrong with the images passed over, one line each.
    """

    index: int
    image: Tensor
    problems: tuple[str, ...] = ()


class Views(Dataset[View]):
    """A data set seen through the training augmentation.

    View ``i`` of epoch ``e`` is a function of ``(seed, e, i)`` and the files alone, whatever
    process computes it and whatever was computed before: each view has a generator of its own.

    Instead of an image that cannot be read the next one that can is taken (cyclically); the
    view names what it passed over. If the data set is strict this is an error instead.

    Args:
        dataset: images; annotations are not read.
        transform: the augmentation.
        seed: any integer.
        distinct: how many different views there are of each image, seen in turn epoch by epoch
            and the same for every seed, so that their feature maps can be kept; 0 draws new ones
            in every epoch.
    """

    def __init__(
        self, dataset: ImageDataset, transform: TrainTransform, *, seed: int = 0, distinct: int = 0
    ) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed
        self.distinct = distinct
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that indexing draws from."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> View:
        """View ``index`` of the chosen epoch; raises as :meth:`view`."""
        if not 0 <= index < len(self):  # what ends iteration over an object without __iter__
            raise IndexError(f"index {index} of {len(self)} views")
        return self.view(self.epoch, index)

    def view(self, epoch: int, index: int) -> View:
        """View ``index`` of ``epoch``.

        Raises:
            UserError: the image cannot be read and the data set is strict, or no image can.
        """
        problems: list[str] = []
        for offset in range(len(self)):
            used = (index + offset) % len(self)
            try:
                return View(used, self._draw(epoch, index, used), tuple(problems))
            except UserError as error:
                if self.dataset.strict:
                    raise
                problems.append(str(error))
        raise UserError(f"none of the {len(self)} images can be read, the first: {problems[0]}")

    def _draw(self, epoch: int, index: int, used: int) -> Tensor:
        seed = self.seed
        if self.distinct:
            seed, epoch = 0, epoch % self.distinct
        generator = generator_of(seed, epoch, index)
        short_side = self.transform.short_side(generator)
        image = self.dataset.image(used, min_side=short_side)
        return self.transform(image, generator, short_side=short_side)


def generator_of(*key: int) -> Generator:
    """A generator whose stream is a function of all of ``key``, well mixed."""
    state = np.random.SeedSequence([part & _MASK64 for part in key]).generate_state(1, np.uint64)
    return Generator().manual_seed(int(state[0]))


def train_loader(
    dataset: ImageDataset,
    transform: TrainTransform,
    *,
    batch_size: int,
    workers: int = 0,
    seed: int = 0,
    views: int = 0,
    pin_memory: bool = False,
    shard: tuple[int, int] = (0, 1),
) -> TrainLoader:
    """Batches of augmented images, see :class:`TrainLoader`; ``views`` as ``Views.distinct``."""
    return TrainLoader(
        Views(dataset, transform, seed=seed, distinct=views),
        batch_size=batch_size,
        workers=workers,
        pin_memory=pin_memory,
        shard=shard,
    )


class TrainLoader:
    """Iterable over one epoch's batches, uint8 ``[B, 3, crop, crop]`` each.

    Batch ``s`` of epoch ``e`` is a function of the seed, ``e`` and ``s``: it does not depend on
    the number of workers, nor on where iteration began. A short last batch is dropped unless it
    is the only one; which images that leaves out changes with the epoch. Worker processes live
    from one epoch to the next, until :meth:`close`, and read ahead across the end of an epoch: the
    first batch of the next is there as soon as any other.

    An unreadable image is replaced (:class:`Views`) and reported once, as a logged warning from
    the main process.

    Args:
        views: the augmented images.
        batch_size: B.
        workers: processes that read ahead; with 0 the caller's own thread does the work.
        pin_memory: whether batches come in page-locked memory, for copies to a GPU.
        shard: (r, n): of every batch only the r-th of n equal slices, one a process; together
            they are the batch that one process would get.
        steps: which views make a batch; None: all of an epoch's, in random order.

    Attributes:
        views, batch_size: as given.
        epoch, start_step: what the next iteration begins with, see :meth:`set_epoch`.

    Raises:
        UserError: ``batch_size`` below 1 or ``workers`` below 0. In iteration: an unreadable
            image in a strict data set, or no readable image at all.
        ValueError: a shard that is none of its n, or a batch that has no n equal slices.
    """

    def __init__(
        self,
        views: Views,
        *,
        batch_size: int,
        workers: int = 0,
        pin_memory: bool = False,
        shard: tuple[int, int] = (0, 1),
        steps: Steps | None = None,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch size: expected at least 1, got {batch_size}")
        if workers < 0:
            raise UserError(f"workers: expected 0 or more, got {workers}")
        self.views, self.batch_size = views, batch_size
        self.epoch, self.start_step = 0, 0
        self._steps = steps or _Steps(len(views), batch_size, views.seed, shard)
        self._reported: set[str] = set()
        self._workers, self._pin_memory = workers, pin_memory
        self._loader: DataLoader | None = None
        self._outcomes: Iterator[tuple[Tensor, list[str]] | str] | None = None
        self._next: tuple[int, int] | None = None  # position of the next outcome

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        return self._steps.per_epoch

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Choose what the next iteration yields: ``epoch`` from batch ``start_step`` on.

        Raises:
            ValueError: ``start_step`` is not within ``0 .. len(self)``.
        """
        if not 0 <= start_step <= len(self):
            raise ValueError(f"start_step: expected 0 to {len(self)}, got {start_step}")
        self.epoch, self.start_step = epoch, start_step

    def views_of(self, epoch: int, step: int) -> list[View]:
        """The views of one batch, read by the caller's own thread.

        Raises:
            UserError: as in iteration.
        """
        begin, self._steps.begin = self._steps.begin, (epoch, step)
        try:
            _, indices = next(iter(self._steps))
        finally:
            self._steps.begin = begin
        return [self.views.view(epoch, index) for index in indices]

    def __iter__(self) -> Iterator[Tensor]:
        epoch, first, last = self.epoch, self.start_step, len(self)
        if first < last:
            self._go_to((epoch, first))
        for step in range(first, last):
            self._next = None  # should the outcome be an exception
            outcome = self._outcome()
            if isinstance(outcome, str):
                self.close()  # now: a traceback may keep this loader for long
                raise UserError(outcome)
            self._next = (epoch, step + 1) if step + 1 < last else (epoch + 1, 0)
            images, problems = outcome
            self._report(problems)
            yield images

    def _outcome(self) -> tuple[Tensor, list[str]] | str:
        """The next one; what the end of a process is called by PyTorch is for its developers."""
        try:
            return next(self._outcomes)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            self.close()
            return (
                "a process that loads images died (of too little memory?): fewer --workers need "
                "less, --workers 0 none"
            )

    def _go_to(self, position: tuple[int, int]) -> None:
        """Let the next outcome be that of a position, an (epoch, step)."""
        if self._next == position:
            return
        if self._loader is None:
            self._loader = self._start()
        self._steps.begin = self._next = position
        self._outcomes = iter(self._loader)

    def close(self) -> None:
        """End the worker processes, if any; another iteration starts new ones."""
        self._loader = self._outcomes = self._next = None

    def _start(self) -> DataLoader:
        return DataLoader(
            _Batches(self.views),
            sampler=self._steps,
            batch_size=None,  # an item of _Batches is a batch already
            num_workers=self._workers,
            persistent_workers=self._workers > 0,
            pin_memory=self._pin_memory,
            worker_init_fn=leave_interrupts_to_the_main_process,
            generator=Generator(),  # else every iteration would draw from the global one
        )

    def _report(self, problems: Sequence[str]) -> None:
        for problem in problems:
            if problem not in self._reported:
                self._reported.add(problem)
                logger.warning("%s; skipped, another image takes its place", problem)


class Steps(Protocol):
    """Which views make a batch.

    Attributes:
        per_epoch: batches of an epoch.
        begin: the (epoch, step) that iteration begins with.
    """

    per_epoch: int
    begin: tuple[int, int]

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        """Epoch and indices of the views of one batch after another, without an end."""
        ...


class _Steps:
    """The sampler: one key a batch, from ``begin``, an (epoch, step), on and without an end.

    Workers outlive an epoch, so every key says which epoch it means.
    """

    def __init__(
        self, num_images: int, batch_size: int, seed: int, shard: tuple[int, int] = (0, 1)
    ) -> None:
        part, parts = shard
        if not 0 <= part < parts:
            raise ValueError(f"shard: expected (r, n) with 0 <= r < n, got {shard}")
        if parts > 1 and (batch_size % parts or batch_size > num_images):
            raise ValueError(
                f"shard: expected a batch of at most {num_images} images and a multiple of "
                f"{parts}, got {batch_size}"
            )
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        begin = part * (batch_size // parts)
        self._own = slice(begin, begin + batch_size // parts)
        self.per_epoch = max(1, num_images // batch_size)
        self.begin = (0, 0)

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        epoch, first = self.begin
        while True:
            generator = generator_of(self.seed, epoch)
            order = torch.randperm(self.num_images, generator=generator).tolist()
            for step in range(first, self.per_epoch):
                batch = order[step * self.batch_size : (step + 1) * self.batch_size]
                yield epoch, batch[self._own]
            epoch, first = epoch + 1, 0


class _Batches(Dataset):
    """What a worker computes: a batch and its problems, or the text of an error.

    The error travels as a value because one raised in a worker arrives with that worker's
    traceback in its message, and a :class:`UserError` is one line.
    """

    def __init__(self, views: Views) -> None:
        self.views = views

    def __getitem__(self, key: tuple[int, list[int]]) -> tuple[Tensor, list[str]] | str:
        epoch, indices = key
        try:
            views = [self.views.view(epoch, index) for index in indices]
        except UserError as error:
            return str(error)
        images = torch.stack([view.image for view in views])
        return images, [problem for view in views for problem in view.problems]


def leave_interrupts_to_the_main_process(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; only the trainer should act on it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
