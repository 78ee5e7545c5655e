"""The training loop: images → features → κ → ψ → objective, with a record and checkpoints."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from nefkern.data import TrainLoader, TrainTransform, open_dataset, train_loader
from nefkern.eigenfunction import (
    Eigenfunction,
    EigenfunctionConfig,
    annealed_temperature,
    cosine_schedule,
    live_clusters,
)
from nefkern.errors import UserError, first_line
from nefkern.features import Backbone, FeatureCache, load_backbone
from nefkern.graph import kappa, resolve_neighbours, standardized
from nefkern.objective import objective, scaled_beta
from nefkern.options import TrainOptions
from nefkern.runs import METRICS, Run

log = logging.getLogger(__name__)


def choose_device(name: str) -> torch.device:
    """The device of ``--device``; "auto" is CUDA where there is one.

    Raises:
        UserError: no such device on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
    config = EigenfunctionConfig(
        num_eigenfunctions=options.num_eigenfunctions,
        blocks=options.blocks,
        head_dim=options.head_dim,
        mlp_ratio=options.mlp_ratio,
        feature_map=options.feature_map,
        orthogonal=options.orthogonal_head,
        quantize=options.gumbel,
        standardize=options.standardize,
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
    """Train ψ and leave a run folder.

    Args:
        options: all of them; checked.
        run: the folder, made or resumed.
    """

    def __init__(self, options: TrainOptions, run: Run) -> None:
        self.options, self.run = options, run
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
        # Seeded again, so that ψ does not depend on how the backbone was initialised.
        torch.manual_seed(options.seed)
        self.psi = build_eigenfunction(options, self.backbone).to(self.device)
        self.optimizer = torch.optim.Adam(self.psi.parameters(), lr=options.lr, fused=True)
        self.graph_config = options.graph()
        self.beta = scaled_beta(options.num_eigenfunctions, options.beta)
        self.temperatures = options.temperatures()
        self.position = Position(batch_size=min(options.batch_size, len(self.dataset)))
        self.loader: TrainLoader | None = None
        self.interrupted = False
        self._check_rows()  # before anything is written
        self._resume()

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
        rows = self.position.batch_size * side * side
        resolve_neighbours(self.options.k, rows)
        if self.options.num_eigenfunctions > rows:
            raise UserError(
                f"--num-eigenfunctions {self.options.num_eigenfunctions}: expected at most {rows}, "
                "the rows (patches) of a batch; lower it, or raise --batch-size or --crop"
            )

    # ---- resume and checkpoints ----

    def _resume(self) -> None:
        found = self.run.load() if self.options.resume else None
        if found is None:
            self.run.write_config(self.options, **self.facts())
            self.run.truncate_metrics(0)
            return
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
        load_eigenfunction(self.psi, weights, self.run.folder)
        self.optimizer.load_state_dict(state["optimizer"])
        self.position = Position(**state["position"])
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        self.run.truncate_metrics(self.position.total)
        log.info("resumed %s after step %d", self.run.folder, self.position.total)

    def save(self) -> None:
        """Write a checkpoint of this moment."""
        on_gpu = self.device.type == "cuda"
        state = {
            "optimizer": self.optimizer.state_dict(),
            "position": vars(self.position).copy(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if on_gpu else None,
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
        }

    # ---- the loop ----

    def train(self) -> dict[str, float]:
        """Train to the end, or to an interrupt; returns the last step's record."""
        from torch.utils.tensorboard import SummaryWriter

        self.saved_at = time.monotonic()
        rows = self.run.metrics()
        last = rows[-1] if rows else {}
        with (
            self._interrupts(),
            open(self.run.path(METRICS), "a") as record,
            SummaryWriter(self.run.path("events"), purge_step=self.position.total + 1) as events,
        ):
            for last in self._steps():
                record.write(json.dumps(last) + "\n")
                record.flush()
                for name, value in last.items():
                    if name not in ("step", "epoch"):
                        events.add_scalar(name, value, last["step"])
                if time.monotonic() - self.saved_at >= self.options.checkpoint_seconds:
                    self.save()
                if self.interrupted:
                    break
        self.loader = None  # ends its processes
        self.save()
        if self.interrupted:
            raise KeyboardInterrupt(
                f"the checkpoint after step {self.position.total} is written; --resume goes on"
            )
        return last

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
                if not _is_out_of_memory(error):
                    raise
                if self.position.batch_size < 2:
                    raise UserError(
                        "out of memory with a single image: lower --crop or "
                        "--num-eigenfunctions, or take a smaller --backbone"
                    ) from error
                self._halve_batch()

    def _halve_batch(self) -> None:
        """Go on from the image that comes next; an odd batch repeats up to one batch of images."""
        old = self.position
        seen = old.step * old.batch_size
        self.loader = None
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        size = old.batch_size // 2
        self.position = Position(old.epoch, seen // size, old.total, size)
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
            )
        return self.loader

    def _epoch(self) -> Iterator[dict[str, float]]:
        loader = self._batches()
        loader.set_epoch(self.position.epoch, start_step=self.position.step)
        steps = len(loader)
        with tqdm(
            total=steps,
            initial=self.position.step,
            desc=f"epoch {self.position.epoch + 1}/{self.options.epochs}",
            unit="step",
            leave=self.position.epoch + 1 == self.options.epochs,
        ) as bar:
            started = time.perf_counter()
            for images in loader:
                progress = (self.position.epoch + self.position.step / steps) / self.options.epochs
                row = self._step(images, progress)
                now = time.perf_counter()
                row["images_per_second"] = len(images) / (now - started)  # with loading
                started = now
                self.position.step += 1
                self.position.total += 1
                bar.update()
                bar.set_postfix(_shown(row))
                yield {"step": self.position.total, "epoch": self.position.epoch + 1, **row}
        self.position.epoch += 1
        self.position.step = 0

    def _step(self, images: Tensor, progress: float) -> dict[str, float]:
        """One optimiser step on ``[B, 3, crop, crop]`` uint8 images."""
        temperature = annealed_temperature(progress, *self.temperatures)
        lr = cosine_schedule(progress, self.options.lr, self.options.final_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        images = images.to(self.device, non_blocking=True)
        maps = self.features(images)
        near_by = maps.high if self.options.graph_features == "high" else standardized(maps.concat)
        graph = kappa(near_by, self.backbone.pad(images), maps.grid, self.graph_config)
        if self.position.total == 0:
            self.psi.fit_scale(maps.concat)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.amp):
            logits = self.psi(maps.concat)
        outputs = self.psi.quantize(logits, temperature).flatten(0, 1)
        parts = objective(
            outputs, graph, beta=self.beta, t=self.options.t, minimum=self.options.min_norm
        )
        loss = parts.loss.item()
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} at step {self.position.total + 1}; a lower --lr may help"
            )
        self.optimizer.zero_grad(set_to_none=True)
        parts.loss.backward()
        self.optimizer.step()
        flat = logits.detach().float().flatten(0, 1)
        return {
            "loss": loss,
            "trace": parts.trace,
            "penalty": parts.penalty,
            "temperature": temperature,
            "live": int(live_clusters(flat).sum()),
            "dead": parts.dead,
            "off_diagonal": parts.off_diagonal,
            "confidence": (flat / temperature).softmax(-1).amax(-1).mean().item(),
            "lr": lr,
        }

    @contextlib.contextmanager
    def _interrupts(self) -> Iterator[None]:
        """Let Ctrl-C and a polite kill end the current step first; a second one ends it at once."""

        owner = os.getpid()

        def note(number: int, frame: Any) -> None:
            if os.getpid() != owner:  # a loading process; it ends with its owner
                return
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
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


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return (
        isinstance(error, (torch.OutOfMemoryError, MemoryError))
        or "out of memory" in text
        or "can't allocate memory" in text
        or "not enough memory" in text
    )


def _shown(row: dict[str, float]) -> dict[str, str]:
    return {
        "loss": f"{row['loss']:.3e}",
        "trace": f"{row['trace']:.3f}",
        "penalty": f"{row['penalty']:.1e}",
        "T": f"{row['temperature']:.2f}",
        "live": f"{row['live']}",
        "img/s": f"{row['images_per_second']:.1f}",
    }
