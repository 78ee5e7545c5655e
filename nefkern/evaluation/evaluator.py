"""Evaluation behind ``python -m nefkern.evaluate``: open, fit, score, write."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nefkern.baselines.comparison import Comparison
from nefkern.baselines.fitting import default_passes, training_crops
from nefkern.baselines.probe import Probe
from nefkern.data import ImageDataset, Sample
from nefkern.evaluation.boundary_scores import BoundaryScores
from nefkern.evaluation.bounds import BOUNDS, FLOORS, Bounds
from nefkern.evaluation.gathering import Counts, gathered, summed
from nefkern.evaluation.honesty import Honesty
from nefkern.evaluation.images import EvaluatedImages
from nefkern.evaluation.protocol import windows
from nefkern.evaluation.records import RESAMPLED, asked, free_name, plain_name
from nefkern.evaluation.report import write_report
from nefkern.runtime import distributed
from nefkern.runtime.errors import UserError
from nefkern.runtime.files import make_folder, replace_file
from nefkern.segmentation.charts import comparison_row, confusion_matrix, iou_bars, legend
from nefkern.segmentation.clusterer import Clusterer
from nefkern.segmentation.evaluation import Matched, match, matchings, unmatched
from nefkern.segmentation.graph_edges import GraphRefiner
from nefkern.segmentation.image_counts import ImageCounts
from nefkern.segmentation.mean_field import require_pydensecrf
from nefkern.segmentation.methods import Method, of_run
from nefkern.segmentation.pictures import write_png
from nefkern.segmentation.refinement import Refiner
from nefkern.segmentation.segmenter import Segmenter
from nefkern.training.presets import ANNOTATED
from nefkern.training.runs import Run, versions

log = logging.getLogger(__name__)


class Evaluator:
    """One evaluation: a run, the methods to compare, a data set and a protocol.

    Several processes (:mod:`nefkern.runtime.distributed`) share the images to score; counts are
    whole numbers, so their sums are those of one process. K-means depends on the order of the
    images: the main process fits it alone, and the others take its centres.

    Args:
        options: what :func:`nefkern.evaluate.parser` parses.
        methods: which methods to score, in this order.

    Raises:
        UserError: a run, data set or option that cannot be used.
    """

    def __init__(self, options: argparse.Namespace, methods: list[Method]) -> None:
        self.options, self.methods = options, methods
        with distributed.together():
            self._build()

    def _build(self) -> None:
        options = self.options
        self.asked = asked(options)  # as it was, before it is completed
        self._complete()
        self.methods = of_run(self.methods, self.trained.kind)
        self.refiner = None
        if options.crf:
            require_pydensecrf()
            self.refiner = Refiner(options.crf_workers)
        self.graph = GraphRefiner() if options.edges == "graph" else None
        self.boundaries = BoundaryScores() if options.boundary else None
        self.segmenter = Segmenter.load(options.run, options.device, cache=options.feature_cache)
        self.images = EvaluatedImages(options, self.segmenter)
        classes = len(self.images.kept)
        self.shown: list[tuple[Sample, dict[str, Tensor]]] = []
        self.matched: dict[str, Matched] = {}
        self.bounds = None
        if options.bounds:
            self.bounds = Bounds(self.num_clusters, classes, options.seed)
        self.honesty: Honesty | None = None
        trained = all(method.trained for method in self.methods)
        self.comparison = Comparison(
            self.segmenter,
            self.methods,
            windows(options, self.segmenter),
            num_classes=classes,
            flip=options.flip,
            control=None if trained else self.segmenter.untrained(options.seed),
            seed=options.seed,
            sample_rows=options.sample_rows,
        )
        self._take_clusters()
        self._check_merge()
        self.groups: dict[str, Tensor] = {}

    @property
    def num_clusters(self) -> int:
        """Clusters that are scored: K, or what they are merged to."""
        return self.options.merge or self.segmenter.num_clusters

    def _check_merge(self) -> None:
        count, clusters = self.options.merge, self.segmenter.num_clusters
        if count is None:
            return
        if count > clusters:
            raise UserError(f"--merge {count}: expected 1 to {clusters}, the run's clusters")
        for name, clusterer in self.comparison.clusterers.items():
            if isinstance(clusterer, Clusterer) and clusterer.kmeans is None:
                raise UserError(
                    f"--merge {count}: merges the clusters of K-means; those of {name} are ψ's own "
                    "outputs; expected --methods without it"
                )

    def _merged(self, counts: Counts) -> Counts:
        """Counts of clusters merged to ``--merge``; those of classes as they are."""
        return {
            name: {
                stage: table.merged(self.groups[name], self.options.merge)
                if name in self.groups
                else table
                for stage, table in tables.items()
            }
            for name, tables in counts.items()
        }

    def _of_clusters(self, name: str, assignments: dict[str, Tensor]) -> dict[str, Tensor]:
        """The class of each cluster, from that of what it is merged to."""
        groups = self.groups.get(name)
        return assignments if groups is None else {m: a[groups] for m, a in assignments.items()}

    def _take_clusters(self) -> None:
        """Score the clusters that a run keeps: a spectral one, perhaps one of continuous ψ."""
        kept = self.segmenter.clusterer
        same = {"continuous": ["ours"], "spectral": ["ours", "ours*"]}.get(self.trained.kind, [])
        names = [name for name in same if name in self.comparison.clusterers]
        if names and kept is None:
            log.info(
                "%s keeps no clusters of its continuous eigenfunctions: K-means on them is fitted "
                "on --fit-split",
                self.options.run,
            )
        else:
            self.comparison.clusterers |= dict.fromkeys(names, kept)

    def _complete(self) -> None:
        """Take the data set from the run where none is given."""
        options, trained = self.options, Run(self.options.run).options()
        self.trained = trained
        if options.fit_images == "plain":
            options.fit_passes = None
        elif options.fit_passes is None:
            options.fit_passes = default_passes(trained)
        if options.data is None:
            options.data = trained.data if trained.data in ANNOTATED else "folder"
        if options.data_root is None and options.data == trained.data:
            options.data_root = Path(trained.data_root)
        if options.data_root is None:
            raise UserError(
                "--data-root: expected the folder with the annotated images; the run was trained "
                f"on {trained.data}"
            )

    def run(self) -> dict[str, Any]:
        """Fit, score and write ``evaluation-*.json``, pictures in the folder of the same name, and
        the report; returns the scores."""
        started = time.perf_counter()
        if self.comparison.needs_fit or self.comparison.needs_labels:
            self.fit()
        if self.options.merge:
            self.groups = {
                name: clusterer.merged(self.options.merge)
                for name, clusterer in self.comparison.clusterers.items()
                if isinstance(clusterer, Clusterer)
            }
        scored = self.score()
        result = {
            "settings": self.settings(),
            "asked": self.asked,
            "num_clusters": self.num_clusters,
            "images": len(self.images),
            **scored,
            **({"resampling": self.honesty.settings()} if self.honesty else {}),
            "seconds": round(time.perf_counter() - started, 1),
            "device": str(self.segmenter.device),
            "versions": versions(),
        }
        if distributed.is_main():
            self._write(result)
        return result

    def _write(self, result: dict[str, Any]) -> None:
        path = free_name(self.options.run, result["settings"])
        replace_file(path, json.dumps(result, indent=1, ensure_ascii=False))
        if resampled := self.honesty.packed():
            replace_file(path.with_suffix(RESAMPLED), resampled)
        else:
            path.with_suffix(RESAMPLED).unlink(missing_ok=True)
        self.draw(result, path.with_suffix(""))
        write_report(Run(self.options.run))
        log.info("written: %s", path)

    def fit(self) -> None:
        """Fit every K-means and every probe on the training split."""
        device = self.segmenter.device
        fitted = distributed.from_main(self._fitted)
        self.comparison.clusterers = {name: c.to(device) for name, c in fitted.items()}

    def _fitted(self) -> dict[str, Clusterer | Probe]:
        split, comparison = self.options.fit_split, self.comparison
        dataset, what = self.images.open(split), "K-means"
        try:
            # Closed here, so that a bar ends before an error or an interrupt is told.
            if comparison.needs_fit:
                with contextlib.closing(self._fit_crops(dataset)) as crops:
                    comparison.fit(crops)
            what = "a linear probe"
            if comparison.needs_labels:
                with contextlib.closing(self.images.labelled(dataset)) as samples:
                    comparison.fit_labels(samples)
        except ValueError as error:
            raise UserError(f"--fit-split {split}: cannot fit {what}, {error}") from None
        return {name: c.to("cpu") for name, c in comparison.clusterers.items()}

    def _fit_crops(self, dataset: ImageDataset) -> Iterator[Tensor]:
        """What K-means is fitted on: augmented training crops, or the crops that are scored."""
        o = self.options
        if o.fit_images == "plain":
            yield from self.comparison.crops(s.image for s in self.images.plain(dataset))
            return
        yield from training_crops(
            dataset,
            self.trained,
            passes=o.fit_passes,
            seed=o.seed,
            batch_size=o.batch_size,
            indices=self.images.indices(dataset),
            quiet=not distributed.is_main(),
        )

    def counts(self) -> Counts:
        """Pixels of every cluster in every class, by method, stage and image."""
        with distributed.together(), self.images.bar("scoring") as bar:
            counts = self.comparison.count(
                self.images.annotated(),
                len(self.images.kept),
                refiner=self.refiner if self.options.crf == "clusters" else None,
                graph=self.graph,
                watch=self._show,
                keep=self._keep,
                done=bar.update,
            )
        self.shown = distributed.collected(self.shown)
        return self._merged(gathered(counts))

    def score(self) -> dict[str, Any]:
        """Every method's figures without and with CRF, and each class's pixels; JSON-ready."""
        started = time.perf_counter()
        counts = self.counts()
        totals = summed(counts)
        void = int(distributed.total(torch.tensor(self.images.void_pixels)))
        pixels = next(iter(totals.values()))["none"].sum(0)
        with distributed.together():
            if not pixels.any():
                raise UserError(
                    f"--split {self.options.split}: every annotated pixel is void, nothing to score"
                )
        stages: dict[str, dict[str, Matched]] = {
            name: {stage: self._match(name, table) for stage, table in tables.items()}
            for name, tables in totals.items()
        }
        self.matched = {name: matched["none"] for name, matched in stages.items()}
        refined: Counts = {}
        if self.options.crf == "classes":
            started = time.perf_counter()
            refined = self._refined_classes()
            for name, by_matching in summed(refined).items():
                stages[name]["classes"] = stages[name]["none"].rescored(by_matching)
        seconds = time.perf_counter() - started
        self._score_boundaries(stages)
        honest = self._honest(counts, refined, stages)
        return {
            **self._crf_times(seconds),
            **self._graph_times(),
            "classes": self.images.classes,
            "pixels": dict(zip(self.images.classes, pixels.tolist(), strict=True)),
            **(
                {"void_pixels": void}
                if self.images.dataset.holds_classes and not self.images.dataset.ignored
                else {}
            ),
            "methods": {
                method.name: {
                    "title": method.title,
                    "stages": {
                        stage: matched.as_dict(self.images.classes)
                        | honest.get((method.name, stage), {})
                        for stage, matched in stages[method.name].items()
                    },
                }
                for method in self.methods
            },
            **self._bounded(),
            **({"differences": self.honesty.differences()} if self.honesty else {}),
            **self._boundary_differences(),
        }

    def _refined_classes(self) -> Counts:
        """Confusions of the matched classes after a CRF, from a second pass over the images."""
        assignments = {
            name: self._of_clusters(name, matched.assignments)
            for name, matched in self.matched.items()
        }
        with distributed.together(), self.images.bar("CRF") as bar:
            confusions = self.comparison.count_refined_classes(
                self.images.annotated(),
                assignments,
                len(self.images.kept),
                refiner=self.refiner,
                keep=self._keep_classes,
                done=bar.update,
            )
        return gathered(confusions)

    def _keep(self, name: str, stage: str, clusters: Tensor) -> None:
        """Keep what a method says of an image, for its boundaries."""
        if self.boundaries is not None:
            groups = self.groups.get(name)
            found = clusters if groups is None else groups[clusters.cpu()]
            self.boundaries.keep((name, stage), found)

    def _keep_classes(self, name: str, matching: str, classes: Tensor) -> None:
        if self.boundaries is not None:
            self.boundaries.keep((name, "classes", matching), classes)

    def _score_boundaries(self, stages: dict[str, dict[str, Matched]]) -> None:
        if self.boundaries is None:
            return
        with distributed.together():
            for name, by_stage in stages.items():
                for stage, matched in by_stage.items():
                    self.boundaries.score(name, stage, matched.assignments)

    def _boundary_differences(self) -> dict[str, Any]:
        if self.boundaries is None or self.honesty is None:
            return {}
        return {"boundary_differences": self.boundaries.differences(self.honesty.weights)}

    def _graph_times(self) -> dict[str, Any]:
        """What the solve on the pixel graph took; nothing without."""
        if self.graph is None:
            return {}
        count = int(distributed.total(torch.tensor(self.graph.inferences)))
        seconds = float(distributed.total(torch.tensor(self.graph.seconds, dtype=torch.float64)))
        each = round(seconds / max(1, count), 4)
        return {"graph": {"solves": count, "seconds_per_solve": each}}

    def _learned(self, name: str) -> bool:
        """Whether a method, or a ceiling, has classes of its own, so that nothing is matched."""
        if name in BOUNDS:
            return name not in FLOORS
        return isinstance(self.comparison.clusterers[name], Probe)

    def _match(self, name: str, table: Tensor) -> Matched:
        return unmatched(table) if self._learned(name) else match(table)

    def _matchings(self, name: str, table: Tensor) -> dict[str, Tensor]:
        if self._learned(name):
            return {"own": torch.arange(len(table))}
        return matchings(table)[0]

    def _honest(
        self,
        counts: Counts,
        refined: Counts,
        stages: dict[str, dict[str, Matched]],
    ) -> dict[tuple[str, str], dict[str, Any]]:
        """What is said beside every method's figures, by method and stage; in the main process."""
        if not distributed.is_main():
            return {}
        self.honesty = self._honesty(next(iter(counts.values()))["none"])
        found = {}
        for name, tables in counts.items():
            find = functools.partial(self._matchings, name)
            for stage, table in tables.items():
                matched = stages[name][stage]
                found[name, stage] = self.honesty.add(name, stage, table, matched, find)
        for name, by_matching in refined.items():
            found[name, "classes"] = self.honesty.add_confusions(name, "classes", by_matching)
        if self.boundaries is not None:
            for (name, stage), told in found.items():
                told["boundary"] = self.boundaries.told(name, stage, self.honesty.weights)
        return found

    def _honesty(self, counts: ImageCounts) -> Honesty:
        return Honesty(counts.annotated(), self.options.bootstrap, self.options.cross_match)

    def _bounded(self) -> dict[str, Any]:
        """Floors and ceilings, scored as methods are; JSON-ready."""
        if self.bounds is None:
            return {}
        counts = gathered({"": self.bounds.counts})[""]
        totals = summed({"": counts})[""]
        if not distributed.is_main():
            return {}
        honesty, found = self._honesty(counts["patches"]), {}
        for name, title in BOUNDS.items():
            matched = self._match(name, totals[name])
            find = functools.partial(self._matchings, name)
            beside = honesty.add(name, "none", counts[name], matched, find)
            stage = matched.as_dict(self.images.classes) | beside
            found[name] = {"title": title, "stages": {"none": stage}}
        return {"bounds": found}

    def _crf_times(self, seconds: float) -> dict[str, Any]:
        """What the CRF took, of ``seconds`` that the pass with it did; nothing without a CRF."""
        refiner = self.refiner
        if refiner is None:
            return {}
        return {
            "crf": {
                "workers": refiner.workers,
                "inferences": int(distributed.total(torch.tensor(refiner.inferences))),
                "seconds_per_inference": round(refiner.seconds / max(1, refiner.inferences), 4),
                "seconds_per_image": round(seconds / len(self.images), 4),
            }
        }

    def draw(self, result: dict[str, Any], folder: Path) -> None:
        """Bars of IoU, confusion matrices, the first images in the matched classes, and a legend
        of those that they show."""
        make_folder(self.options.run, folder)
        for old in folder.iterdir():  # of an earlier evaluation with these settings
            old.unlink()
        replace_file(folder / "iou.svg", iou_bars(result))
        for name, matched in self.matched.items():
            chart = confusion_matrix(matched.confusions[matched.shown], self.images.classes, name)
            replace_file(folder / f"confusion-{plain_name(name)}.svg", chart)
        methods, colours = "-".join(plain_name(name) for name in self.matched), self.images.colours
        shown: set[int] = set()
        for number, (sample, clusters) in enumerate(self.shown):
            classes = [
                found.assignments[found.shown][c]
                for found, c in ((self.matched[name], c) for name, c in clusters.items())
            ]
            picture = comparison_row(sample.image, sample.annotation, classes, colours)
            write_png(picture, folder / f"{number:03d}-image-annotation-{methods}.png")
            shown.update(*(painted.unique().tolist() for painted in (sample.annotation, *classes)))
        if names := [i for i in range(len(self.images.classes)) if i in shown]:
            chart = legend([self.images.classes[i] for i in names], colours[names])
            replace_file(folder / "classes.svg", chart)

    def _show(self, sample: Sample, clusters: dict[str, Tensor]) -> None:
        """Count the bounds, and keep this process's share of the first images for :meth:`draw`."""
        if self.boundaries is not None:
            self.boundaries.annotate(sample.annotation)
        clusters = {
            name: self.groups[name][found.cpu()] if name in self.groups else found
            for name, found in clusters.items()
        }
        if self.bounds is not None:
            segments = len(next(iter(clusters.values())).unique())
            self.bounds.observe(sample, segments, self.comparison.patch_of(sample.image))
        if len(self.shown) < len(distributed.dealt(range(self.options.pictures))):
            self.shown.append((sample, {name: c.cpu() for name, c in clusters.items()}))

    def settings(self) -> dict[str, Any]:
        """What decides the figures, beside the run and the images."""
        names = ("split", "fit_split", "limit", "protocol", "crf", "seed", "sample_rows")
        names += ("fit_images", "fit_passes")
        data, classes = self.options.data, len(self.images.dataset.classes)
        counted = {"data": data, "classes": classes} if data != "folder" else {}
        return {
            "data_root": str(self.options.data_root),
            **counted,
            **{name: getattr(self.options, name) for name in names},
            "ignored": self.options.ignore_class,
            "methods": [method.name for method in self.methods],
            "window": self.comparison.windows.window,
            "stride": self.comparison.windows.stride,
            "flip": self.options.flip or None,
            **({"merge": self.options.merge} if self.options.merge else {}),
            **({"edges": self.options.edges} if self.options.edges else {}),
            "resize": self.comparison.windows.shorter,
        }
