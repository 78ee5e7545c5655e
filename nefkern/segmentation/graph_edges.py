"""Edges of segments by a sparse solve on the image's pixel graph: no CRF, in a tenth of its time.

Probabilities come from patches, a dozen pixels wide. On the graph W whose weights tell how alike
two near pixels look, the solution of

    (C + λ (I − P)) u = C p,        P = D⁻¹ W

is near to the patches' probabilities p and as smooth as W is: each pixel asks those that a random
walk over like pixels leads to (Zhou et al., *Learning with local and global consistency*, NeurIPS
2003; Grady, *Random walks for image segmentation*, PAMI 2006, with patches as soft seeds). C, how
far the first cluster leads the second, is what the walk trusts: between two patches nothing is
known, and there edges move to where colours change.

It is solved by steps of the Chebyshev semi-iterative method (Golub and Varga 1961), whose products
are :func:`nefkern.ops.spmm`. Steps and coefficients are always the same: the result is
deterministic, differentiable in probabilities and image, and a pixel's depends on those within
reach alone. Where a patch spans many pixels, the nodes are cells of a few; between cells of
different segments a pixel goes with those that it looks like (Kopf et al., *Joint bilateral
upsampling*, SIGGRAPH 2007).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nefkern.ops import CSRGraph, spmm
from nefkern.segmentation.crf import check_probabilities
from nefkern.segmentation.refinement import Job, Refined

#: Nodes that are solved at once: their graph takes some 300 bytes each.
_MOST_NODES = 1 << 20

#: The least weight of an edge: in a grain of its own colour a pixel would be alone.
_LEAST = 1e-4


@dataclass(frozen=True)
class GraphEdges:
    """Parameters of the pixel graph and of the solve.

    Attributes:
        distances: neighbours lie in eight directions at these distances, in nodes.
        colour: standard deviation of the weight's Gaussian of two nodes' difference in colour,
            channels in [0, 1].
        smoothness: λ.
        least: C where the first two clusters are equally probable; where one is certain it is 1.
        steps: of the iteration.
        cells: nodes along a patch's side, at least.
    """

    distances: tuple[int, ...] = (1, 2, 4)
    colour: float = 0.03
    smoothness: float = 20.0
    least: float = 0.3
    steps: int = 10
    cells: int = 7

    @property
    def reach(self) -> int:
        """Nodes, along an axis, that a step takes anything from."""
        return max(self.distances)

    def pixels(self, patch: float) -> int:
        """Pixels along a node's side, where a patch's has ``patch`` of them."""
        return max(1, int(patch / self.cells))


DEFAULT = GraphEdges()
"""Chosen on images of the two small sets of docs/quality.md, by boundary F-score and mean IoU."""


def graph_edges(
    image: Tensor, probabilities: Tensor, patch: float = 1.0, parameters: GraphEdges = DEFAULT
) -> Tensor:
    """Probabilities drawn to the edges of one image.

    Args:
        image: ``[3, H, W]`` RGB, uint8, or floating point in [0, 1].
        probabilities: floating point ``[K, H, W]``, K ≥ 1, sums to 1 over K. Time and memory grow
            with K: give the clusters that win a pixel.
        patch: side in pixels of what the probabilities were interpolated between; nodes are of as
            many pixels as leave ``parameters.cells`` along it.

    Returns:
        float32 ``[K, H, W]`` on the device of ``probabilities``; sums to 1 over K up to rounding,
        and lies in [0, 1] up to what the iteration leaves, a few thousandths on photographs.

    Raises:
        ValueError: wrong dtype or shape, or a probability that is NaN.
    """
    image = _checked(image, probabilities).to(probabilities.device)
    p = probabilities.float()
    if len(p) == 1:
        return p
    side = parameters.pixels(patch)
    if side == 1:
        return _banded(image, p, parameters)
    size = [-(-length // side) for length in image.shape[1:]]
    nodes = F.interpolate(image[None], size, mode="area")[0]
    coarse = F.interpolate(p[None], size, mode="bilinear")[0]
    return _upsampled(_banded(nodes, coarse, parameters), nodes, image, parameters.colour)


class GraphRefiner:
    """Refines jobs by :func:`graph_edges`, in order, with the face of
    :class:`nefkern.segmentation.refinement.Refiner`.

    Attributes:
        inferences: how many were refined.
        seconds: what they took.
    """

    def __init__(self, parameters: GraphEdges = DEFAULT) -> None:
        self.parameters = parameters
        self.inferences, self.seconds = 0, 0.0

    def refine(self, job: Job) -> Tensor:
        """The best of the job's labels at every pixel, int64 ``[H, W]``; of equals the first."""
        started = time.perf_counter()
        found = graph_edges(job.image, job.probabilities, job.patch, self.parameters)
        labels = job.labels[found.argmax(0).to(job.labels.device)]
        self.inferences += 1
        self.seconds += time.perf_counter() - started
        return labels

    @contextlib.contextmanager
    def __call__(self, jobs: Iterable[Job]) -> Iterator[Iterator[Refined]]:
        """``with refiner(jobs) as results``."""
        yield (Refined(self.refine(job), job.context) for job in jobs)


def _checked(image: Tensor, probabilities: Tensor) -> Tensor:
    """The image, float32 in [0, 1]."""
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"image must be [3, H, W], got {tuple(image.shape)}")
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise ValueError(f"image must be uint8 or floating point, got {image.dtype}")
    check_probabilities(image, probabilities)
    return image.float() / 255 if image.dtype == torch.uint8 else image.float()


# ---- the solve ----


def _banded(image: Tensor, p: Tensor, parameters: GraphEdges) -> Tensor:
    """The solution; of large images band by band, which changes nothing: none reaches farther."""
    parts = [
        solved(image[:, low:high], p[:, low:high], parameters)[:, first - low : last - low]
        for first, last, low, high in _bands(*image.shape[1:], parameters)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _bands(height: int, width: int, p: GraphEdges) -> Iterator[tuple[int, int, int, int]]:
    """Rows that are solved together: first and last of the result, low and high of what they look
    at, half-open."""
    halo = p.reach * (p.steps + 1)  # a step takes from neighbours, and these have their own degrees
    rows = height if height * width <= _MOST_NODES else max(halo, _MOST_NODES // width)
    for first in range(0, height, rows):
        last = min(first + rows, height)
        yield first, last, max(0, first - halo), min(height, last + halo)


def solved(image: Tensor, p: Tensor, parameters: GraphEdges = DEFAULT) -> Tensor:
    """About u of an image, float ``[3, H, W]``, whose pixels are the nodes, and p ``[K, H, W]``,
    K ≥ 2.

    u is the fixed point of u = M u + b with M = λ (C + λ)⁻¹ P and b = C (C + λ)⁻¹ p. M is similar
    to a symmetric matrix and has no eigenvalue beyond ρ = λ / (min C + λ), so that

        u₊ = u₋ + ω (M u + b − u₋),    ω₁ = 1, ω₂ = 2 / (2 − ρ²), ω₊ = 4 / (4 − ρ² ω)

    is the best for all such M that so many products can do.
    """
    frame, smooth = [parameters.reach] * 4, parameters.smoothness
    first, second = p.topk(2, dim=0).values
    trust = parameters.least + (1 - parameters.least) * (first - second)
    moved = smooth / (trust + smooth)
    walk = random_walk(image, parameters, moved)
    rho = smooth / (parameters.least + smooth)
    given = F.pad(p, frame).flatten(1).T.contiguous()
    fixed = F.pad(1 - moved, frame).flatten()[:, None] * given
    before, found, omega = given, spmm(walk, given) + fixed, 1.0
    for step in range(1, parameters.steps):
        omega = 2 / (2 - rho**2) if step == 1 else 4 / (4 - rho**2 * omega)
        before, found = found, torch.lerp(before, spmm(walk, found).add_(fixed), omega)
    found = found.T.unflatten(1, (image.shape[1] + 2 * frame[0], -1))
    return found[:, frame[0] : -frame[0], frame[0] : -frame[0]]


def random_walk(image: Tensor, p: GraphEdges = DEFAULT, scale: Tensor | None = None) -> CSRGraph:
    """P = D⁻¹ W of an image, float ``[3, H, W]``; with a scale ``[H, W]``, its rows times that.

    Returns:
        A graph whose nodes are the pixels within a frame of ``p.reach`` further ones,
        ``(H + 2 reach) · (W + 2 reach)`` row by row. Each pixel has all its neighbours, so that
        every row is made alike, those of the frame with a weight of 0; rows of pixels sum to 1, if
        any neighbour is a pixel, and those of the frame are empty.
    """
    _, height, width = image.shape
    half = [(y * d, x * d) for d in p.distances for y, x in ((0, 1), (1, -1), (1, 0), (1, 1))]
    every = sorted([*half, *((-y, -x) for y, x in half)])
    weights = image.new_zeros(height, width, len(every))
    for y, x in half:
        if y < height and abs(x) < width:
            here = slice(0, height - y), slice(max(0, -x), width - max(0, x))
            there = slice(y, height), slice(max(0, x), width + min(0, x))
            alike = _alike(image[(slice(None), *here)], image[(slice(None), *there)], p.colour)
            weights[(*here, every.index((y, x)))] = alike
            weights[(*there, every.index((-y, -x)))] = alike
    total = weights.sum(-1).clamp_min(_LEAST)
    values = weights * (1 / total if scale is None else scale / total)[..., None]
    return _framed(values, every, p.reach)


def _alike(first: Tensor, second: Tensor, deviation: float) -> Tensor:
    apart = (first - second).square().sum(0)
    return (apart * (-0.5 / deviation**2)).exp() + _LEAST


def _framed(values: Tensor, steps: list[tuple[int, int]], frame: int) -> CSRGraph:
    """The graph of values ``[H, W, n]`` to pixels that many rows and columns away, in order."""
    height, width, degree = values.shape
    wide = width + 2 * frame
    ones = torch.ones(height, width, dtype=torch.int64, device=values.device)
    inside = F.pad(ones, [frame] * 4).flatten()
    offsets = F.pad(degree * inside.cumsum(0), (1, 0))
    away = torch.tensor([y * wide + x for y, x in steps], device=values.device)
    columns = (inside.nonzero() + away).int()
    return CSRGraph(offsets, columns.flatten(), values.flatten(), len(inside))


# ---- from nodes to pixels ----


def _upsampled(u: Tensor, nodes: Tensor, image: Tensor, deviation: float) -> Tensor:
    """``[K, h, w]`` to the pixels: bilinear, and where the nodes about a pixel are of different
    segments, each counts as it looks like the pixel, too."""
    height, width = image.shape[1:]
    found = F.interpolate(u[None], (height, width), mode="bilinear")[0]
    best = u.detach().argmax(0)
    corners = [*_corners(height, u.shape[1], u.device), *_corners(width, u.shape[2], u.device)]
    top, bottom, down, left, right, across = corners
    places = [(r, c) for r in (top, bottom) for c in (left, right)]
    labels = [best[r[:, None], c] for r, c in places]
    rows, cols = torch.stack([label != labels[0] for label in labels]).any(0).nonzero().unbind(1)
    shares = [a * b for a in (1 - down[rows], down[rows]) for b in (1 - across[cols], across[cols])]
    pixels, total, weights = image[:, rows, cols], 0, 0
    for (r, c), share in zip(places, shares, strict=True):
        at = r[rows], c[cols]
        weight = (share + _LEAST) * _alike(pixels, nodes[:, at[0], at[1]], deviation)
        total, weights = total + weight * u[:, at[0], at[1]], weights + weight
    found = found.clone() if found.requires_grad else found
    found[:, rows, cols] = total / weights
    return found


def _corners(length: int, count: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of every pixel of an axis, the nodes before and after it, and how far it is between them."""
    position = (torch.arange(length, device=device) + 0.5) * (count / length) - 0.5
    position = position.clamp(0, count - 1)
    before = position.long()
    return before, (before + 1).clamp(max=count - 1), position - before
