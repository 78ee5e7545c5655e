"""The training loop: images → features → κ → ψ → objective, with a record and checkpoints."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from nefkern import distributed
from nefkern.data import TrainLoader, TrainTransform, open_dataset, train_loader
from nefkern.distributed import (
    SharedOutOfMemory,
    agreed,
    from_main,
    is_main,
    is_out_of_memory,
    together,
)
from nefkern.eigenfunction import (
    Eigenfunction,
    EigenfunctionConfig,
    annealed_temperature,
    cosine_schedule,
    live_clusters,
)
from nefkern.errors import UserError, first_line
from nefkern.features import Backbone, FeatureCache, Features, load_backbone
from nefkern.graph import kappa, resolve_neighbours, standardized
from nefkern.objective import objective, scaled_beta
from nefkern.ops import CSRGraph
from nefkern.options import TrainOptions
from nefkern.runs import METRICS, Run

log = logging.getLogger(__name__)


def choose_device(name: str) -> torch.device:
    """The device of ``--device``; "auto" is CUDA where there is one.

    Of several processes on a machine each has the GPU of its number.

    Raises:
        UserError: no such device on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if distributed.ranks() > 1 and name.startswith("cuda"):
        if ":" in name:
            raise UserError(f"--device {name}: expected cuda; each process takes a GPU of its own")
        name = f"cuda:{distributed.local_rank()}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {name}: not usable on this machine ({first_line(error)})"
        ) from None
    return device


def build_eigenfunction(options: TrainOptions, backbone: Backbone) -> Eigenfunction:
    """ψ as the options describe it, for the maps of ``backbone``."""
    standardize = options.standardize
    if standardize is None:
        standardize = not backbone.is_transformer
    config = EigenfunctionConfig(
        num_eigenfunctions=options.num_eigenfunctions,
        blocks=options.blocks,
        head_dim=options.head_dim,
        mlp_ratio=options.mlp_ratio,
        feature_map=options.feature_map,
        orthogonal=options.orthogonal_head,
        quantize=options.gumbel,
        standardize=standardize,
    )
    return Eigenfunction(backbone.concat_dim, backbone.dim, config)


def load_eigenfunction(psi: Eigenfunction, weights: dict[str, Tensor], run: str | Path) -> None:
    """Load a run's checkpoint into ψ.

    Raises:
        UserError: it is of another version of nefkern.
    """
    try:
        psi.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"{run}: its checkpoint does not fit this version of nefkern ({first_line(error)})"
        ) from None


@dataclass
class Position:
    """Where training stands: the next batch is number ``step`` of ``epoch``."""

    epoch: int = 0
    step: int = 0
    total: int = 0  # optimiser steps so far
    batch_size: int = 0


class Trainer:
    """Train ψ and leave a run folder; several processes (:mod:`nefkern.distributed`) can share it.

    Each process has its share of the images and all of ψ; the gradients are summed, so that ψ stays
    the same in all. Only the main process writes.

    Args:
        options: all of them; checked.
        run: the folder, made or resumed.
    """

    def __init__(self, options: TrainOptions, run: Run) -> None:
        self.options, self.run = options, run
        self.loader: TrainLoader | None = None
        self.interrupted = False
        with together():
            self._build()
        self._resume()

    def _build(self) -> None:
        """All but what a checkpoint brings; nothing is written."""
        options = self.options
        self.device = choose_device(options.device)
        torch.manual_seed(options.seed)
        self.dataset = open_dataset(
            options.data, root=options.data_root, split=options.split, strict=options.strict
        )
        self.backbone = load_backbone(
            options.backbone, options.weights, high=options.high, device=self.device
        )
        folder = self._cache_folder()
        self.features = FeatureCache(folder, self.backbone, amp=options.amp)
        # Seeded again, so that ψ does not depend on how the backbone was initialised. All processes
        # have this seed: they start with the same ψ, and draw the same noise for the whole batch.
        torch.manual_seed(options.seed)
        self.psi = build_eigenfunction(options, self.backbone).to(self.device)
        self.logits = torch.compile(self.psi, fullgraph=True) if options.compile else self.psi
        self.optimizer = torch.optim.Adam(self.psi.parameters(), lr=options.lr, fused=True)
        self.graph_config = options.graph()
        self.shared = options.graph_scope == "global" and distributed.ranks() > 1
        self.beta = scaled_beta(options.num_eigenfunctions, options.beta)
        self.temperatures = options.temperatures()
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

    def _cache_folder(self) -> Path | None:
        if self.options.feature_cache:
            return Path(self.options.feature_cache)
        repeats = self.options.views or not self.options.augment
        return self.run.path("features") if repeats else None

    def _check_rows(self) -> None:
        """Refuse K or k that the rows of a batch cannot carry, before anything is computed."""
        if self.options.crop < self.backbone.patch:
            raise UserError(
                f"--crop {self.options.crop}: expected at least {self.backbone.patch}, "
                "a patch of the backbone"
            )
        side = -(-self.options.crop // self.backbone.patch)
        images = self.position.batch_size // (1 if self.shared else distributed.ranks())
        rows = images * side * side  # of a graph
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
            load_eigenfunction(self.psi, weights, self.run.folder)
            self.optimizer.load_state_dict(state["optimizer"])
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
            self.run.write_config(self.options, **self.facts())
            self.run.truncate_metrics(0)
            return None
        weights, metadata = found
        config = self.run.config()
        known = config.get("backbone", {}).get("digest")
        if known != self.backbone.identity:
            raise UserError(
                f"--resume: the backbone's weights ({self.backbone.identity}) are not those of the "
                f"run ({known}); give the --weights it was trained with"
            )
        images = config.get("dataset", {}).get("images")
        if images != len(self.dataset):
            raise UserError(
                f"--resume: the run was trained on {images} images, there are {len(self.dataset)} "
                "now; start anew with another --out"
            )
        state = self.run.load_state(metadata["state"])
        total = state["position"]["total"]
        self.run.truncate_metrics(total)
        log.info("resumed %s after step %d", self.run.folder, total)
        return weights, state

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
            "optimizer": self.optimizer.state_dict(),
            "position": vars(self.position).copy(),
            **self._generators(),
        }
        self.run.save(self.psi.state_dict(), state, self.position.total)
        self.saved_at = time.monotonic()

    def facts(self) -> dict[str, Any]:
        """What the configuration records beside the options."""
        return {
            "backbone": {
                "name": self.options.backbone,
                "digest": self.backbone.identity,
                "patch": self.backbone.patch,
                "dim": self.backbone.dim,
                "concat_dim": self.backbone.concat_dim,
            },
            "dataset": {"images": len(self.dataset), "classes": list(self.dataset.classes)},
            "device": str(self.device),
            "processes": distributed.ranks(),
        }

    # ---- the loop ----

    def train(self) -> dict[str, float]:
        """Train to the end, or to an interrupt; returns the last step's record."""
        self.saved_at = time.monotonic()
        rows = self.run.metrics() if is_main() else []
        last = rows[-1] if rows else {}
        with self._interrupts(), self._record() as write:
            for last in self._steps():
                with together():
                    write(last)
                    if time.monotonic() - self.saved_at >= self.options.checkpoint_seconds:
                        self.save()
                if distributed.any_rank(self.interrupted):
                    self.interrupted = True
                    break
        self.loader = None  # ends its processes
        with together():
            self.save()
        if self.interrupted:
            if not is_main():
                raise SystemExit(130)  # the main process says it
            raise KeyboardInterrupt(
                f"the checkpoint after step {self.position.total} is written; --resume goes on"
            )
        return last

    @contextlib.contextmanager
    def _record(self) -> Iterator[Callable[[dict[str, float]], None]]:
        """A function that writes a step's figures to the run folder, in the main process."""
        if not is_main():
            yield lambda row: None
            return
        from torch.utils.tensorboard import SummaryWriter

        with (
            open(self.run.path(METRICS), "a") as record,
            SummaryWriter(self.run.path("events"), purge_step=self.position.total + 1) as events,
        ):

            def write(row: dict[str, float]) -> None:
                record.write(json.dumps(row) + "\n")
                record.flush()
                for name, value in row.items():
                    if name not in ("step", "epoch"):
                        events.add_scalar(name, value, row["step"])

            yield write

    @property
    def finished(self) -> bool:
        """Whether every epoch is done."""
        return self.position.epoch >= self.options.epochs

    def _steps(self) -> Iterator[dict[str, float]]:
        """Every remaining step's record; memory that runs out halves the batch."""
        while not self.finished:
            try:
                yield from self._epoch()
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                agreed_on = isinstance(error, SharedOutOfMemory) and not self.shared
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
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        # Memory ran out before or after the step's noise was drawn, here and there.
        self._set_generators(from_main(self._generators))
        size = old.batch_size // (2 * ranks) * ranks
        self.position = Position(old.epoch, seen // (size * accumulate), old.total, size)
        if is_main():
            log.warning("out of memory: the batch is halved to %d images", size)

    def _transform(self) -> TrainTransform:
        size, crop = self.options.base_size(), self.options.crop
        if self.options.augment:
            return TrainTransform(size, crop)
        return TrainTransform(crop, crop, ratio=(1.0, 1.0), flip=0.0, photometric=False)

    def _batches(self) -> TrainLoader:
        """One loader for all epochs: it keeps its processes, and reports a bad image once."""
        if self.loader is None:
            self.loader = train_loader(
                self.dataset,
                self._transform(),
                batch_size=self.position.batch_size,
                workers=self.options.workers,
                seed=self.options.seed,
                views=self.options.views if self.options.augment else 1,
                shard=(distributed.rank(), distributed.ranks()),
            )
        return self.loader

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
                row = self._step(images, progress)
                now = time.perf_counter()
                count = len(images) * distributed.ranks()
                row["images_per_second"] = count / (now - started)  # with loading
                started = now
                self.position.step += 1
                self.position.total += 1
                bar.update()
                bar.set_postfix(_shown(row))
                yield {"step": self.position.total, "epoch": self.position.epoch + 1, **row}
        self.position.epoch += 1
        self.position.step = 0

    def _step(self, images: Tensor, progress: float) -> dict[str, float]:
        """One optimiser step on ``[B, 3, crop, crop]`` uint8 images, this process's share."""
        temperature = annealed_temperature(progress, *self.temperatures)
        lr = cosine_schedule(progress, self.options.lr, self.options.final_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        images = images.to(self.device, non_blocking=True)
        batches = images.chunk(self.options.accumulate)
        if self.position.total == 0 and self.psi.config.standardize:
            self._fit_scale(batches[0])
        self.optimizer.zero_grad(set_to_none=True)
        # Graphs of a process's own need no messages: an error in any is then an error of all.
        with contextlib.nullcontext() if self.shared else together():
            graphs = [self._accumulate(batch, temperature) for batch in batches]
        figures = _figures(graphs)
        with together():
            if not math.isfinite(figures["loss"]):
                raise UserError(
                    f"the loss is {figures['loss']} at step {self.position.total + 1}; "
                    "a lower --lr may help"
                )
        distributed.total_gradients(self.psi.parameters())
        with together():
            self.optimizer.step()
        return {**figures, "temperature": temperature, "lr": lr}

    def _fit_scale(self, images: Tensor) -> None:
        """Take the scale of ψ's input from the whole first batch."""
        with together():
            concat = self.features(images).concat
        self.psi.fit_scale(distributed.gather_rows(concat))

    def _accumulate(self, images: Tensor, temperature: float) -> _Graph:
        """Forward and backward on one graph; its share of the mean loss goes to the gradients."""
        with together() if self.shared else contextlib.nullcontext():
            maps = self.features(images)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.amp):
                logits = self.logits(maps.concat)
            outputs = self.psi.quantize(logits, temperature).flatten(0, 1)
        parts = objective(
            outputs,
            self._kappa(images, maps),
            beta=self.beta,
            t=self.options.t,
            minimum=self.options.min_norm,
            shared=self.shared,
        )
        # The gradients of processes are summed: right as it is for the one loss of a shared graph,
        # and a mean for the losses of graphs of their own.
        graphs = self.options.accumulate * (1 if self.shared else distributed.ranks())
        (parts.loss / graphs).backward()
        flat = logits.detach().float().flatten(0, 1)
        confidence = (flat / temperature).softmax(-1).amax(-1).mean()
        figures = torch.stack([parts.loss.detach(), confidence, *parts.figures])
        return _Graph(figures, live_clusters(flat))

    def _kappa(self, images: Tensor, maps: Features) -> CSRGraph:
        """κ of this process's images, or of those of all."""
        every = self.options.graph_features == "all"
        near_by, images = maps.concat if every else maps.high, self.backbone.pad(images)
        if self.shared:  # features have no gradient, so that every process can make the same κ
            near_by, images = distributed.gather_rows(near_by), distributed.gather_rows(images)
        near_by = standardized(near_by) if every else near_by
        return kappa(near_by, images, maps.grid, self.graph_config)

    @contextlib.contextmanager
    def _interrupts(self) -> Iterator[None]:
        """Let Ctrl-C and a polite kill end the current step first; a second one ends it at once."""

        owner, first = os.getpid(), 0.0

        def note(number: int, frame: Any) -> None:
            if os.getpid() != owner:  # a loading process; it ends with its owner
                return
            nonlocal first
            now = time.monotonic()
            # torchrun passes on what the terminal or the scheduler may have sent here as well.
            if self.interrupted and (distributed.ranks() == 1 or now > first + _ECHO_SECONDS):
                raise KeyboardInterrupt
            if not self.interrupted:
                first = now
            self.interrupted = True
            if is_main():
                tqdm.write("stopping after this step; once more to stop at once")

        before = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not in the main thread
                before[number] = signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


#: A second signal this soon after the first is the same one, come another way.
_ECHO_SECONDS = 5.0


class _Graph(NamedTuple):
    """What is recorded of one graph, still on the device.

    Attributes:
        figures: ``[6]``: loss, confidence, trace, penalty, off_diagonal, dead.
        live: bool ``[K]``: the clusters that win somewhere.
    """

    figures: Tensor
    live: Tensor


def _figures(graphs: list[_Graph]) -> dict[str, float]:
    """A step's record over its graphs, those of other processes included.

    Means; but clusters are live if they win anywhere, and ``dead`` is the largest number.
    """
    # One message from the device a step: each would wait for all work before it.
    rows = torch.stack([torch.cat([figures, live.to(figures.dtype)]) for figures, live in graphs])
    rows = rows.cpu()
    means = distributed.mean(rows[:, :5].double().mean(0)).tolist()
    loss, confidence, trace, penalty, off_diagonal = means
    dead, *live = distributed.largest(rows[:, 5:].amax(0).long()).tolist()
    return {
        "loss": loss,
        "trace": trace,
        "penalty": penalty,
        "live": sum(live),
        "dead": dead,
        "off_diagonal": off_diagonal,
        "confidence": confidence,
    }


def _shown(row: dict[str, float]) -> dict[str, str]:
    return {
        "loss": f"{row['loss']:.3e}",
        "trace": f"{row['trace']:.3f}",
        "penalty": f"{row['penalty']:.1e}",
        "T": f"{row['temperature']:.2f}",
        "live": f"{row['live']}",
        "img/s": f"{row['images_per_second']:.1f}",
    }
