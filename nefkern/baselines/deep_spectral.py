"""The deep spectral method: exact eigenvectors image by image, clusters across images after.

Melas-Kyriazi, Rupprecht, Laina, Vedaldi: *Deep Spectral Methods: A Surprisingly Strong Baseline for
Unsupervised Semantic Segmentation and Localization*, CVPR 2022. The paper discusses it as the
nearest relative of neural eigenfunctions, and could not run it for comparison.

Theirs, and kept: a graph of the patches of one image from deep features and colour; the leading
eigenvectors of its normalised Laplacian, computed exactly; 15 segments an image by K-means on them;
one feature for each segment, clustered over the data set by K-means, every segment counted once.

Ours, where theirs would compare other things than the eigenvectors:

- the graph is κ (eq 4) on the patches of the image alone, k nearest neighbours and pixel graph as
  in training; theirs has all pairs of patches with positive similarity, of the keys of DINO's last
  attention layer, plus a colour graph;
- κ's m = 15 leading eigenvectors with rows scaled to unit norm (Ng, Jordan, Weiss, NIPS 2001).
  Theirs solve the generalised problem (D − W) y = μ D y; but κ is a sum of two kernels of their
  own degrees, and has no D. Unit rows take out the degrees, and K-means on them does not depend on
  the basis that equal eigenvalues leave open;
- a segment's feature is the mean of F over its patches; theirs is the backbone's class token of
  the segment's bounding box, cut out and enlarged;
- all segments are clustered; they set the one with most of the image's border apart as background,
  and train a segmentation network on the result.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nefkern.ops import CSRGraph
from nefkern.spectral.eigenpairs import leading_eigenpairs
from nefkern.spectral.kmeans import KMeans

#: Eigenvectors, and so segments, of an image: theirs for semantic segmentation.
NUM_SEGMENTS = 15


class DeepSpectral:
    """Segments of single images from the exact eigenvectors of their κ.

    An image's segments depend on the image and the seed alone, not on what else is in its batch.

    Args:
        num_segments: m, eigenvectors and segments an image; its patches where they are fewer.
        seed: of Lanczos' start vector and of K-means.
    """

    def __init__(self, num_segments: int = NUM_SEGMENTS, *, seed: int = 0) -> None:
        if num_segments < 1:
            raise ValueError(f"num_segments must be at least 1, got {num_segments}")
        self.num_segments, self.seed = num_segments, seed

    def segments(self, graph: CSRGraph) -> Tensor:
        """Segments of one image.

        Args:
            graph: κ of its n patches.

        Returns:
            int64 ``[n]`` on the CPU, from 0 to m - 1.
        """
        count = min(self.num_segments, graph.num_nodes)
        vectors = leading_eigenpairs(graph, count, tol=0, seed=self.seed).vectors.cpu()
        rows = F.normalize(vectors, dim=1).float()
        return KMeans(count, self.seed).fit(rows).predict(rows)

    def segment_means(self, graph: CSRGraph, features: Tensor) -> Tensor:
        """Every patch's feature replaced by the mean over its segment.

        Args:
            graph: κ of all images, block-diagonal (:func:`nefkern.images.graph.image_kappa`).
            features: F, ``[B, C, h, w]``.

        Returns:
            Float32 ``[B, C, h, w]``, constant on a segment.
        """
        rows = features.movedim(1, -1).flatten(1, 2).float()  # [B, n, C]
        blocks = diagonal_blocks(graph, len(rows))
        means = [
            _means(own, self.segments(block).to(own.device))
            for own, block in zip(rows, blocks, strict=True)
        ]
        return torch.stack(means).transpose(1, 2).unflatten(2, features.shape[2:])


def diagonal_blocks(graph: CSRGraph, count: int) -> list[CSRGraph]:
    """The ``count`` blocks of equal size on the diagonal of a graph with no other entries.

    Raises:
        ValueError: the nodes don't divide into so many blocks.
    """
    if count < 1 or graph.num_nodes % count:
        raise ValueError(f"count: expected a divisor of {graph.num_nodes} nodes, got {count}")
    n, blocks = graph.num_nodes // count, []
    for first in range(0, graph.num_nodes, max(n, 1)):
        offsets = graph.row_offsets[first : first + n + 1]
        entries = slice(int(offsets[0]), int(offsets[-1]))
        columns, values = graph.columns[entries] - first, graph.values[entries]
        blocks.append(CSRGraph(offsets - offsets[0], columns, values, n, graph.symmetric))
    return blocks


def _means(rows: Tensor, segments: Tensor) -> Tensor:
    """The mean of each row's segment, ``[n, C]``."""
    members = F.one_hot(segments).to(rows)
    sums, counts = members.T @ rows, members.sum(0)
    # Rows are copied from one table, so that those of a segment are equal to the bit.
    return (sums / counts.clamp(min=1)[:, None])[segments]
