"""What the benchmarks of the graph operators share: neighbour lists, and the dense formulas."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.bench_knn import clustered
from bench.harness import DEVICE
from nefkern import ops
from nefkern.ops import CSRGraph, add, knn, normalized_adjacency

# images, patches an image, feature channels, neighbours k, eigenfunctions K
SIZES = {
    "small": (2, 128, 64, 16, 32),
    "paper": (16, 900, 384, 256, 256),
    "large": (64, 900, 384, 256, 256),
}
DENSE_ROWS = 20_000  # dense opponents stay out above this
ALPHA = 0.3


@functools.cache
def lists(size: str) -> tuple[Tensor, Tensor, Tensor]:
    """(feature neighbours [N, k], their similarities, pixel neighbours [N, 15])."""
    images, patches, channels, k, _ = SIZES[size]
    return lists_of(clustered(images * patches, channels), images, k)


def lists_of(features: Tensor, images: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same for these rows, of so many images of random colours."""
    similarities, neighbours = knn(features, k)
    pixels = torch.rand(len(features), 5, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    offsets = torch.arange(images + 1, device=DEVICE) * (len(features) // images)
    near = [knn(pixels, n, metric="euclidean", segments=offsets)[1] for n in (10, 5)]
    return neighbours, similarities, torch.cat(near, dim=1)


def kappa(neighbours: Tensor, similarities: Tensor, pixels: Tensor) -> CSRGraph:
    """kappa from the lists (eq 4)."""
    return ops.kappa(neighbours, similarities, pixels, num_nodes=len(neighbours), alpha=ALPHA)


def composed_kappa(neighbours: Tensor, similarities: Tensor, pixels: Tensor) -> CSRGraph:
    """The same by way of both graphs."""
    n = len(neighbours)
    features = normalized_adjacency(neighbours, similarities, num_nodes=n)
    return add(features, normalized_adjacency(pixels, num_nodes=n, symmetrize="union"), ALPHA)


def dense_kappa(neighbours: Tensor, similarities: Tensor, pixels: Tensor) -> Tensor:
    """The same as an N x N matrix, as one writes it down in PyTorch."""
    n = len(neighbours)
    zeros = torch.zeros(n, n, device=neighbours.device)
    a = zeros.scatter(1, neighbours.long(), similarities.clamp(min=0))
    b = zeros.scatter_(1, pixels.long(), 1.0)
    return _normalized((a + a.T) / 2) + ALPHA * _normalized(torch.maximum(b, b.T))


def _normalized(a: Tensor) -> Tensor:
    degree = a.sum(1)
    scale = torch.where(degree > 0, degree.rsqrt(), 0.0)
    return scale[:, None] * a * scale[None, :]


def psi_rows(rows: int, count: int) -> Tensor:
    """U [rows, count]: columns of unit norm."""
    outputs = torch.randn(rows, count, generator=torch.Generator().manual_seed(2))
    return F.normalize(outputs, dim=0).to(DEVICE)


def psi_of(size: str, graph: CSRGraph) -> Tensor:
    """U [N, K] for the graph."""
    return psi_rows(graph.num_nodes, SIZES[size][-1])


def sizes_of(size: str, graph: CSRGraph) -> dict[str, int]:
    return {"N": graph.num_nodes, "k": SIZES[size][3], "K": SIZES[size][4], "nnz": graph.nnz}
