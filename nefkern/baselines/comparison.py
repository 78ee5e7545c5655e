"""Several methods on one data set, from one pass of the backbone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from nefkern.baselines.deep_spectral import DeepSpectral
from nefkern.baselines.probe import Probe, patch_labels
from nefkern.data import Sample, resize_shorter
from nefkern.data.transforms import resized_shorter
from nefkern.ops import CSRGraph
from nefkern.segmentation.clusterer import SAMPLE_ROWS, Clusterer
from nefkern.segmentation.crf import winners
from nefkern.segmentation.flip import flip_averaged
from nefkern.segmentation.graph_edges import GraphRefiner
from nefkern.segmentation.image_counts import ImageCounts
from nefkern.segmentation.matching import class_logits
from nefkern.segmentation.methods import Method
from nefkern.segmentation.metrics import count_matrix
from nefkern.segmentation.refinement import Job, Refiner
from nefkern.segmentation.windows import Replay, sliding_tiles, sliding_windows, window_crops

_TILE_FLOATS = 1 << 24  # up-sampled logits held at once


class Network(Protocol):
    """What is asked of :class:`nefkern.segmentation.segmenter.Segmenter`."""

    num_clusters: int
    device: torch.device

    def maps(self, images: Tensor) -> Any: ...

    def pad(self, images: Tensor) -> tuple[Tensor, tuple[float, float]]: ...

    def project(self, concat: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]: ...

    def kappa(self, images: Tensor, maps: Any, *, per_image: bool) -> CSRGraph: ...


@dataclass(frozen=True)
class Windows:
    """How images reach the network: windows of this size and stride, so many at once.

    With ``shorter`` they lie on the image resized to that shorter side, and what the network says
    is resized back to the image's own resolution (protocol B).
    """

    window: int
    stride: int
    batch_size: int = 4
    shorter: int | None = None


class Comparison:
    """Methods that share the backbone's maps, from fitting to counts.

    Args:
        network: the trained segmenter.
        methods: which methods, at least one.
        windows: how images are cut.
        num_classes: C, of methods that learn classes.
        flip: average logits over an image and its mirror image.
        control: a segmenter with an untrained ψ and the same backbone, if a method asks for one.
        seed, sample_rows: of K-means, see :class:`Clusterer`; the seed is also that of
            :class:`DeepSpectral`.

    Attributes:
        patch: height and width of a patch of the last batch, in pixels of what the network saw;
            see :meth:`patch_of`.
    """

    def __init__(
        self,
        network: Network,
        methods: list[Method],
        windows: Windows,
        *,
        num_classes: int = 0,
        flip: bool = False,
        control: Network | None = None,
        seed: int = 0,
        sample_rows: int = SAMPLE_ROWS,
    ) -> None:
        self.network, self.control, self.windows = network, control, windows
        self.patch = (1.0, 1.0)
        segments = any(method.source == "segments" for method in methods)
        self.deep_spectral = DeepSpectral(seed=seed) if segments else None
        self._predict = flip_averaged(self._once, network.pad) if flip else self._once
        self.clusterers: dict[str, Clusterer | Probe] = {
            method.name: Probe(method, num_classes, sample_rows=sample_rows)
            if method.supervised
            else Clusterer(method, network.num_clusters, seed=seed, sample_rows=sample_rows)
            for method in methods
        }

    @property
    def needs_fit(self) -> bool:
        """Whether some K-means has to see training images."""
        return bool(self._unfitted(Clusterer))

    @property
    def needs_labels(self) -> bool:
        """Whether some method has to see annotated training images."""
        return bool(self._unfitted(Probe))

    @torch.inference_mode()
    def fit(self, batches: Iterable[Tensor]) -> None:
        """Fit every K-means on crops of training images, uint8 ``[B, 3, h, w]``, in their order.

        Raises:
            ValueError: fewer patches than clusters.
        """
        unfitted = self._unfitted(Clusterer)
        for crops in batches:
            maps, _ = self._maps(crops)
            for clusterer in unfitted:
                clusterer.observe(maps)
        for clusterer in unfitted:
            clusterer.finish(self.network.device)

    def crops(self, images: Iterable[Tensor]) -> Iterator[Tensor]:
        """Images uint8 ``[3, H, W]`` as they are cut for scoring, in batches for :meth:`fit`."""
        w = self.windows
        for image in images:
            seen = self._seen(image)
            yield from window_crops(seen, w.window, w.stride, batch_size=w.batch_size)

    @torch.inference_mode()
    def fit_labels(self, samples: Iterable[Sample]) -> None:
        """Fit the methods that learn classes on annotated images, cut as for scoring.

        Raises:
            ValueError: no patch is annotated.
        """
        unfitted = self._unfitted(Probe)
        for sample in samples:
            w, seen = self.windows, self._seen(sample.image)
            # Each pixel that the network sees has one class: the nearest annotated pixel's.
            size = list(seen.shape[1:])
            annotation = resize(sample.annotation[None], size, InterpolationMode.NEAREST_EXACT)
            pieces = (
                window_crops(whole, w.window, w.stride, batch_size=w.batch_size)
                for whole in (seen, annotation)
            )
            for crops, labels in zip(*pieces, strict=True):
                maps, padded = self._maps(crops)
                grid = tuple(maps["graph"].shape[2:])
                for probe in unfitted:
                    found = [patch_labels(a[0], grid, padded, probe.channels) for a in labels]
                    probe.observe(maps, torch.stack(found))
        for probe in unfitted:
            probe.finish(self.network.device)

    def _unfitted(self, kind: type) -> list:
        return [c for c in self.clusterers.values() if isinstance(c, kind) and not c.fitted]

    @torch.inference_mode()
    def clusters(self, image: Tensor) -> dict[str, Tensor]:
        """Every method's clusters of one image ``[3, H, W]``: int64 ``[H, W]`` each."""
        return self._clusters(image, self._predict)

    @torch.inference_mode()
    def count(
        self,
        samples: Iterable[Sample],
        num_classes: int,
        *,
        refiner: Refiner | None = None,
        graph: GraphRefiner | None = None,
        watch: Callable[[Sample, dict[str, Tensor]], None] = lambda sample, clusters: None,
        keep: Callable[[str, str, Tensor], None] = lambda name, stage, clusters: None,
        done: Callable[[], object] = lambda: None,
    ) -> dict[str, dict[str, ImageCounts]]:
        """Count how clusters and classes meet, image by image.

        Args:
            samples: with annotations.
            refiner: count the clusters once more after this CRF.
            graph: and once more with their edges drawn by this solve.
            watch: called with every sample and every method's clusters, int64 ``[H, W]``.
            keep: called with the method, the stage and the clusters of all that is counted.
            done: called whenever an image is counted.

        Returns:
            By method, "none" and perhaps "graph" and "clusters": counts ``[K, num_classes]`` of the
            images in their order; classes instead of clusters for methods that learn those.
        """
        stages = ["none", *(["graph"] if graph else []), *(["clusters"] if refiner else [])]
        counts = {
            name: {stage: ImageCounts(c.channels, num_classes) for stage in stages}
            for name, c in self.clusterers.items()
        }

        def add(stage: str, sample: Sample, name: str, clusters: Tensor) -> None:
            found = counts[name][stage]
            found.add(count_matrix(clusters, sample.annotation, found.num_clusters, num_classes))
            keep(name, stage, clusters)

        def looked_at() -> Iterator[tuple[Sample, Replay, dict[str, Tensor]]]:
            for sample in samples:
                replay = Replay(self._predict)
                found = self._clusters(sample.image, replay)
                watch(sample, found)
                for name, clusters in found.items():
                    add("none", sample, name, clusters)
                yield sample, replay, found

        def refinable() -> Iterator[Job]:
            for sample, replay, found in looked_at():
                for job in self._cluster_jobs(sample, replay, found):
                    if graph:
                        _, name = job.context
                        add("graph", sample, name, graph.refine(job))
                    yield job

        if refiner is graph is None:
            for _ in looked_at():
                done()
            return counts
        last = list(self.clusterers)[-1]
        if refiner is None:
            for job in refinable():
                if job.context[1] == last:
                    done()
            return counts
        jobs = refinable()
        with refiner(jobs) as results:
            for refined, (sample, name) in results:
                add("clusters", sample, name, refined)
                if name == last:
                    done()
        return counts

    @torch.inference_mode()
    def count_refined_classes(
        self,
        samples: Iterable[Sample],
        assignments: dict[str, dict[str, Tensor]],
        num_classes: int,
        *,
        refiner: Refiner,
        keep: Callable[[str, str, Tensor], None] = lambda name, matching, classes: None,
        done: Callable[[], object] = lambda: None,
    ) -> dict[str, dict[str, ImageCounts]]:
        """Confusion, image by image, after a CRF on *classes*, made of the clusters by a matching.

        Args:
            samples, done: as for :meth:`count`.
            assignments: by method and matching, int64 ``[K]``.
            refiner: the CRF.
            keep: called with the method, the matching and the classes of all that is counted.

        Returns:
            By method and matching, ``[num_classes, num_classes]`` of the images in their order.
        """
        confusions = {
            name: {m: ImageCounts(num_classes, num_classes) for m in matchings}
            for name, matchings in assignments.items()
        }
        jobs = (
            job for sample in samples for job in self._class_jobs(sample, assignments, num_classes)
        )
        last = [(name, m) for name, matchings in assignments.items() for m in matchings][-1]
        with refiner(jobs) as results:
            for refined, (sample, name, matching) in results:
                confusions[name][matching].add(
                    count_matrix(refined, sample.annotation, num_classes, num_classes)
                )
                keep(name, matching, refined)
                if (name, matching) == last:
                    done()
        return confusions

    def _maps(self, crops: Tensor) -> tuple[dict[str, Tensor], tuple[float, float]]:
        """All maps of a batch by name, on the patch grid, and the size in pixels it spans."""
        maps = self.network.maps(crops)
        height, width = (p / n for p, n in zip(maps.padded, maps.graph.shape[2:], strict=True))
        self.patch = (height, width)
        found = {name: getattr(maps, name) for name in ("logits", "hidden", "graph", "concat")}
        if self.control is not None:
            tokens = maps.concat.flatten(2).transpose(1, 2)
            grid = tuple(maps.concat.shape[2:])
            logits, hidden = self.control.project(tokens, grid)
            found["logits-untrained"] = logits.transpose(1, 2).unflatten(2, grid)
            found["hidden-untrained"] = hidden.transpose(1, 2).unflatten(2, grid)
        if self.deep_spectral is not None:
            graph = self.network.kappa(crops, maps, per_image=True)
            found["segments"] = self.deep_spectral.segment_means(graph, maps.graph)
        return found, maps.padded

    def _once(self, crops: Tensor) -> tuple[Tensor, tuple[float, float]]:
        """The cluster logits of all methods, one after another along the channels."""
        maps, padded = self._maps(crops)
        return torch.cat([c.logits(maps) for c in self.clusterers.values()], dim=1), padded

    def _seen(self, image: Tensor) -> Tensor:
        """The image as the windows lie on it."""
        shorter = self.windows.shorter
        return image if shorter is None else resize_shorter(image, shorter)

    def patch_of(self, image: Tensor) -> tuple[float, float]:
        """Height and width of a patch in pixels of ``[3, H, W]``, the image just seen."""
        shorter, size = self.windows.shorter, (image.shape[1], image.shape[2])
        scale = 1.0 if shorter is None else min(size) / min(resized_shorter(size, shorter))
        return self.patch[0] * scale, self.patch[1] * scale

    def _tiles(self, image: Tensor, predict: Callable) -> Iterator:
        w = self.windows
        pixels = _TILE_FLOATS // sum(self._channels)
        return sliding_tiles(
            *(predict, self._seen(image), w.window, w.stride),
            size=image.shape[1:],
            batch_size=w.batch_size,
            max_pixels=max(1, pixels),
        )

    def _clusters(self, image: Tensor, predict: Callable) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for tile in self._tiles(image, predict):
            parts = tile.logits.split(self._channels)
            for name, part in zip(self.clusterers, parts, strict=True):
                if name not in found:
                    found[name] = part.new_empty(image.shape[1:], dtype=torch.int64)
                found[name][slice(*tile.rows), slice(*tile.cols)] = part.argmax(0)
        return found

    @property
    def _channels(self) -> list[int]:
        return [clusterer.channels for clusterer in self.clusterers.values()]

    def _first_channel(self, name: str) -> int:
        return sum(self._channels[: list(self.clusterers).index(name)])

    def _cluster_jobs(
        self, sample: Sample, replay: Replay, found: dict[str, Tensor]
    ) -> Iterator[Job]:
        """For every method, the clusters that win a pixel of the image.

        Only their probabilities are made: those of the hundreds of others would fill the memory.
        """
        w, seen = self.windows, self._seen(sample.image)
        for name, clusters in found.items():
            shown = clusters.unique()
            logits = sliding_windows(
                replay.select(shown + self._first_channel(name)),
                *(seen, w.window, w.stride),
                size=sample.image.shape[1:],
                batch_size=w.batch_size,
            )
            probabilities = self.clusterers[name].probabilities(logits)
            patch = math.sqrt(math.prod(self.patch_of(sample.image)))
            yield Job(sample.name, sample.image, probabilities, shown, (sample, name), patch)

    def _class_jobs(
        self, sample: Sample, assignments: dict[str, dict[str, Tensor]], num_classes: int
    ) -> Iterator[Job]:
        """For every method and matching, the classes that win a pixel of the image."""
        image, replay = sample.image, Replay(self._predict)
        for _ in self._tiles(image, replay):
            pass
        for name, matchings in assignments.items():
            for matching, assignment in matchings.items():
                merged = self._class_probabilities(image, replay, name, assignment, num_classes)
                shown = winners(merged)
                yield Job(sample.name, image, merged[shown], shown, (sample, name, matching))

    def _class_probabilities(
        self, image: Tensor, replay: Replay, name: str, assignment: Tensor, num_classes: int
    ) -> Tensor:
        first = self._first_channel(name)
        predict = replay.select(slice(first, first + self.clusterers[name].channels))
        merged: Tensor | None = None
        for tile in self._tiles(image, predict):
            part = class_logits(tile.logits, assignment.to(tile.logits.device), num_classes)
            if merged is None:
                merged = part.new_empty(num_classes, *image.shape[1:])
            merged[:, slice(*tile.rows), slice(*tile.cols)] = part
        return self.clusterers[name].probabilities(merged)
