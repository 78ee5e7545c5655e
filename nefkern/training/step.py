"""One optimiser step: images → features → κ → ψ → objective → gradients (sections 3.3 to 3.5)."""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

from nefkern.images.features import Backbone, FeatureCache, Features
from nefkern.images.graph import kappa, standardized
from nefkern.ops import CSRGraph
from nefkern.runtime import distributed
from nefkern.runtime.distributed import together
from nefkern.runtime.errors import UserError
from nefkern.spectral.eigenfunction import (
    Eigenfunction,
    annealed_temperature,
    cosine_schedule,
    live_clusters,
)
from nefkern.spectral.objective import objective, scaled_beta
from nefkern.training.options import TrainOptions
from nefkern.training.teacher import Teacher


class TrainingStep:
    """ψ, its optimiser, and what brings them a step further.

    Several processes (:mod:`nefkern.runtime.distributed`) share a step: each has its share of the
    images and all of ψ; the gradients are summed, so that ψ stays the same in all.

    Args:
        options: all of them; checked.
        backbone: the frozen feature extractor, on the device to train on.
        features: the backbone with its cache.

    Attributes:
        psi: ψ, freshly initialised by the seed.
        logits: ψ as it is called, compiled if so asked.
        optimizer: Adam on ψ.
        teacher: what ψ learns from in the first steps, if it is to; None until it is there.
        shared: whether all processes build one graph over the whole batch.
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
        self.optimizer = torch.optim.Adam(self.psi.parameters(), lr=options.lr, fused=True)
        self.graph_config = options.graph()
        self.shared = options.graph_scope == "global" and distributed.ranks() > 1
        self.beta = scaled_beta(options.num_eigenfunctions, options.beta)
        self.temperatures = options.temperatures()
        self.teacher: Teacher | None = None

    def __call__(
        self, images: Tensor, progress: float, number: int, graph: CSRGraph | None = None
    ) -> dict[str, float]:
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
            UserError: the loss is not finite; ψ is then still that of the step before.
        """
        lr, temperature = self.schedule(progress)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        images = images.to(self.device, non_blocking=True)
        batches = images.chunk(self.options.accumulate)
        if number == 1 and self.psi.config.standardize:
            self._fit_scale(batches[0])
        self.optimizer.zero_grad(set_to_none=True)
        if self.teacher is not None and self.teacher.teaches(progress):
            loss, figures = self._learn(batches)
        else:
            loss, figures = self._objective(batches, temperature, graph)
        with together():
            if not math.isfinite(loss):
                raise UserError(f"the loss is {loss} at step {number}; a lower --lr may help")
        distributed.total_gradients(self.psi.parameters())
        with together():
            self.optimizer.step()
        return {**figures, "temperature": temperature, "lr": lr}

    def schedule(self, progress: float) -> tuple[float, float]:
        """Learning rate and temperature at ``progress`` of the training, in [0, 1]."""
        lr = cosine_schedule(progress, self.options.lr, self.options.final_lr)
        return lr, annealed_temperature(progress, *self.temperatures)

    def _objective(
        self, batches: tuple[Tensor, ...], temperature: float, graph: CSRGraph | None
    ) -> tuple[float, dict[str, float]]:
        """Gradients of the objective: the loss, and the record."""
        known = () if graph is None else (graph,)
        # Graphs of a process's own need no messages: an error in any is then an error of all.
        with contextlib.nullcontext() if self.shared else together():
            graphs = [self.accumulate(batch, temperature, *known) for batch in batches]
        figures = _figures(graphs)
        return figures["loss"], figures

    def _learn(self, batches: tuple[Tensor, ...]) -> tuple[float, dict[str, float]]:
        """Gradients of the regression on the teacher's targets: the loss, and the record."""
        rows, live = [], []
        for images in batches:
            maps = self.features(images)
            logits = self._logits(maps)
            loss, cosine = self.teacher.loss(logits, maps, images)
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
        self, images: Tensor, temperature: float, graph: CSRGraph | None = None
    ) -> Graph:
        """Forward and backward on one graph; its share of the mean loss goes to the gradients."""
        with together() if self.shared else contextlib.nullcontext():
            maps = self.features(images)
            logits = self._logits(maps)
            outputs = self.psi.quantize(logits, temperature).flatten(0, 1)
        parts = objective(
            outputs,
            self._kappa(images, maps) if graph is None else graph,
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
        return kappa(near_by, images, maps.grid, self.graph_config)


class Graph(NamedTuple):
    """What is recorded of one graph, still on the device.

    Attributes:
        figures: ``[6]``: loss, confidence, trace, penalty, off_diagonal, dead.
        live: bool ``[K]``: the clusters that win somewhere.
    """

    figures: Tensor
    live: Tensor


def _figures(graphs: list[Graph]) -> dict[str, float]:
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
