"""Inputs of every operator, made by PyTorch alone: no kernel under test has a part in them."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.bench_knn import clustered
from bench.graph_inputs import SIZES, psi_rows
from bench.harness import DEVICE
from nefkern.ops import CSRGraph

ALPHA, NEAR = 0.3, 15
#: images, patches an image, channels, neighbours, eigenfunctions: no multiples of a tile or vector.
RAGGED = {"paper": (3, 331, 67, 37, 41), "small": (3, 37, 19, 7, 13)}
#: B, H, N, D of the attention.
ATTENTION = {"paper": (16, 18, 900, 64), "small": (2, 2, 128, 64)}
RAGGED_ATTENTION = {"paper": (3, 5, 331, 40), "small": (2, 3, 37, 24)}


@dataclass(frozen=True)
class Sizes:
    images: int
    patches: int
    channels: int
    k: int
    outputs: int
    attention: tuple[int, int, int, int]

    @property
    def rows(self) -> int:
        return self.images * self.patches


def sizes_of(size: str, scale: str) -> Sizes:
    """Of "paper", "small" or "ragged"; the ragged ones are those of a ``scale``."""
    if size == "ragged":
        return Sizes(*RAGGED[scale], RAGGED_ATTENTION[scale])
    return Sizes(*SIZES[size], ATTENTION[size])


@functools.cache
def features(sizes: Sizes) -> Tensor:
    return clustered(sizes.rows, sizes.channels)


@functools.cache
def pixels(sizes: Sizes) -> Tensor:
    """[N, 5] positions and colours."""
    return torch.rand(sizes.rows, 5, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def offsets(sizes: Sizes) -> Tensor:
    return torch.arange(sizes.images + 1, device=DEVICE) * sizes.patches


@functools.cache
def lists(sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """Feature neighbours [N, k], their similarities, pixel neighbours [N, 15]."""
    unit = F.normalize(features(sizes))
    scores = (unit @ unit.T).fill_diagonal_(-math.inf)
    values, neighbours = scores.topk(sizes.k)
    points = pixels(sizes).view(sizes.images, sizes.patches, 5)
    distances = torch.cdist(points, points)
    distances.diagonal(dim1=1, dim2=2).fill_(math.inf)
    near = distances.topk(min(NEAR, sizes.patches - 1), largest=False).indices
    near = (near + offsets(sizes)[:-1, None, None]).flatten(0, 1)
    return neighbours.int(), values, near.int()


@functools.cache
def graph(sizes: Sizes) -> CSRGraph:
    """κ of the lists, by way of the dense formulas."""
    from bench.gpu import oracles

    return CSRGraph.from_torch(oracles.kappa(*lists(sizes), ALPHA).float(), symmetric=True)


def psi(sizes: Sizes, dtype: torch.dtype) -> Tensor:
    return psi_rows(sizes.rows, sizes.outputs).to(dtype)


def attention(sizes: Sizes, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v as views of one projection, and the gradient of the result."""
    b, h, n, d = sizes.attention
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(b, n, 3, h, d, generator=generator).to(DEVICE, dtype).permute(2, 0, 3, 1, 4)
    grad = torch.randn(b, n, h, d, generator=generator).to(DEVICE, dtype).transpose(1, 2)
    return [*qkv.unbind(0), grad]


def weights(rows: int, columns: int) -> Tensor:
    """[rows, columns] float64 in [-1, 1]: the gradient that a sum of weighted entries sends back"""
    i = torch.arange(rows, device=DEVICE, dtype=torch.float64)[:, None]
    j = torch.arange(columns, device=DEVICE, dtype=torch.float64)
    return torch.cos(0.37 * i + 1.3 * j)
