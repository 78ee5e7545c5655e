"""One optimiser step: images → features → κ → ψ → objective → gradients (sections 3.3 to 3.5)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nefkern import backends
from nefkern.images.backbone import Backbone, Features
from nefkern.images.feature_cache import FeatureCache
from nefkern.images.graph import kappa, standardized
from nefkern.ops import CSRGraph
from nefkern.runtime import distributed
from nefkern.runtime.distributed import together
from nefkern.runtime.precision import float32_products
from nefkern.spectral.eigenfunction import (
    Eigenfunction,
    annealed_temperature,
    cosine_schedule,
    live_clusters,
)
from nefkern.spectral.objective import objective, scaled_beta
from nefkern.training.options import TrainOptions
from nefkern.training.proof import Watch
from nefkern.training.record import KnownRecord, Record, check_finite, figures_of
from nefkern.training.teacher import Teacher


class StepAbandoned(Exception):
    """A step was left before it changed ψ or the optimiser."""


class TrainingStep:
    """ψ, its optimiser, and what brings them a step further.

    Several processes (:mod:`nefkern.runtime.distributed`) share a step: each has its share of the
    images and all of ψ; the gradients are summed, so that ψ stays the same in all.

    One process with a GPU waits for it nowhere in a step (``unread``): what the host would have to
    ask is decided on the device, or found out later (:class:`nefkern.training.record.Record`), and
    :meth:`update` can be captured in a CUDA graph.

    Args:
        options: all of them; checked.
        backbone: the frozen feature extractor, on the device to train on.
        features: the backbone with its cache.

    Attributes:
        psi: ψ, freshly initialised by the seed.
        logits: ψ as it is called, compiled if so asked.
        optimizer: Adam on ψ.
        teacher: what ψ learns from in the first steps, if it is to; None until it is there.
        watch: what is told of each graph, while a step is recorded; else None.
        heed: called between the parts of a step until ψ changes (within them:
            :mod:`nefkern.runtime.heeding`); may raise :class:`StepAbandoned`.
        shared: whether all processes build one graph over the whole batch.
        unread: whether the device is left to work without being asked.
    """

    def __init__(self, options: TrainOptions, backbone: Backbone, features: FeatureCache) -> None:
        self.options, self.backbone, self.features = options, backbone, features
        self.device = backbone.mean.device
        # Seeded here, so that ψ does not depend on how the backbone was initialised. All processes
        # have this seed: they start with the same ψ, and draw the same noise for the whole batch.
        torch.manual_seed(options.seed)
        config = options.eigenfunction(transformer=backbone.is_transformer)
        self.psi = Eigenfunction(backbone.concat_dim, config).to(self.device)
        self.logits = torch.compile(self.psi, fullgraph=True) if options.compile else self.psi
        self.unread = self.device.type == "cuda" and distributed.ranks() == 1
        self.optimizer = torch.optim.Adam(self.psi.parameters(), lr=options.lr, fused=True)
        self._place_rate()
        self.graph_config = options.graph()
        self.shared = options.graph_scope == "global" and distributed.ranks() > 1
        self.beta = scaled_beta(options.num_eigenfunctions, options.beta)
        self.temperatures = options.temperatures()
        self.teacher: Teacher | None = None
        self.watch: Watch | None = None
        self.heed: Callable[[], None] = lambda: None
        #: The reference, on whatever device, takes κ of its exact size only.
        self.padded = self.unread and backends.compiled("cuda")
        if self.unread:
            self.temperature = self._number(1.0)
            #: 1 once a loss was not finite: Adam then leaves ψ as it is, in all later steps too.
            self.optimizer.found_inf = self._number(0.0)

    def __call__(
        self, images: Tensor, progress: float, number: int, graph: CSRGraph | None = None
    ) -> Record:
        """One step.

        Args:
            images: uint8 ``[accumulate · B, 3, crop, crop]``, this process's share.
            progress: of the training, in [0, 1]: decides learning rate and temperature.
            number: of the step, from 1; the first one takes the scale of ψ's input.
            graph: κ of the images' patches; None: made of the batch.

        Returns:
            The step's record, over all processes. That of a step with the teacher has
            ``regression`` and ``cosine`` where others have the objective and its parts.

        Raises:
            UserError: the loss is not finite; ψ is then still that of the step before. (On a GPU by
                the record, when it is read.)
        """
        lr, temperature = self.schedule(progress)
        known = {"temperature": temperature, "lr": lr}
        self._set_rate(lr)
        images = images.to(self.device, non_blocking=True)
        batches = images.chunk(self.options.accumulate)
        with float32_products(self.device, tf32=self.options.tf32):
            if number == 1 and self.psi.config.standardize:
                self._fit_scale(batches[0])
            if self.teacher is not None and self.teacher.teaches(progress):
                self.optimizer.zero_grad(set_to_none=True)
                loss, figures = self._learn(batches)
            elif self.unread:
                self.temperature.fill_(temperature)
                return Record(number, self.update(batches, self.temperature, graph), known)
            else:
                self.optimizer.zero_grad(set_to_none=True)
                figures = figures_of(self._objective(batches, temperature, graph).cpu())
                loss = figures["loss"]
        with together():
            check_finite(loss, number)
        self.heed()
        distributed.total_gradients(self.psi.parameters())
        with together():
            self.optimizer.step()
        return KnownRecord(number, {**figures, **known})

    def update(
        self, batches: tuple[Tensor, ...], temperature: Tensor, graph: CSRGraph | None = None
    ) -> Tensor:
        """What a step does on a GPU, Adam included, without a word to the host.

        The learning rate (``optimizer.param_groups``) and the temperature are tensors on the
        device, so that a capture of this call goes on with other ones.

        Args:
            batches: ``accumulate`` times uint8 ``[B, 3, crop, crop]``, on the device.
            temperature: a number.
            graph: see :meth:`__call__`.

        Returns:
            ``[accumulate, 6 + K]``, for a :class:`nefkern.training.record.Record`.
        """
        self.optimizer.zero_grad(set_to_none=True)
        rows = self._objective(batches, temperature, graph)
        failed = ~rows[:, 0].isfinite().all()
        self.optimizer.found_inf.copy_(torch.maximum(self.optimizer.found_inf, failed.float()))
        self.optimizer.step()
        return rows

    def load_optimizer(self, state: dict[str, Any]) -> None:
        """Take Adam's state from a checkpoint, of whatever device it was written on."""
        self.optimizer.load_state_dict(state)
        self._place_rate()

    def optimizer_state(self) -> dict[str, Any]:
        """Adam's state for a checkpoint: the same whatever the device."""
        state = self.optimizer.state_dict()
        groups = [
            group | {"lr": float(group["lr"]), "capturable": False}
            for group in state["param_groups"]
        ]
        return state | {"param_groups": groups}

    def _number(self, value: float) -> float | Tensor:
        """A number, in the device's memory where the host is not asked."""
        return torch.tensor(value, device=self.device) if self.unread else value

    def _place_rate(self) -> None:
        """Keep the learning rate where the step needs it."""
        for group in self.optimizer.param_groups:
            group["lr"], group["capturable"] = self._number(self.options.lr), self.unread

    def _set_rate(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            if self.unread:
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def schedule(self, progress: float) -> tuple[float, float]:
        """Learning rate and temperature at ``progress`` of the training, in [0, 1]."""
        lr = cosine_schedule(progress, self.options.lr, self.options.final_lr)
        return lr, annealed_temperature(progress, *self.temperatures)

    def _objective(
        self, batches: tuple[Tensor, ...], temperature: float | Tensor, graph: CSRGraph | None
    ) -> Tensor:
        """Gradients of the objective; what is recorded, ``[accumulate, 6 + K]``."""
        # Graphs of a process's own need no messages: an error in any is then an error of all.
        with contextlib.nullcontext() if self.shared else together():
            return _packed([self.accumulate(batch, temperature, graph) for batch in batches])

    def _learn(self, batches: tuple[Tensor, ...]) -> tuple[float, dict[str, float]]:
        """Gradients of the regression on the teacher's targets: the loss, and the record."""
        rows, live = [], []
        for images in batches:
            maps = self.features(images)
            self.heed()
            logits = self._logits(maps)
            loss, cosine = self.teacher.loss(logits, maps, images)
            if self.watch is not None:
                targets = self.teacher.targets(maps, images)
                self.watch.graph(maps.concat, logits, targets=targets)
            self.heed()
            (loss / len(batches)).backward()
            rows.append(torch.stack([loss.detach(), cosine]))
            live.append(live_clusters(logits.detach()))
        loss, cosine = torch.stack(rows).mean(0).tolist()
        clusters = int(torch.stack(live).any(0).sum())
        return loss, {"regression": loss, "cosine": cosine, "live": clusters}

    def _logits(self, maps: Features) -> Tensor:
        """ψ's outputs, ``[B, h·w, K]``."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.amp):
            return self.logits(maps.concat, maps.grid)

    def accumulate(
        self, images: Tensor, temperature: float | Tensor, graph: CSRGraph | None = None
    ) -> Graph:
        """Forward and backward on one graph; its share of the mean loss goes to the gradients."""
        with together() if self.shared else contextlib.nullcontext():
            maps = self.features(images)
            self.heed()
            logits = self._logits(maps)
            outputs = self.psi.quantize(logits, temperature).flatten(0, 1)
        self.heed()
        graph = self._kappa(images, maps) if graph is None else graph
        self.heed()
        if self.watch is not None:
            self.watch.graph(maps.concat, logits, kappa=graph)
        parts = objective(
            outputs,
            graph,
            beta=self.beta,
            t=self.options.t,
            minimum=self.options.min_norm,
            shared=self.shared,
        )
        self.heed()
        # The gradients of processes are summed: right as it is for the one loss of a shared graph,
        # and a mean for the losses of graphs of their own.
        graphs = self.options.accumulate * (1 if self.shared else distributed.ranks())
        (parts.loss / graphs).backward()
        flat = logits.detach().float().flatten(0, 1)
        confidence = (flat / temperature).softmax(-1).amax(-1).mean()
        figures = torch.stack([parts.loss.detach(), confidence, *parts.figures])
        return Graph(figures, live_clusters(flat))

    def _fit_scale(self, images: Tensor) -> None:
        """Take the scale of ψ's input from the whole first batch."""
        with together():
            concat = self.features(images).concat
        self.psi.fit_scale(distributed.gather_rows(concat))

    def _kappa(self, images: Tensor, maps: Features) -> CSRGraph:
        """κ of this process's images, or of those of all."""
        every = self.options.graph_features == "all"
        near_by, images = maps.concat if every else maps.high, self.backbone.seen(images)
        if self.shared:  # features have no gradient, so that every process can make the same κ
            near_by, images = distributed.gather_rows(near_by), distributed.gather_rows(images)
        near_by = standardized(near_by) if every else near_by
        return kappa(near_by, images, maps.grid, self.graph_config, padded=self.padded)


class Graph(NamedTuple):
    """What is recorded of one graph, still on the device.

    Attributes:
        figures: ``[6]``: loss, confidence, trace, penalty, off_diagonal, dead.
        live: bool ``[K]``: the clusters that win somewhere.
    """

    figures: Tensor
    live: Tensor


def _packed(graphs: list[Graph]) -> Tensor:
    """``[graphs, 6 + K]``: one message from the device a step, not one a figure."""
    return torch.stack([torch.cat([figures, live.to(figures.dtype)]) for figures, live in graphs])
