"""The training loop: steps over epochs, with a record, checkpoints and their resumption."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from nefkern.data import ImageDataset, TrainLoader, train_loader
from nefkern.images.graph import resolve_neighbours
from nefkern.ops import CSRGraph
from nefkern.runtime import distributed
from nefkern.runtime.devices import cores
from nefkern.runtime.distributed import (
    SharedOutOfMemory,
    agreed,
    from_main,
    is_main,
    is_out_of_memory,
    together,
)
from nefkern.runtime.errors import UserError
from nefkern.runtime.files import make_folder, naming
from nefkern.runtime.heeding import heeding
from nefkern.spectral.eigenfunction import Eigenfunction
from nefkern.training.edges import DatasetEdges, edges_of
from nefkern.training.interrupts import Interrupts
from nefkern.training.options import TrainOptions
from nefkern.training.parts import Parts
from nefkern.training.proof import Recorder, first_row
from nefkern.training.record import Underway
from nefkern.training.runs import METRICS, Run
from nefkern.training.step import StepAbandoned, TrainingStep
from nefkern.training.teacher import check_data_set, teacher_of

log = logging.getLogger(__name__)

#: Loading processes that are started unasked: they bring more images than a GPU trains on.
_MOST_WORKERS = 8


@dataclass
class Position:
    """Where training stands: the next batch is number ``step`` of ``epoch``."""

    epoch: int = 0
    step: int = 0
    total: int = 0  # optimiser steps so far
    batch_size: int = 0

    def where(self) -> dict[str, int]:
        """Which batch comes next, as the record of steps says it."""
        return {"epoch": self.epoch, "at": self.step, "batch_size": self.batch_size}


class Trainer:
    """Train ψ and leave a run folder.

    Several processes (:mod:`nefkern.runtime.distributed`) can share it. Each has its share of the
    images and all of ψ; the gradients are summed, so that ψ stays the same in all. Only the main
    process writes.

    Args:
        options: all of them; checked.
        run: the folder, made or resumed.
    """

    def __init__(self, options: TrainOptions, run: Run) -> None:
        self.options, self.run = options, run
        self.loader: TrainLoader | None = None
        self.interrupts = Interrupts()
        self.underway = Underway()
        with together():
            self._build()
        self._resume()

    def _build(self) -> None:
        """All but what a checkpoint brings; nothing is written."""
        options = self.options
        self.parts = Parts.of(options, self.run)
        self.device, self.dataset = self.parts.device, self.parts.dataset
        self.backbone = self.parts.backbone
        self.step = TrainingStep(options, self.backbone, self.parts.features)
        self.recorder = Recorder(self.run, options, self.step)
        self.edges: DatasetEdges | None = None
        self.position = Position(batch_size=self._batch_size())
        self._check_rows()

    def _batch_size(self) -> int:
        """Images of a batch, over all processes: as many as asked for and there are."""
        asked, images, ranks = self.options.batch_size, len(self.dataset), distributed.ranks()
        if asked % ranks:
            raise UserError(
                f"--batch-size {asked}: expected a multiple of {ranks}, the number of processes"
            )
        size = min(asked, images // ranks * ranks)
        if size == 0:
            raise UserError(f"{images} images: expected at least one for each of {ranks} processes")
        if self.options.accumulate > images // size:
            raise UserError(
                f"--accumulate {self.options.accumulate}: expected at most {images // size}, the "
                "batches of an epoch; lower it, or lower --batch-size"
            )
        return size

    def _check_rows(self) -> None:
        """Refuse K or k that the rows cannot carry, before anything is computed."""
        crop = self.options.crop
        cells = math.prod(self.backbone.grid((crop, crop)))
        images = self.position.batch_size // (1 if self.step.shared else distributed.ranks())
        rows = images * cells  # of a graph
        check_data_set(self.options, len(self.dataset) * cells)
        if self.options.batch_kappa:
            resolve_neighbours(self.options.k, rows)
        if self.options.num_eigenfunctions > rows:
            raise UserError(
                f"--num-eigenfunctions {self.options.num_eigenfunctions}: expected at most {rows}, "
                "the rows (patches) of a batch; lower it, or raise --batch-size or --crop"
            )

    # ---- resume and checkpoints ----

    def _resume(self) -> None:
        found = from_main(self._open_run)
        if found is None:
            return
        weights, state = found
        with together():
            self.psi.load(weights, self.run.folder)
            self.step.load_optimizer(state["optimizer"])
            self.position = Position(**state["position"])
            if self.position.batch_size % distributed.ranks():
                raise UserError(
                    f"--resume: the run has batches of {self.position.batch_size} images, which "
                    f"{distributed.ranks()} processes cannot share evenly"
                )
            self._set_generators(state)

    def _open_run(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Begin the run's files, or read and check its checkpoint: weights and state."""
        found = self.run.load() if self.options.resume else None
        if found is None:
            self.run.write_config(self.options, **self.parts.facts(self.options))
            self.run.truncate_metrics(0)
            self.run.begin_steps(first_row(self.options, self.backbone.identity))
            return None
        weights, metadata = found
        config = self.run.config()
        self.parts.check_same(config)
        state = self.run.load_state(metadata)
        total = state["position"]["total"]
        self.run.truncate_metrics(total)
        self.run.truncate_steps(total)
        log.info("resumed %s after step %d", self.run.folder, total)
        self._lengthen(config["options"]["epochs"], Position(**state["position"]))
        return weights, state

    def _lengthen(self, before: int, reached: Position) -> None:
        """Record and tell that a run trains for more epochs than it was begun with, if it does."""
        now = self.options.epochs
        if now == before:
            return
        self.run.lengthen(now, reached.total)
        lr, temperature = self.step.schedule(reached.epoch / now)
        log.info(
            "%d epochs instead of %d: learning rate and temperature follow their cosines over all "
            "%d; epoch %d begins at %.2g and %.2f",
            *(now, before, now, reached.epoch + 1, lr, temperature),
        )

    def _generators(self) -> dict[str, Tensor | None]:
        """The generators' states: those of all processes, which draw the same noise."""
        on_gpu = self.device.type == "cuda"
        return {
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if on_gpu else None,
        }

    def _set_generators(self, state: dict[str, Any]) -> None:
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)

    def save(self) -> None:
        """Write a checkpoint of this moment: that of the main process, from which all go on."""
        if not is_main():
            return
        state = {
            "optimizer": self.step.optimizer_state(),
            "position": vars(self.position).copy(),
            **self._generators(),
        }
        self.run.save(self.psi.state_dict(), state, self.position.total)
        self.saved_at = time.monotonic()

    # ---- the loop ----

    def train(self) -> dict[str, float]:
        """Train to the end, or to an interrupt; returns the last step's record."""
        self._look_at_the_data_set()
        self.saved_at = time.monotonic()
        rows = self.run.metrics() if is_main() else []
        last = rows[-1] if rows else {}
        waits = []
        with self.interrupts.noted(), self._record() as write:
            for last in self._steps():
                waits.append(last["input_wait"])
                with together():
                    write(last)
                    if time.monotonic() - self.saved_at >= self.options.checkpoint_seconds:
                        last = self._write_all(write, last)  # what the checkpoint counts
                        self.save()
                if distributed.any_rank(self.interrupts.received):
                    self.interrupts.received = True
                    break
            last = self._write_all(write, last)
        self.loader = None  # ends its processes
        with together():
            self.save()
        self._tell_of_stalls(waits)
        if self.interrupts.received:
            if not is_main():
                raise SystemExit(130)  # the main process says it
            raise KeyboardInterrupt(
                f"the checkpoint after step {self.position.total} is written; --resume goes on"
            )
        return last

    def _write_all(
        self, write: Callable[[dict[str, float]], None], last: dict[str, float]
    ) -> dict[str, float]:
        """Wait for the records of all steps taken; returns the last one, or what it is given."""
        for last in self.underway.arrived(all=True):
            write(last)
        return last

    def _look_at_the_data_set(self) -> None:
        """Compute what the steps left need of all images together, or take up what is there."""
        if self.finished:
            return
        if self.options.teacher == "spectral":
            self.step.teacher = teacher_of(self.options, self.run, self.parts)
        if self.options.edges == "dataset":
            self.edges = edges_of(self.options, self.run, self.parts)

    def _tell_of_stalls(self, waits: list[float]) -> None:
        """One line, if more than a fifth of the usual step's time went into its input."""
        if is_main() and waits and (wait := statistics.median(waits)) > 0.2:
            log.info(
                "%.0f %% of the time of a step went into waiting for images: raise --workers "
                "(now %d), or see each image in a few --views only",
                100 * wait,
                self.workers,
            )

    @contextlib.contextmanager
    def _record(self) -> Iterator[Callable[[dict[str, float]], None]]:
        """A function that writes a step's figures to the run folder, in the main process."""
        if not is_main():
            yield lambda row: None
            return
        from torch.utils.tensorboard import SummaryWriter

        path, folder = self.run.path(METRICS), self.run.path("events")
        make_folder(self.run.folder, folder)
        with open(path, "ab", buffering=0) as record, contextlib.ExitStack() as stack:
            with naming(folder):
                events = SummaryWriter(folder, purge_step=self.position.total + 1)

            @stack.callback
            def close() -> None:
                with naming(folder):
                    events.close()

            def write(row: dict[str, float]) -> None:
                with naming(path):
                    record.write(json.dumps(row).encode() + b"\n")
                with naming(folder):
                    for name, value in row.items():
                        if name not in ("step", "epoch"):
                            events.add_scalar(name, value, row["step"])

            yield write

    @property
    def workers(self) -> int:
        """Processes that load images."""
        asked = self.options.workers
        return min(_MOST_WORKERS, cores() // 2) if asked is None else asked

    @property
    def psi(self) -> Eigenfunction:
        """The eigenfunctions in training."""
        return self.step.psi

    @property
    def finished(self) -> bool:
        """Whether every epoch is done."""
        return self.position.epoch >= self.options.epochs

    def _steps(self) -> Iterator[dict[str, float]]:
        """Every remaining step's record; memory that runs out halves the batch."""
        while not self.finished:
            try:
                yield from self._epoch()
            except StepAbandoned:
                return
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                agreed_on = isinstance(error, SharedOutOfMemory) and not self.step.shared
                if distributed.ranks() > 1 and not agreed_on:
                    # The others may be waiting for what this process cannot send.
                    raise UserError(
                        "out of memory: with several processes the batch is not halved, but for a "
                        "graph of a process's own; lower --batch-size, or take --graph-scope rank"
                    ) from error
                if self.position.batch_size < 2 * distributed.ranks():
                    raise UserError(
                        "out of memory with a single image: lower --crop or "
                        "--num-eigenfunctions, or take a smaller --backbone"
                    ) from error
                self._halve_batch()

    def _halve_batch(self) -> None:
        """Go on from the image that comes next; an odd batch repeats up to one batch of images."""
        old, accumulate, ranks = self.position, self.options.accumulate, distributed.ranks()
        seen = old.step * old.batch_size * accumulate
        self.loader = None
        self.step.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        # Memory ran out before or after the step's noise was drawn, here and there.
        self._set_generators(from_main(self._generators))
        size = old.batch_size // (2 * ranks) * ranks
        self.position = Position(old.epoch, seen // (size * accumulate), old.total, size)
        if is_main():
            log.warning("out of memory: the batch is halved to %d images", size)

    def _batches(self) -> TrainLoader:
        """One loader for all epochs: it keeps its processes, and reports a bad image once."""
        if self.loader is None:
            self.loader = loader_of(
                self.options,
                self.dataset,
                self.edges,
                self.position.batch_size,
                self.workers,
                pin_memory=self.device.type == "cuda",
            )
        return self.loader

    @contextlib.contextmanager
    def _abandoning(self) -> Iterator[None]:
        """Leave the step that is taken within if a signal comes, as if it had not been begun: on a
        processor it takes longer than a scheduler may wait."""
        if self.device.type != "cpu" or distributed.ranks() > 1:
            yield  # soon done; or the other processes are waiting for it
            return
        before = self._generators()
        self.step.heed = self._heed
        hooks = contextlib.nullcontext() if self.options.compile else heeding(self._heed)
        try:
            with hooks:
                yield
        except StepAbandoned:
            self._set_generators(before)
            raise

    def _heed(self) -> None:
        if self.interrupts.received:
            raise StepAbandoned

    def _graph(self) -> CSRGraph | None:
        """The next batch's part of the data set's κ, if batches are drawn along its edges."""
        if self.edges is None:
            return None
        position = self.position
        return self.edges.graph(position.batch_size, position.epoch, position.step)

    def _images(self, loader: TrainLoader) -> Iterator[Tensor]:
        """This process's images of every step left in the epoch, one batch after another."""
        accumulate = self.options.accumulate
        if accumulate == 1:
            yield from loader
            return
        batches = iter(loader)
        while len(step := list(itertools.islice(batches, accumulate))) == accumulate:
            yield torch.cat(step)

    def _epoch(self) -> Iterator[dict[str, float]]:
        loader = self._batches()
        accumulate = self.options.accumulate
        loader.set_epoch(self.position.epoch, start_step=self.position.step * accumulate)
        steps = len(loader) // accumulate
        left = (self.options.epochs - self.position.epoch) * steps - self.position.step
        self.recorder.plan(self.position.total + left)
        with tqdm(
            total=steps,
            initial=self.position.step,
            desc=f"epoch {self.position.epoch + 1}/{self.options.epochs}",
            unit="step",
            leave=self.position.epoch + 1 == self.options.epochs,
            disable=not is_main(),
        ) as bar:
            started = time.perf_counter()
            for images in agreed(self._images(loader)):
                progress = (self.position.epoch + self.position.step / steps) / self.options.epochs
                loaded = time.perf_counter()
                number, where = self.position.total + 1, self.position.where()
                with self._abandoning(), self.recorder.around(images, number, where):
                    record = self.step(images, progress, number, self._graph())
                now = time.perf_counter()
                count = len(images) * distributed.ranks()
                times = {
                    "images_per_second": count / (now - started),  # with loading
                    "input_wait": (loaded - started) / (now - started),
                }
                started = now
                self.position.step += 1
                self.position.total += 1
                where = {"step": self.position.total, "epoch": self.position.epoch + 1}
                self.underway.add(record, where, times)
                bar.update()
                for row in self.underway.arrived():
                    bar.set_postfix(_shown(row))
                    yield row
        self.position.epoch += 1
        self.position.step = 0


def loader_of(
    options: TrainOptions,
    dataset: ImageDataset,
    edges: DatasetEdges | None,
    batch_size: int,
    workers: int = 0,
    *,
    pin_memory: bool = False,
) -> TrainLoader:
    """The batches of a training: along the data set's edges, if it has them."""
    if edges is not None:
        return edges.loader(batch_size, workers, pin_memory=pin_memory)
    return train_loader(
        dataset,
        options.transform(),
        batch_size=batch_size,
        workers=workers,
        seed=options.seed,
        views=options.num_views,
        pin_memory=pin_memory,
        shard=(distributed.rank(), distributed.ranks()),
    )


#: What the bar shows of a step's record, where it has it.
_SHOWN = {
    "loss": ("loss", ".3e"), "trace": ("trace", ".3f"), "penalty": ("penalty", ".1e"),
    "regression": ("regression", ".3f"), "cosine": ("cosine", ".3f"), "T": ("temperature", ".2f"),
    "live": ("live", ""), "img/s": ("images_per_second", ".1f"),
}  # fmt: skip


def _shown(row: dict[str, float]) -> dict[str, str]:
    return {name: format(row[key], how) for name, (key, how) in _SHOWN.items() if key in row}
