"""The graph kernel κ over all patches of a mini-batch, from features and pixels (section 3.3)."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nefkern import ops
from nefkern.ops import CSRGraph, knn, normalized_adjacency
from nefkern.ops.kappa import kappa_padded
from nefkern.runtime.errors import UserError


@dataclass(frozen=True)
class GraphConfig:
    """What κ is made of.

    Attributes:
        neighbours: k of the feature graph: a number, or a share of N such as "2%". The paper's 256
            was 1.8% of its N = 14,400 rows.
        alpha: weight α of the pixel graph (eq 4).
        pixel_graphs: pairs (k̃, λ): neighbours within the image and weight of the position. The
            authors' implementation takes the union of these two.
    """

    neighbours: int | str = 256
    alpha: float = 0.3
    pixel_graphs: tuple[tuple[int, float], ...] = ((10, 2.0), (5, 0.1))

    def __post_init__(self) -> None:
        resolve_neighbours(self.neighbours, sys.maxsize)  # whether it is a number or share at all
        if not 0 <= self.alpha < math.inf:
            raise UserError(f"--alpha {self.alpha}: expected a weight of at least 0")
        for k, weight in self.pixel_graphs:
            if k < 1 or not 0 <= weight < math.inf:
                raise UserError(
                    f"--pixel-graphs {k}:{weight}: expected k̃ of at least 1 and λ of at least 0"
                )


def resolve_neighbours(
    neighbours: int | str,
    rows: int,
    of: str = "a batch",
    way_out: str = "raise --batch-size or --crop",
    flag: str = "--k",
) -> int:
    """k for ``rows`` rows: a number as it is, "2%" as that share of them, at least 1.

    Args:
        neighbours: what the flag says.
        rows: N.
        of: whose rows they are, and
        way_out: how there could be more, for the error's text.
        flag: what gave the number.

    Raises:
        UserError: not a positive number or percentage, or not below the number of rows.
    """
    text = str(neighbours).strip()
    try:
        share = float(text[:-1]) if text.endswith("%") else None
        k = int(text) if share is None else max(1, round(share / 100 * rows))
    except (ValueError, OverflowError):
        share = k = 0
    if k < 1 or (share is not None and not 0 < share < 100):
        raise UserError(
            f"{flag} {neighbours}: expected a number of neighbours, or a share of N such as 2%"
        )
    if k >= rows:
        raise UserError(
            f"{flag} {neighbours}: expected fewer than the {rows} rows (patches) of {of}; "
            f"lower {flag}, or {way_out}"
        )
    return k


def standardized(features: Tensor) -> Tensor:
    """``[..., D] → [N, D]`` float32, every channel with mean 0 and variance 1 over the N rows."""
    rows = features.flatten(0, -2).float()
    return (rows - rows.mean(0)) / rows.std(0).clamp_min(1e-6)


def image_offsets(count: int, grid: tuple[int, int]) -> Tensor:
    """Where the patches of each of ``count`` images begin and end, int64 ``[count + 1]``.

    On the CPU, where :func:`nefkern.ops.knn` reads them without waiting for a GPU.
    """
    return torch.arange(count + 1) * (grid[0] * grid[1])


def feature_graph(features: Tensor, k: int, segments: Tensor | None = None) -> CSRGraph:
    """The normalised feature graph (eq 2): cosine neighbours among all rows of the batch.

    Args:
        features: F, ``[N, C]``.
        k: neighbours of each row, itself excluded; negative similarities count as 0.
        segments: offsets of rows that are neighbours only among themselves.
    """
    similarities, neighbours = knn(features, k, metric="cosine", segments=segments)
    return normalized_adjacency(
        neighbours, similarities, num_nodes=len(features), symmetrize="mean", clamp_min=0.0
    )


def pixel_positions(images: Tensor, grid: tuple[int, int], weight: float) -> Tensor:
    """Colour and weighted position of every patch (eq 3).

    Args:
        images: ``[B, 3, H, W]`` RGB, uint8 or float in [0, 1].
        grid: ``(h, w)``.
        weight: λ.

    Returns:
        ``[B·h·w, 5]`` float32: red, green, blue, λx, λy.
    """
    images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    h, w = grid
    colour = F.interpolate(images, grid, mode="bilinear", align_corners=False)
    y, x = torch.meshgrid(
        torch.linspace(0, 1, h, device=images.device),
        torch.linspace(0, 1, w, device=images.device),
        indexing="ij",
    )
    position = weight * torch.stack([x, y]).expand(len(images), 2, h, w)
    return torch.cat([colour, position], dim=1).flatten(2).transpose(1, 2).reshape(-1, 5)


def pixel_neighbours(
    images: Tensor, grid: tuple[int, int], pairs: tuple[tuple[int, float], ...]
) -> Tensor:
    """The lists of all pixel graphs side by side: nearest neighbours within each image.

    Args:
        images: ``[B, 3, H, W]`` RGB, uint8 or float in [0, 1].
        grid: ``(h, w)``.
        pairs: (k̃, λ) of each graph.

    Returns:
        ``[B·h·w, Σ k̃]`` int32, -1 where an image has fewer patches; a neighbour by two graphs
        stands there twice.
    """
    offsets = image_offsets(len(images), grid)
    lists = [
        knn(pixel_positions(images, grid, weight), k, metric="euclidean", segments=offsets)[1]
        for k, weight in pairs
    ]
    return torch.cat(lists, dim=1)


def pixel_graph(
    images: Tensor, grid: tuple[int, int], pairs: tuple[tuple[int, float], ...]
) -> CSRGraph:
    """The normalised pixel graph: :func:`pixel_neighbours` with weight 1, joined by or."""
    near = pixel_neighbours(images, grid, pairs)
    return normalized_adjacency(near, num_nodes=len(near), symmetrize="union")


@torch.no_grad()
def kappa(
    features: Tensor,
    images: Tensor,
    grid: tuple[int, int],
    config: GraphConfig,
    *,
    padded: bool = False,
) -> CSRGraph:
    """κ = D^(-1/2) A D^(-1/2) + α D̃^(-1/2) Ã D̃^(-1/2) (eq 4).

    Args:
        features: F, ``[B·h·w, C]`` or ``[B, h·w, C]``.
        images: ``[B, 3, H, W]``, the pictures the features come from, padded to the grid.
        grid: ``(h, w)`` of the patches.
        config: neighbours, α, pixel graphs.
        padded: with room for the most entries there can be, so that nothing waits for a GPU; for
            products only, see :func:`nefkern.ops.kappa.kappa_padded`.

    Raises:
        UserError: as many neighbours asked for as there are rows.
    """
    features = features.reshape(-1, features.shape[-1])
    k = resolve_neighbours(config.neighbours, len(features))
    return _kappa(features, k, images, grid, config, padded=padded)


@torch.no_grad()
def image_kappa(
    features: Tensor, images: Tensor, grid: tuple[int, int], config: GraphConfig, k: int
) -> CSRGraph:
    """κ of every image by itself: feature neighbours too are of the row's own image only.

    Args:
        features, images, grid, config: as for :func:`kappa`.
        k: feature neighbours, instead of the configuration's; all others where there are fewer.

    Returns:
        A graph of ``B·h·w`` nodes without an edge between images: block-diagonal.
    """
    features = features.reshape(-1, features.shape[-1])
    offsets = image_offsets(len(images), grid)
    k = max(1, min(k, grid[0] * grid[1] - 1))
    return _kappa(features, k, images, grid, config, offsets)


def _kappa(
    features: Tensor,
    k: int,
    images: Tensor,
    grid: tuple[int, int],
    config: GraphConfig,
    segments: Tensor | None = None,
    *,
    padded: bool = False,
) -> CSRGraph:
    pixels = config.alpha != 0 and len(config.pixel_graphs) > 0
    if not (pixels or padded):
        return feature_graph(features, k, segments)
    similarities, neighbours = knn(features, k, metric="cosine", segments=segments)
    near = (
        pixel_neighbours(images, grid, config.pixel_graphs)
        if pixels
        else neighbours.new_empty(len(features), 0)
    )
    assemble = kappa_padded if padded else ops.kappa
    return assemble(neighbours, similarities, near, num_nodes=len(features), alpha=config.alpha)
