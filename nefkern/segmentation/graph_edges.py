"""Edges of segments by a sparse solve on the image's pixel graph: no CRF, and a tenth of its time.

Probabilities come from patches, a dozen pixels wide. On the graph W whose nodes are the pixels and
whose weights tell how alike two near ones look, the solution of

    (C + λ (I − P)) u = C p,        P = D⁻¹ W

is as smooth as W is and, where C is large, near to the patches' probabilities p: each pixel asks
those that a random walk over like pixels leads to (Zhou et al., *Learning with local and global
consistency*, NeurIPS 2003; Grady, *Random walks for image segmentation*, PAMI 2006, with the
patches as soft seeds). C is how decided a pixel is: between two patches nothing is known, and
there the edge moves to where colours change.

Solved by a few steps of Chebyshev's semi-iterative method (Golub and Varga, 1961), whose products
are :func:`nefkern.ops.spmm`: the steps and their coefficients are always the same, so that the
result is deterministic, differentiable in probabilities and image, and each pixel's depends only on
pixels within reach of the steps. Large images are therefore solved in bands, to the same result.
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
from nefkern.segmentation.refinement import Job, Refined

#: Pixels that are solved at once: their graph takes some 300 bytes each.
_MOST_PIXELS = 1 << 20


@dataclass(frozen=True)
class GraphEdges:
    """Parameters of the pixel graph and of the solve.

    Attributes:
        distances: neighbours lie in eight directions at these distances, in pixels.
        colour: standard deviation of the weight's Gaussian of two pixels' difference in colour,
            channels in [0, 1].
        smoothness: λ.
        least: C of a pixel whose first two clusters are equally probable; of a decided one it is 1.
        steps: of the iteration.
    """

    distances: tuple[int, ...] = (1, 2, 4, 8)
    colour: float = 0.05
    smoothness: float = 20.0
    least: float = 0.05
    steps: int = 10

    @property
    def reach(self) -> int:
        """Pixels, along an axis, that a step takes anything from."""
        return max(self.distances)


DEFAULT = GraphEdges()
"""Chosen on training images of the two small sets; docs/quality.md."""


def graph_edges(image: Tensor, probabilities: Tensor, parameters: GraphEdges = DEFAULT) -> Tensor:
    """Probabilities drawn to the edges of one image.

    Args:
        image: ``[3, H, W]`` RGB, uint8, or floating point in [0, 1].
        probabilities: floating point ``[K, H, W]``, K ≥ 1, sums to 1 over K. Time and memory grow
            with K: give the clusters that win a pixel.

    Returns:
        float32 ``[K, H, W]`` on the device of ``probabilities``; sums to 1 over K up to rounding.
        Between 0 and 1 but for what the iteration leaves, about a hundredth.

    Raises:
        ValueError: wrong dtype or shape, or a probability that is NaN.
    """
    image = _checked(image, probabilities).to(probabilities.device)
    p = probabilities.float()
    if len(p) == 1:
        return p
    bands = list(_bands(*image.shape[1:], parameters))
    parts = [
        _solved(image[:, low:high], p[:, low:high], parameters)[:, first - low : last - low]
        for first, last, low, high in bands
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


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
        best = graph_edges(job.image, job.probabilities, self.parameters).argmax(0)
        self.inferences += 1
        self.seconds += time.perf_counter() - started
        return job.labels[best.to(job.labels.device)]

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
    if probabilities.ndim != 3 or probabilities.shape[1:] != image.shape[1:]:
        raise ValueError(
            f"probabilities must be [K, {image.shape[1]}, {image.shape[2]}] like the image, "
            f"got {tuple(probabilities.shape)}"
        )
    if not probabilities.is_floating_point() or probabilities.isnan().any():
        raise ValueError("probabilities must be floating point without NaN")
    return image.float() / 255 if image.dtype == torch.uint8 else image.float()


def _bands(height: int, width: int, p: GraphEdges) -> Iterator[tuple[int, int, int, int]]:
    """Rows that are solved together: first and last of the result, low and high of what they look
    at, half-open."""
    halo = p.reach * (p.steps + 1)  # a step takes from neighbours, a weight from their degrees
    rows = height if height * width <= _MOST_PIXELS else max(halo, _MOST_PIXELS // width)
    for first in range(0, height, rows):
        last = min(first + rows, height)
        yield first, last, max(0, first - halo), min(height, last + halo)


def _solved(image: Tensor, p: Tensor, parameters: GraphEdges) -> Tensor:
    frame = [parameters.reach] * 4
    first, second = p.topk(2, dim=0).values
    weight = parameters.least + (1 - parameters.least) * (first - second)
    rows = F.pad(p, frame).flatten(1).T.contiguous()
    weight = F.pad(weight, frame, value=1.0).flatten()[:, None]
    found = chebyshev(random_walk(image, parameters), rows, weight, parameters)
    found = found.T.unflatten(1, (image.shape[1] + 2 * frame[0], -1))
    return found[:, frame[0] : -frame[0], frame[0] : -frame[0]]


def random_walk(image: Tensor, p: GraphEdges = DEFAULT) -> CSRGraph:
    """P = D⁻¹ W of an image, float ``[3, H, W]``.

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
    values = weights / weights.sum(-1, keepdim=True).clamp_min(_LEAST)
    return _framed(values, every, p.reach)


#: The least weight of an edge: in a grain of its own colour a pixel would be alone.
_LEAST = 1e-4


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


def chebyshev(walk: CSRGraph, given: Tensor, weight: Tensor, p: GraphEdges) -> Tensor:
    """About the solution u ``[N, K]`` of (C + λ (I − P)) u = C p.

    Args:
        walk: P, whose eigenvalues lie in [-1, 1].
        given: p ``[N, K]``, the first guess too.
        weight: the diagonal of C ``[N, 1]``, from ``p.least`` to 1.
    """
    low, high = p.least, 1 + 2 * p.smoothness
    middle, half = (high + low) / 2, (high - low) / 2
    diagonal = weight + p.smoothness
    found = given
    residual = p.smoothness * (spmm(walk, given) - given)  # C p − (C + λ − λP) p
    change, ratio = residual / middle, half / middle
    for _ in range(p.steps - 1):
        found = found + change
        residual = residual - diagonal * change + p.smoothness * spmm(walk, change)
        after = 1 / (2 * middle / half - ratio)
        change = after * ratio * change + (2 * after / half) * residual
        ratio = after
    return found + change
