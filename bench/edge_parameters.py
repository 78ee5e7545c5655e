"""``python -m bench.edge_parameters RUN --data-root DIR``: the parameters of ``--edges graph``,
chosen on one half of the images and scored on the other.

The half that chooses also matches clusters to classes; the parameters of the best sum of mean IoU
and boundary F-score are taken. Mean over both halves of each of ``--splits`` random splits, with
bilinear edges and the defaults, which were chosen on some of these images, beside it.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.evaluating import evaluator
from nefkern.evaluation.resampling import figures, halves, part
from nefkern.runtime.commandline import log_to_stderr
from nefkern.runtime.errors import ArgumentParser, command
from nefkern.segmentation.boundaries import boundary_f
from nefkern.segmentation.graph_edges import DEFAULT, GraphEdges, GraphRefiner
from nefkern.segmentation.image_counts import ImageCounts
from nefkern.segmentation.matching import majority_vote
from nefkern.segmentation.metrics import count_matrix
from nefkern.segmentation.refinement import Job

COLOURS, SMOOTHNESS = (0.02, 0.03, 0.05), (10.0, 20.0, 40.0)
BILINEAR, CHOSEN, USUAL = "bilinear", "chosen on the other half", "default"


class Kept(GraphRefiner):
    """Keeps the jobs of an evaluation, and draws nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs: list[Job] = []

    def refine(self, job: Job) -> Tensor:
        """The labels as they are."""
        self.jobs.append(replace(job, probabilities=job.probabilities.half()))
        self.inferences += 1
        return bilinear(job)


def bilinear(job: Job) -> Tensor:
    """The labels as they are."""
    return job.labels[job.probabilities.argmax(0)]


class Drawn:
    """The images' clusters with edges by one choice of parameters; None: bilinear."""

    def __init__(self, jobs: list[Job], shape: tuple[int, int], chosen: GraphEdges | None) -> None:
        refine = GraphRefiner(chosen).refine if chosen else bilinear
        self.counts, self.maps, self.annotations = ImageCounts(*shape), [], []
        for job in jobs:
            annotation = job.context[0].annotation
            labels = refine(replace(job, probabilities=job.probabilities.float()))
            self.counts.add(count_matrix(labels, annotation, *shape))
            self.maps.append(labels.numpy())
            self.annotations.append(annotation.numpy().astype(np.int16))

    def scores(self, classes: Tensor, images: Tensor) -> Tensor:
        """Accuracy, mean IoU and boundary F of some images under a matching."""
        ones = torch.ones(1, len(self.counts), dtype=torch.float64)
        told = figures([part(self.counts, classes, images)], ones)[:, 0]
        table = classes.numpy()
        f = [
            boundary_f(table[self.maps[i]], self.annotations[i])
            for i in images.nonzero().flatten().tolist()
        ]
        return torch.cat([told, torch.tensor([np.nanmean(f)], dtype=torch.float64)])

    def matching(self, images: Tensor) -> Tensor:
        """By IoU, on some images."""
        return majority_vote(self.counts.total(images), "iou")


def jobs_of(options: list[str]) -> tuple[list[Job], tuple[int, int]]:
    """What an evaluation would draw edges of, and numbers of clusters and classes."""
    drawing = evaluator([*options, "--edges", "graph"])
    kept = drawing.graph = Kept()
    drawing.score()
    return kept.jobs, (drawing.num_clusters, len(drawing.images.classes))


def table(jobs: list[Job], shape: tuple[int, int], splits: int) -> str:
    """Markdown, in percent."""
    grid = [replace(DEFAULT, colour=c, smoothness=s) for c, s in product(COLOURS, SMOOTHNESS)]
    drawn = {chosen: Drawn(jobs, shape, chosen) for chosen in (None, *grid)}
    found: dict[str, list[Tensor]] = {BILINEAR: [], CHOSEN: [], USUAL: []}
    picks: Counter[str] = Counter()
    masks = halves(drawn[None].counts.annotated(), splits)
    for at, own in enumerate(masks):
        other = masks[at ^ 1]
        matched = {p: d.matching(own) for p, d in drawn.items()}
        best = max(grid, key=lambda p: float(drawn[p].scores(matched[p], own)[1:].sum()))
        picks[f"colour {best.colour:g}, smoothness {best.smoothness:g}"] += 1
        for name, p in ((BILINEAR, None), (CHOSEN, best), (USUAL, DEFAULT)):
            found[name].append(drawn[p].scores(matched[p], other))
    lines = ["| edges | accuracy | mIoU | boundary F |", "|---|---|---|---|"]
    for name, scores in found.items():
        cells = [f"{100 * value:.1f}" for value in torch.stack(scores).mean(0).tolist()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    told = "; ".join(f"{pick} ({count} of {len(masks)})" for pick, count in picks.most_common())
    return "\n".join([*lines, "", f"chosen: {told}"])


@command
def main(arguments: list[str] | None = None) -> None:
    """Draw, choose and score."""
    parser = ArgumentParser(prog="python -m bench.edge_parameters", description=__doc__)
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--data-root", required=True, metavar="DIR")
    parser.add_argument("--seed", default="0", help="of the evaluation [0]")
    parser.add_argument("--feature-cache", type=Path, metavar="DIR")
    parser.add_argument("--splits", type=int, default=5, help="random halvings [5]")
    o = parser.parse_args(arguments)
    log_to_stderr()
    cache = ["--feature-cache", str(o.feature_cache)] if o.feature_cache else []
    jobs, shape = jobs_of([o.run, "--data-root", o.data_root, "--seed", o.seed, *cache])
    print(table(jobs, shape, o.splits))


if __name__ == "__main__":
    sys.exit(main())
