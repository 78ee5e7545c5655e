"""``--method spectral``: the data set's κ, its leading eigenvectors, and K-means on them."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from nefkern import ops
from nefkern.data import Views
from nefkern.data.reading import usable
from nefkern.images.graph import pixel_neighbours, resolve_neighbours
from nefkern.ops import CSRGraph
from nefkern.reference.knn import unit_rows
from nefkern.runtime import distributed
from nefkern.runtime.devices import memory
from nefkern.runtime.errors import UserError
from nefkern.runtime.progress import image_bar
from nefkern.spectral.eigenpairs import leading_eigenpairs
from nefkern.spectral.embedding import Embedding, NeighbourLists, adjacency, neighbour_lists
from nefkern.spectral.kmeans import KMeans
from nefkern.spectral.landmarks import landmarks
from nefkern.spectral.nystrom import degrees
from nefkern.training.digests import (
    content_hash,
    digest,
    graph_digest,
    image_hashes,
    state_hashes,
)
from nefkern.training.interrupts import Interrupts
from nefkern.training.options import TrainOptions
from nefkern.training.parts import Parts
from nefkern.training.proof import first_row
from nefkern.training.runs import STAGES, Run
from nefkern.training.spectral_model import ChannelScale, SpectralModel

log = logging.getLogger(__name__)

#: An eigenvalue below α times this has no stable extension: (λ − αP)^(-1) would amplify noise.
_LEAST_RATIO = 1.01
_TOL = 1e-3  # of residuals, as a share of ‖κ‖
_BLOCK = 1 << 16  # rows that are scaled at once
#: Patches that the graph joins wherever nothing else is said. The neighbours of half as many, with
#: 384 channels, are found in five seconds on two cores; the time grows with the square.
_PATCHES = 1 << 17
#: Eigenvectors that K-means sees at least, where there are so many patches for each: with few
#: clusters, twice as many do not span what tells classes apart (docs/quality.md).
_LEAST_VECTORS, _PATCHES_PER_VECTOR = 256, 100

Tensors = dict[str, Tensor]
Facts = dict[str, Any]


class SpectralTrainer:
    """Compute what a run of ``--method spectral`` keeps, and leave a run folder.

    Three stages, each kept in the checkpoint with a row in the record, so that a killed run goes
    on with the stage it was in, to the same result: features (rows and pixel neighbours of all
    patches), eigenpairs (of the graph that joins them all), clusters (K-means on unit rows).

    Args:
        options: all of them; checked.
        run: the folder, made or resumed.
        parts: device, images and backbone, where they are there already.

    Raises:
        UserError: options that the data set cannot carry, another run's folder, several processes.
    """

    #: What asks for the data set's graph, and for how many neighbours: for the text of errors.
    flag, k_flag = "--method spectral", "--k"
    way_out = "join fewer --graph-images, or take --method neural"

    def __init__(self, options: TrainOptions, run: Run, parts: Parts | None = None) -> None:
        if distributed.ranks() > 1:
            raise UserError(
                f"{self.flag}: works in one process, not in {distributed.ranks()}; "
                "start it without torchrun"
            )
        self.options, self.run = options, run
        self.parts = parts or Parts.of(options, run)
        self.dataset, self.backbone = self.parts.dataset, self.parts.backbone
        self.interrupts = Interrupts()
        self.chosen = self._chosen()
        self._check(self._views() * len(self.chosen) * self._cells())
        self.crops: list[tuple[int, int]] = []  # (view, image) of each, once they are read
        self.told: dict[str, Any] = {}  # of the stage, to those who verify it
        self.tensors, self.reached = self._open()

    @property
    def indices(self) -> list[int]:
        """Of the images, crop by crop, once they are read."""
        return [index for _, index in self.crops]

    @property
    def finished(self) -> bool:
        """Whether every stage is done."""
        return self.reached == len(STAGES)

    def train(self) -> SpectralModel:
        """Go through the stages that are left.

        Raises:
            UserError: options that the patches cannot carry.
            KeyboardInterrupt: after a signal; the stages before are kept.
        """
        work = (self._features, self._eigenpairs, self._clusters)
        with self.interrupts.noted():
            for step, (stage, do) in enumerate(zip(STAGES, work, strict=True), 1):
                if step <= self.reached:
                    continue
                started, self.told = time.perf_counter(), {"threads": torch.get_num_threads()}
                tensors, facts = do()
                seconds = round(time.perf_counter() - started, 3)
                self.run.append_metrics({"step": step, "stage": stage, **facts, "seconds": seconds})
                self.run.append_step({"step": step, "stage": stage, **self.told})
                self.run.save_stage(tensors, stage, step)
                self.tensors, self.reached = tensors, step
                log.info("%s: %s", stage, ", ".join(f"{k} {v}" for k, v in facts.items()))
                if not self.finished:
                    self._heed()
        return self._model().to(self.parts.device)

    def _open(self) -> tuple[Tensors, int]:
        """Begin the run's files, or read what the stages so far have left."""
        found = self.run.load() if self.options.resume else None
        if found is None:
            self.run.write_config(self.options, **self.parts.facts(self.options))
            self.run.truncate_metrics(0)
            self.run.begin_steps(first_row(self.options, self.backbone.identity))
            return {}, 0
        tensors, metadata = found
        self.parts.check_same(self.run.config())
        reached = int(metadata["step"])
        self.run.truncate_metrics(reached)
        self.run.truncate_steps(reached)
        log.info("resumed %s after stage %d, %s", self.run.folder, reached, metadata["stage"])
        return tensors, reached

    def _heed(self) -> None:
        """Stop, if a signal has come."""
        if self.interrupts.received:
            kept = ", ".join(STAGES[: self.reached])
            raise KeyboardInterrupt(
                f"{f'the checkpoint after {kept} is written' if kept else 'no stage is done yet'}; "
                "--resume goes on"
            )

    # ---- sizes ----

    def _chosen(self) -> range | list[int]:
        """Images that the graph joins: all, or as many as are asked for, evenly spread."""
        images = len(self.dataset)
        usual = max(1, _PATCHES // (self._views() * self._cells()))
        count = self.options.graph_images or usual
        if count >= images:
            return range(images)
        log.info(
            "the graph joins the patches of %d images, evenly spread over all %d; "
            "--graph-images takes more",
            *(count, images),
        )
        return [index * images // count for index in range(count)]

    def _views(self) -> int:
        return self.options.num_views

    def _cells(self) -> int:
        """Patches of a crop."""
        return math.prod(self.backbone.grid((self.options.crop, self.options.crop)))

    @property
    def _every(self) -> bool:
        """Whether neighbours are near by in all maps."""
        return self.options.graph_features == "all"

    @property
    def _pairs(self) -> tuple[tuple[int, float], ...]:
        """The pixel graphs, if they count."""
        config = self.options.graph()
        return config.pixel_graphs if config.alpha > 0 else ()

    def _eigenvectors(self, patches: int) -> int:
        least = min(_LEAST_VECTORS, patches // _PATCHES_PER_VECTOR)
        return self.options.eigenvectors or max(2 * self.options.num_eigenfunctions, least)

    @property
    def _scaled(self) -> bool:
        """Whether channels are scaled to variance 1; all maps together always are."""
        return self._every or self.options.standardize is not False

    def _neighbours(self, patches: int) -> int:
        return resolve_neighbours(
            self.options.k,
            patches,
            "the data set",
            "take more images or a larger --crop",
            self.k_flag,
        )

    def _check(self, patches: int) -> None:
        """Refuse what so many patches cannot carry."""
        k = self._neighbours(patches)
        for flag, number in (
            ("num-eigenfunctions", self.options.num_eigenfunctions),
            ("eigenvectors", self.options.eigenvectors or 1),
        ):
            if number > patches:
                raise UserError(
                    f"--{flag} {number}: expected at most {patches}, the patches of all images"
                )
        channels = self.backbone.concat_dim if self._every else self.backbone.dim
        need, has = self._bytes(patches, channels, k), memory()
        if need > has:
            raise UserError(
                f"{self.flag}: a graph of {patches} patches needs about {need >> 30} GiB, of "
                f"which there are {has >> 30}; lower --crop, {self.k_flag} or -K, or {self.way_out}"
            )

    def _bytes(self, patches: int, channels: int, k: int) -> int:
        """About what the largest stage takes: rows, lists, graph, and blocks of eigenvectors."""
        rows = channels * (8 if self._scaled else 4)
        graph = (8 + 12) * k
        return patches * (rows + graph + 4 * 5 * (self._eigenvectors(patches) * 4 // 3 + 16))

    # ---- the stages ----

    def _features(self) -> tuple[Tensors, Facts]:
        """Rows and pixel neighbours of the patches of all images."""
        rows, near, hashes, images = [], [], [], 0
        for batch in self._batches():
            self._heed()
            hashes += image_hashes(batch)
            found = self.parts.features(batch.to(self.parts.device))
            part = (found.concat if self._every else found.high).flatten(0, 1).float()
            part = part if self._scaled else unit_rows(part)
            rows.append(part.cpu().to(self._dtype(raw=self._scaled)))
            if self._pairs:
                near.append(self._pixel_lists(batch, found.grid, images * math.prod(found.grid)))
            images += len(batch)
        if not rows:
            raise UserError(f"--data-root {self.options.data_root}: no image can be read")
        tensors, joined = {}, torch.cat(rows)
        del rows
        if self._scaled:
            scale = ChannelScale.of(joined, () if self._every else self.backbone.high_widths)
            tensors = {f"channels.{name}": tensor for name, tensor in scale.state().items()}
            joined = torch.cat(
                [unit_rows(scale(part)).to(self._dtype()) for part in joined.split(_BLOCK)]
            )
        tensors |= {"rows": joined} | ({"pixel": torch.cat(near)} if near else {})
        self.told |= {"indices": self.indices, "images": hashes}
        self._check(len(joined))  # unreadable images are missing
        return tensors, {"images": images, "patches": len(joined), "channels": joined.shape[1]}

    def _dtype(self, *, raw: bool = False) -> torch.dtype:
        """Of rows; those not scaled yet may be out of half precision's range."""
        return torch.float32 if raw or self.options.keep == "all" else torch.float16

    def _batches(self) -> Iterator[Tensor]:
        """Every view of every chosen image, uint8 ``[B, 3, crop, crop]``; unreadable ones are
        skipped."""
        options, views = self.options, self._views()
        source = Views(self.dataset, options.transform(), seed=options.seed, distinct=views)
        keys = [(view, index) for view in range(views) for index in self.chosen]
        with image_bar(len(keys), "features") as bar:
            batch: list[Tensor] = []
            for key, image in usable(source, keys, bar.update):
                batch.append(image)
                self.crops.append(key)
                if len(batch) == options.batch_size:
                    yield torch.stack(batch)
                    batch = []
            if batch:
                yield torch.stack(batch)

    def _pixel_lists(self, images: Tensor, grid: tuple[int, int], first: int) -> Tensor:
        """Neighbours within each image, numbered among the patches of all; the first is given."""
        seen = self.backbone.seen(images.to(self.parts.device))
        near = pixel_neighbours(seen, grid, self._pairs)
        return torch.where(near < 0, near, near + first).cpu()

    def _eigenpairs(self) -> tuple[Tensors, Facts]:
        """Leading eigenpairs of κ over all patches."""
        rows = self.tensors["rows"].to(self.parts.device)
        k, started = self._neighbours(len(rows)), time.perf_counter()
        log.info("the %d nearest of %d patches", k, len(rows))
        lists = neighbour_lists(rows, k, "cosine")
        searched = time.perf_counter()
        self._heed()
        graph = self._kappa(lists)
        self.told["kappa"] = graph_digest(graph)
        count = min(self._eigenvectors(len(rows)), graph.num_nodes)
        with tqdm(desc="eigenpairs", unit="round") as bar:
            pairs = leading_eigenpairs(
                graph, count, tol=_TOL, seed=self.options.seed, on_round=self._shown(bar)
            )
        found = Embedding(
            pairs.values,
            pairs.vectors.contiguous(),
            pairs.residuals,
            degrees(lists.indices, lists.similarities, len(rows)),
            rows=rows,
            k=k,
            alpha=self.options.alpha if self._pairs else 0.0,
        )
        found = self._extendable(found)
        self.told["vectors"] = digest(found.vectors)
        model = self._model(found)
        return model.state(), {
            "neighbours": k,
            "nnz": graph.nnz,
            "eigenvectors": model.num_functions,
            "largest": round(found.values[0].item(), 6),
            "smallest": round(found.values[-1].item(), 6),
            "residual": float(f"{found.residuals.max().item():.3g}"),
            "knn_seconds": round(searched - started, 3),
        }

    def _kappa(self, lists: NeighbourLists) -> CSRGraph:
        if "pixel" not in self.tensors:
            return adjacency(lists)
        return ops.kappa(
            lists.indices,
            lists.similarities,
            self.tensors["pixel"].to(lists.indices.device),
            num_nodes=len(lists.indices),
            alpha=self.options.alpha,
        )

    def _shown(self, bar: tqdm) -> Callable[[float], None]:
        """What to call after each round."""

        def show(residual: float) -> None:
            bar.update()
            bar.set_postfix(residual=f"{residual:.1e}")
            self._heed()

        return show

    def _extendable(self, found: Embedding) -> Embedding:
        """The eigenvectors that can be carried to other images: λ well above α."""
        least = max(_LEAST_RATIO * found.alpha, 1e-6 * found.values.abs().max().item())
        count, asked = int((found.values > least).sum()), len(found.values)
        if count < min(2, asked):
            raise UserError(
                f"--alpha {self.options.alpha:g}: expected a weight below the graph's leading "
                f"eigenvalues, of which {count} of {asked} are above it; lower it"
            )
        if count < asked:
            level = logging.WARNING if self.options.eigenvectors else logging.INFO
            log.log(
                level,
                "%d of %d eigenvectors are left out: their eigenvalues are not above α = %g, and "
                "they have no extension to other images; a lower --alpha keeps more",
                *(asked - count, asked, found.alpha),
            )
        return found.leading(count)

    def _clusters(self) -> tuple[Tensors, Facts]:
        """K-means on the eigenvectors; then the rows that are kept for extension."""
        model = self._model().to(self.parts.device)
        if self.options.cluster_on == "both":
            model = model.span()
        rows = model.cluster_rows(model.embedding.vectors)
        kmeans = KMeans(self.options.num_eigenfunctions, self.options.seed)
        with tqdm(desc="K-means", unit="iteration") as bar:

            def show() -> None:
                bar.update()
                self._heed()

            kmeans.fit(rows, on_iteration=show)
        self.told["labels"] = content_hash(kmeans.predict(rows))
        del rows
        patches = len(model.embedding.vectors)
        kept = self.options.kept(patches)
        model.kmeans = kmeans
        model = model.calibrated()
        model.embedding = landmarks(model.embedding, kept, self.options.seed)
        self.told["checkpoint"] = state_hashes(model.state())
        return model.state(), {
            "clusters": kmeans.num_clusters,
            "iterations": kmeans.iterations,
            "inertia": round(kmeans.inertia, 3),
            "temperature": float(f"{model.temperature:.3g}"),
            "kept": len(model.embedding.vectors),
        }

    def _model(self, embedding: Embedding | None = None) -> SpectralModel:
        """What the tensors so far make."""
        pairs = self.options.graph().pixel_graphs
        if embedding is None:
            return SpectralModel.from_state(self.tensors, pairs, self.run.folder)
        scale = {n: self.tensors[f"channels.{n}"] for n in ("mean", "std") if self._scaled}
        return SpectralModel(
            embedding,
            pairs,
            embedding.k,
            scale=ChannelScale(**scale) if scale else None,
            every=self._every,
        )
