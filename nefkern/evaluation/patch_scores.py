"""What K-means on exact eigenvectors of κ would score: whether κ's spectrum is semantic at all."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch.nn.functional as F
from torch import Tensor

from nefkern.segmentation.clusterer import Clusterer
from nefkern.segmentation.matching import majority_vote, matched_confusion
from nefkern.segmentation.methods import of_run, parse_methods
from nefkern.segmentation.metrics import count_matrix, scores
from nefkern.segmentation.upsample import cells_of
from nefkern.spectral.kmeans import KMeans


@dataclass(frozen=True)
class PatchScore:
    """Scores of a clustering of patches, as fractions: majority vote by IoU and by count."""

    accuracy: float
    mean_iou: float
    accuracy_by_count: float
    mean_iou_by_count: float


def clusterings(
    maps: dict[str, Tensor], vectors: Tensor, *, seed: int, kind: str = "quantised"
) -> dict[str, Tensor]:
    """The batch's patches in K clusters, int64 ``[N]``, by what they were clustered on.

    All but the argmax of ψ are fitted on the very patches that they are scored on, which makes them
    higher than scores of images not seen before; compare them with each other. Eigenvectors enter
    as the rows of V Λ^(1/2), whose inner products are κ's best approximation of rank K.

    Args:
        maps: "logits", "hidden", "graph" and "concat" of the batch, ``[B, ·, h, w]``.
        vectors: V ``[N, m]`` of :func:`nefkern.spectral.eigenpairs.leading_eigenpairs`.
        seed: of K-means.
        kind: of the run's functions, see :func:`nefkern.segmentation.methods.of_run`: the argmax of
            quantised ones are its clusters; else K-means on them.
    """
    num_clusters, found = maps["logits"].shape[1], {}
    methods = parse_methods(["ours", "kmeans", "kmeans-concat"])
    for method in of_run(methods, kind):
        clusterer = Clusterer(method, num_clusters, seed=seed)
        clusterer.observe(maps)
        found[method.title] = clusterer.finish(vectors.device).logits(maps).argmax(1).flatten()
    rows = F.normalize(vectors).float()
    exact = KMeans(num_clusters, seed).fit(rows).predict(rows)
    return {"K-means on κ's exact eigenvectors": exact, **found}


def patch_score(
    clusters: Tensor,
    annotations: Tensor,
    grid: tuple[int, int],
    extent: tuple[float, float],
    num_classes: int,
) -> PatchScore:
    """Score a clustering of patches: every pixel has its patch's cluster.

    Args:
        clusters: int64 ``[B·h·w]``.
        annotations: uint8 ``[B, H, W]``, 255 void.
        grid: ``(h, w)``.
        extent: height and width in pixels that the grid spans, at least H × W.
        num_classes: C.
    """
    height, width = annotations.shape[1:]
    rows, cols = cells_of(height, grid[0], extent[0]), cells_of(width, grid[1], extent[1])
    pixels = clusters.view(-1, *grid).cpu()[:, rows[:, None], cols]
    counts = count_matrix(pixels, annotations, int(clusters.max()) + 1, num_classes)
    iou, count = (
        scores(matched_confusion(counts, majority_vote(counts, by))) for by in ("iou", "count")
    )
    return PatchScore(iou.accuracy, iou.mean_iou, count.accuracy, count.mean_iou)


def patch_scores(
    found: dict[str, Tensor],
    annotations: Tensor,
    grid: tuple[int, int],
    extent: tuple[float, float],
    num_classes: int,
) -> dict[str, dict[str, float]]:
    """:func:`patch_score` of every clustering; JSON-ready. Arguments as there."""
    return {
        name: asdict(patch_score(clusters, annotations, grid, extent, num_classes))
        for name, clusters in found.items()
    }
