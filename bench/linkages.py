"""``python -m bench.linkages RUN [RUN ...] --data-root DIR``: ways to merge a run's clusters to as
many as there are classes, beside Ward's tree of their centres, which ``--classes N`` cuts.

Each run's clusters are counted once on the validation images; then every way is scored in both
votes and in the Hungarian matching. Accuracy / mIoU in percent, mean ± standard deviation over the
runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.evaluating import evaluator
from nefkern.evaluation.gathering import summed
from nefkern.runtime.commandline import log_to_stderr
from nefkern.runtime.errors import ArgumentParser, command
from nefkern.segmentation.matching import hungarian, majority_vote, matched_confusion
from nefkern.segmentation.metrics import scores
from nefkern.spectral.merging import cut, merge, ward
from nefkern.summarize import spread

#: From centres and sizes to the groups of so many.
Way = Callable[[Tensor, Tensor, int], Tensor]
RESTARTS = 50


def lloyd(centers: Tensor, sizes: Tensor, groups: Tensor, count: int) -> tuple[Tensor, float]:
    """Groups of centres, which count by their sizes, after Lloyd's iterations; their inertia."""
    while True:
        members = F.one_hot(groups, count).T * sizes
        means = members @ centers / members.sum(1, keepdim=True).clamp_min(1e-300)
        far = torch.cdist(centers, means)
        nearest = far.argmin(1)
        if torch.equal(groups, nearest):
            return groups, float(far.gather(1, groups[:, None])[:, 0].square() @ sizes)
        groups = nearest


def kmeans(centers: Tensor, sizes: Tensor, count: int) -> Tensor:
    """The best of many K-means on centres: no tree, each number of groups is another one."""
    generator = torch.Generator().manual_seed(0)
    draws = (torch.multinomial(sizes, count, generator=generator) for _ in range(RESTARTS))
    starts = (torch.cdist(centers, centers[draw]).argmin(1) for draw in draws)
    found = (lloyd(centers, sizes, groups, count) for groups in starts)
    return min(found, key=lambda one: one[1])[0]


def average(centers: Tensor, sizes: Tensor, count: int) -> Tensor:
    """Mean cosine between the points of two groups."""
    unit = F.normalize(centers)
    return cut(merge((1 - unit @ unit.T).clamp_min(0), sizes, "average"), count)


WAYS: dict[str, Way] = {
    "Ward's tree (`--classes`)": lambda c, n, k: cut(ward(c, n), k),
    "... then Lloyd's iterations": lambda c, n, k: lloyd(c, n, cut(ward(c, n), k), k)[0],
    "... of directions": lambda c, n, k: cut(ward(F.normalize(c), n), k),
    "... by the roots of sizes": lambda c, n, k: cut(ward(c, n.sqrt()), k),
    "... of directions, by the roots of sizes": lambda c, n, k: cut(
        ward(F.normalize(c), n.sqrt()), k
    ),
    "... without sizes": lambda c, n, k: cut(ward(c, torch.ones_like(n)), k),
    "average linkage by cosine": average,
    f"the best of {RESTARTS} K-means on the centres": kmeans,
}


def counted(options: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Centres, sizes, and the pixels of each cluster in each class, ``[K, C]``."""
    bare = evaluator([*options, "--methods", "ours"])
    kmeans = bare.segmenter.clusterer.kmeans
    table = summed(bare.counts())["ours"]["none"]
    return kmeans.centers.double().cpu(), kmeans.counts.double().cpu(), table


def figures(table: Tensor, groups: Tensor) -> list[tuple[float, float]]:
    """Accuracy and mean IoU by both votes and the Hungarian matching."""
    merged = table.new_zeros(table.shape[1], table.shape[1]).index_add_(0, groups, table)
    matchings = majority_vote(merged, "iou"), majority_vote(merged, "count"), hungarian(merged)
    found = (scores(matched_confusion(merged, classes)) for classes in matchings)
    return [(100 * one.accuracy, 100 * one.mean_iou) for one in found]


def table(runs: list[tuple[Tensor, Tensor, Tensor]]) -> str:
    """Markdown."""
    lines = ["| merged by | IoU vote | count vote | Hungarian by count |", "|---|---|---|---|"]
    for name, way in WAYS.items():
        found = [figures(t, way(c, n, t.shape[1])) for c, n, t in runs]
        columns = torch.tensor(found).permute(1, 2, 0).tolist()  # matching, score, run
        cells = [" / ".join(map(spread, scored)) for scored in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


@command
def main(arguments: list[str] | None = None) -> None:
    """Count, merge and score."""
    parser = ArgumentParser(prog="python -m bench.linkages", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--data-root", required=True, metavar="DIR")
    parser.add_argument("--ignore-class", metavar="NAME", help="as void")
    parser.add_argument("--feature-cache", type=Path, metavar="DIR")
    o = parser.parse_args(arguments)
    log_to_stderr()
    more = ["--ignore-class", o.ignore_class] if o.ignore_class else []
    more += ["--feature-cache", str(o.feature_cache)] if o.feature_cache else []
    print(table([counted([run, "--data-root", o.data_root, *more]) for run in o.runs]))


if __name__ == "__main__":
    sys.exit(main())
