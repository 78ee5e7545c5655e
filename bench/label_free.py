"""``python -m bench.label_free DATA``: does what needs no labels rank settings as mIoU does?

Settings of the spectral method (the backbone's block, α, k, K) are tried on a small annotated
folder. Each is fitted twice, on the two halves of the training images, and told on the validation
images, which no fit has seen: by mean IoU of their patches, and by criteria that no annotation
enters. Beside every criterion stands its rank correlation (Spearman) with mIoU over the settings of
one K, with the 95% interval of 2,000 resamples of the settings, and the mIoU of the setting that it
would have picked.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nefkern import ops
from nefkern.data import eval_transform, open_dataset
from nefkern.images.graph import GraphConfig, pixel_graph, pixel_neighbours
from nefkern.images.loading import load_backbone
from nefkern.reference.knn import unit_rows
from nefkern.runtime.commandline import log_to_stderr
from nefkern.runtime.errors import ArgumentParser, command
from nefkern.segmentation.matching import majority_vote, matched_confusion
from nefkern.segmentation.metrics import scores
from nefkern.spectral.eigenpairs import leading_eigenpairs
from nefkern.spectral.embedding import Embedding, adjacency, neighbour_lists
from nefkern.spectral.kmeans import KMeans
from nefkern.spectral.nystrom import degrees
from nefkern.training.spectral_model import ChannelScale, SpectralModel

log = logging.getLogger(__name__)

BACKBONE, PATCH, WIDTH = "vit_small_patch14_dinov2", 14, 384
BLOCKS, ALPHAS, NEIGHBOURS = (11, 9, 6), (0.0, 0.3, 0.5, 1.0), (16, 64)
PAIRS = GraphConfig().pixel_graphs
#: What no label enters, and what each measures.
CRITERIA = {
    "flip": "agreement with the clusters of mirrored images",
    "zoom": "agreement with those of the images' middle, enlarged",
    "light": "agreement with those of darker, blurred images",
    "halves": "agreement of the fits on the two halves of the training images",
    "seeds": "agreement of two seeds of K-means",
    "rayleigh": "held-out Rayleigh quotients of the leading K functions, over their eigenvalues",
    "gap": "eigenvalue K less eigenvalue 2K",
    "inertia": "K-means' inertia, least first",
    "smooth": "neighbouring patches of one cluster",
    "colour": "share of the colours' variance within images between clusters",
    "features": "share of the features' variance between clusters",
    "segments": "clusters in an image, fewest first",
    "spread": "images that a cluster occurs in",
}
RESAMPLES = 2000
_BATCH = 10


# ---- images ----


@dataclass
class Views:
    """Square crops of a data set: uint8 ``[B, 3, crop, crop]``, and counts of classes by patch."""

    train: Tensor
    val: dict[str, Tensor]
    counts: Tensor  # int64 [patches of val, C]

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of an image."""
        return self.train.shape[-1] // PATCH, self.train.shape[-1] // PATCH


def views(options: Any) -> Views:
    """Read the folder."""
    split = partial(
        open_dataset, "folder", root=options.data_root, ignore_classes=options.ignore_class
    )
    crop = eval_transform("crop320", options.crop)
    train, val = split(split="train"), split(split="val")
    images = [crop(train[i]).image for i in range(min(2 * options.images, len(train)))]
    samples = [crop(val[i]) for i in range(len(val))]
    side, classes = options.crop // PATCH, len(val.classes)
    labels = torch.stack([s.annotation for s in samples]).long()
    cells = labels.unflatten(1, (side, PATCH)).unflatten(3, (side, PATCH))
    cells = cells.transpose(2, 3).flatten(3).flatten(0, 2)
    counts = torch.zeros(len(cells), 256, dtype=torch.long)
    counts.scatter_add_(1, cells, torch.ones_like(cells))
    return Views(
        torch.stack(images),
        altered(torch.stack([s.image for s in samples])),
        counts[:, :classes],
    )


def altered(images: Tensor) -> dict[str, Tensor]:
    """The images, and what must not change their clusters much."""
    side = images.shape[-1]
    edge = 2 * PATCH
    middle = images[..., edge : side - edge, edge : side - edge].float()
    blur = torch.tensor([0.25, 0.5, 0.25])
    kernel = (blur[:, None] * blur).expand(3, 1, 3, 3)
    dark = F.conv2d(F.pad(images.float(), (1, 1, 1, 1), "replicate"), kernel, groups=3) * 0.8 + 12
    zoom = F.interpolate(middle, size=(side, side), mode="bicubic", antialias=True)
    return {
        "plain": images,
        "flip": images.flip(-1),
        "zoom": zoom.round().clamp(0, 255).to(torch.uint8),
        "light": dark.round().clamp(0, 255).to(torch.uint8),
    }


def features(images: Views) -> dict[str, Tensor]:
    """Of all views, all blocks side by side, float16 ``[patches, blocks · C]``."""
    high = ",".join(f"block:{block}" for block in BLOCKS)
    extract = load_backbone(BACKBONE, high=high).extractor(amp=True, compiled=False)
    found = {}
    for name, batch in (("train", images.train), *images.val.items()):
        log.info("features of %d images, %s", len(batch), name)
        with torch.autocast("cpu", torch.bfloat16):
            maps = [extract(part).high.flatten(0, 1).half() for part in batch.split(_BATCH)]
        found[name] = torch.cat(maps)
    return found


# ---- fits ----


@dataclass
class Fit:
    """Eigenvectors of one half of the training images at one setting."""

    model: SpectralModel

    @classmethod
    def of(cls, rows: Tensor, near: Tensor, alpha: float, k: int, count: int) -> Fit:
        """As ``train --method spectral`` computes them."""
        scale = ChannelScale.of(rows)
        rows = unit_rows(scale(rows))
        lists = neighbour_lists(rows, k, "cosine")
        pairs = leading_eigenpairs(kappa(lists, near, alpha), count, tol=1e-3)
        degree = degrees(lists.indices, lists.similarities, len(rows))
        vectors = pairs.vectors.contiguous()
        found = Embedding(
            pairs.values, vectors, pairs.residuals, degree, rows=rows, k=k, alpha=alpha
        )
        found = found.leading(found.extended(alpha))
        return cls(SpectralModel(found, PAIRS if alpha else (), k, scale=scale))

    def leading(self, count: int) -> SpectralModel:
        """With so many eigenvectors, and the features that they span."""
        part = self.model.embedding.leading(count)
        return SpectralModel(part, self.model.pixel_graphs, part.k, scale=self.model.scale).span()

    def functions(self, rows: Tensor, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """The eigenvectors at the patches of other images, ``[N, m]``."""
        embedding = self.model.embedding
        pixel = pixel_graph(images, grid, PAIRS) if embedding.alpha else None
        return embedding.extend(unit_rows(self.model.scale(rows)), pixel).float()


def kappa(lists: Any, near: Tensor, alpha: float) -> Any:
    """The graph of neighbour lists and, where α is not 0, of the pixels."""
    if not alpha:
        return adjacency(lists)
    count = len(lists.indices)
    return ops.kappa(lists.indices, lists.similarities, near, num_nodes=count, alpha=alpha)


def rayleigh(fit: Fit, functions: Tensor, rows: Tensor, near: Tensor, count: int) -> float:
    """ΣRayleigh quotients on κ of images not seen, over Σ eigenvalues of those that were."""
    embedding = fit.model.embedding
    lists = neighbour_lists(unit_rows(fit.model.scale(rows)), embedding.k, "cosine")
    graph = kappa(lists, near, embedding.alpha)
    basis = torch.linalg.qr(functions[:, :count].double())[0].float()
    held = (basis * ops.spmm(graph, basis)).sum()
    return float(held / embedding.values[:count].sum())


# ---- criteria ----


def agreement(first: Tensor, second: Tensor) -> float:
    """Normalised mutual information of two clusterings."""
    from sklearn.metrics import normalized_mutual_info_score

    return float(normalized_mutual_info_score(first.flatten(), second.flatten()))


def explained(clusters: Tensor, rows: Tensor, count: int) -> float:
    """Share of the rows' variance that lies between clusters."""
    sums = torch.zeros(count, rows.shape[1]).index_add_(0, clusters, rows)
    means = sums / clusters.bincount(minlength=count).clamp_min(1)[:, None]
    within = (rows - means[clusters]).square().sum()
    return float(1 - within / (rows - rows.mean(0)).square().sum())


def of_clusters(clusters: Tensor, grid: tuple[int, int], rows: Tensor, colours: Tensor) -> dict:
    """What one clustering of the validation images says for itself."""
    square, count = clusters.view(-1, *grid), int(clusters.max()) + 1
    images = square.flatten(1)
    down, right = square[:, 1:] == square[:, :-1], square[..., 1:] == square[..., :-1]
    pairs = torch.arange(len(images))[:, None].expand_as(images) * count + images
    met = pairs.unique() % count
    by_image = [explained(own, c, count) for own, c in zip(images, colours, strict=True)]
    return {
        "smooth": float((down.float().mean() + right.float().mean()) / 2),
        "colour": float(np.mean(by_image)),
        "features": explained(clusters, F.normalize(rows.float()), count),
        "segments": -len(met) / len(images),
        "spread": len(met) / len(met.unique()),
    }


def miou(clusters: Tensor, counts: Tensor, by: str) -> float:
    """Mean IoU of patches, in percent."""
    count = int(clusters.max()) + 1
    table = torch.zeros(count, counts.shape[1], dtype=torch.long).index_add_(0, clusters, counts)
    return 100 * scores(matched_confusion(table, majority_vote(table, by))).mean_iou


def settings(options: Any, images: Views) -> Iterator[dict[str, Any]]:
    """Fit and tell every setting; one record for each K of it."""
    found, grid = features(images), images.grid
    cells = grid[0] * grid[1]
    half = len(images.train) // 2 * cells
    near = pixel_neighbours(images.train, grid, PAIRS)
    seen = pixel_neighbours(images.val["plain"], grid, PAIRS)
    colours = F.avg_pool2d(images.val["plain"].float(), PATCH).flatten(2).transpose(1, 2)
    for (at, block), alpha, k in product(enumerate(BLOCKS), ALPHAS, NEIGHBOURS):
        started = time.time()
        part = {n: f[:, at * WIDTH : (at + 1) * WIDTH].float() for n, f in found.items()}
        fits, functions = [], {}
        for h in (0, 1):
            lists = near[h * half : (h + 1) * half]
            lists = torch.where(lists < 0, lists, lists - h * half)
            rows = part["train"][h * half : (h + 1) * half]
            fits.append(Fit.of(rows, lists, alpha, k, 2 * max(options.clusters)))
            for name in images.val if h == 0 else ("plain",):
                functions[h, name] = fits[h].functions(part[name], images.val[name], grid)
        for count in options.clusters:
            record = {"block": block, "alpha": alpha, "k": k, "K": count}
            told = tell(fits, functions, count, part["plain"], seen, colours, images)
            yield record | told | {"seconds": round(time.time() - started, 1)}
            started = time.time()


def tell(
    fits: list[Fit],
    functions: dict[tuple[int, str], Tensor],
    count: int,
    rows: Tensor,
    seen: Tensor,
    colours: Tensor,
    images: Views,
) -> dict[str, float]:
    """mIoU and every criterion at K = ``count``."""
    grid, found, inertia = images.grid, {}, 0.0
    for h, fit in enumerate(fits):
        model = fit.leading(2 * count)
        width = model.num_functions
        train = model.cluster_rows(model.embedding.vectors)
        for seed in (0, 1) if h == 0 else (0,):
            kmeans = KMeans(count, seed).fit(train)
            for (half, name), values in functions.items():
                if half == h and (seed == 0 or name == "plain"):
                    found[h, seed, name] = kmeans.predict(model.cluster_rows(values[:, :width]))
            if (h, seed) == (0, 0):
                inertia = kmeans.inertia / len(train)
    own, other = found[0, 0, "plain"], found[1, 0, "plain"]
    side = grid[0]
    inner = 2 + (torch.arange(side) * (side - 4)) // side  # where an enlarged patch comes from
    square = own.view(-1, *grid)
    values = fits[0].model.embedding.values
    last = len(values) - 1
    return {
        "mIoU": (miou(own, images.counts, "iou") + miou(other, images.counts, "iou")) / 2,
        "by count": (miou(own, images.counts, "count") + miou(other, images.counts, "count")) / 2,
        "flip": agreement(square.flip(-1), found[0, 0, "flip"]),
        "zoom": agreement(square[:, inner][:, :, inner], found[0, 0, "zoom"]),
        "light": agreement(own, found[0, 0, "light"]),
        "halves": agreement(own, other),
        "seeds": agreement(own, found[0, 1, "plain"]),
        "rayleigh": rayleigh(fits[0], functions[0, "plain"], rows, seen, count),
        "gap": float(values[min(count - 1, last)] - values[min(2 * count - 1, last)]),
        "inertia": -inertia,
        **of_clusters(own, grid, rows, colours),
    }


# ---- what came of it ----


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Rank correlation; NaN where one is constant."""
    from scipy.stats import rankdata

    a, b = rankdata(first), rankdata(second)
    if a.std() == 0 or b.std() == 0:
        return math.nan
    return float(np.corrcoef(a, b)[0, 1])


def interval(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """The middle 95% of the correlations of resampled settings."""
    generator = np.random.default_rng(0)
    drawn = generator.integers(len(first), size=(RESAMPLES, len(first)))
    found = np.array([spearman(first[d], second[d]) for d in drawn])
    if np.isnan(found).all():  # a constant criterion
        return math.nan, math.nan
    low, high = np.nanquantile(found, (0.025, 0.975))
    return float(low), float(high)


def table(records: list[dict[str, Any]], count: int) -> str:
    """Markdown: every criterion against mIoU over the settings of K = ``count``."""
    own = [r for r in records if r["K"] == count]
    target = np.array([r["mIoU"] for r in own])
    usual = [r["mIoU"] for r in own if (r["block"], r["alpha"], r["k"]) == (9, 0.5, 64)]
    lines = [
        f"K = {count}, {len(own)} settings: mIoU {target.min():.1f} to {target.max():.1f}, "
        f"mean {target.mean():.1f}; the default's {usual[0] if usual else math.nan:.1f}",
        "",
        "| criterion | rank correlation with mIoU | its pick | mIoU of its pick |",
        "|---|---|---|---|",
    ]
    for name in CRITERIA:
        values = np.array([r[name] for r in own])
        best = own[int(values.argmax())]
        low, high = interval(values, target)
        pick = f"block {best['block']}, α {best['alpha']:g}, k {best['k']}"
        cells = [f"{spearman(values, target):+.2f} [{low:+.2f}, {high:+.2f}]", pick]
        lines.append(f"| {name} | {' | '.join(cells)} | {best['mIoU']:.1f} |")
    return "\n".join(lines)


def parser() -> ArgumentParser:
    """The command line."""
    result = ArgumentParser(prog="python -m bench.label_free", description=__doc__)
    add = result.add_argument
    add("data_root", metavar="DATA", help="images/, annotations/{train,val}/, classes.txt")
    add("--json", type=Path, metavar="FILE", required=True, help="settings done; those are kept")
    add("--ignore-class", action="append", default=[], metavar="CLASS", help="read as void")
    add("--images", type=int, default=50, help="of each half of the training split [50]")
    add("--crop", type=int, default=280, help="a multiple of 14 [280]")
    add("--clusters", type=lambda t: [int(k) for k in t.split(",")], default=[128, 64], help="K")
    add("--table", action="store_true", help="print the tables of --json, and run nothing")
    return result


@command
@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    """Run what is not done, and print the tables."""
    options = parser().parse_args(arguments)
    log_to_stderr()
    records = json.loads(options.json.read_text("utf-8")) if options.json.exists() else []
    if not options.table:
        records = []
        for record in settings(options, views(options)):
            records.append(record)
            options.json.write_text(json.dumps(records, indent=1))
            log.info("%s", {n: round(v, 3) for n, v in record.items()})
    for count in sorted({r["K"] for r in records}, reverse=True):
        print(table(records, count), end="\n\n")


if __name__ == "__main__":
    sys.exit(main())
