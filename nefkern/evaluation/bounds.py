"""Between what a score can lie: a floor of random clusters and segments, a ceiling of the grid.

Matching alone makes a score out of any clusters: the floor is what it makes of random ones, as many
as the method has. And no patch can be right on both sides of an edge: the ceiling gives each patch,
or each superpixel, the class that most of its pixels have.
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

from nefkern.data import Sample
from nefkern.segmentation.image_counts import ImageCounts
from nefkern.segmentation.metrics import count_matrix

FLOORS = {
    "random-clusters": "floor: a random cluster for every patch",
    "random-segments": "floor: as many random segments as the first method has, random clusters",
}
CEILINGS = {
    "patches": "ceiling: the most frequent class of each patch",
    "superpixels": "ceiling: the most frequent class of each superpixel, as many as patches",
}
BOUNDS = FLOORS | CEILINGS

_ROUNDS = 5  # of SLIC; its authors use 10, and the centres hardly move after 5
#: What a difference in colour (channels in [0, 1]) weighs against one in place, of a superpixel's
#: side: SLIC's compactness of 10 in CIELAB, whose L goes to 100.
_COLOUR = 10.0


class Bounds:
    """Floors and ceilings, counted while the images pass by.

    Args:
        num_clusters, num_classes: K and C.
        seed: of the random clusters and segments; an image's are the same in any order of images.

    Attributes:
        counts: by name, of the images so far: clusters of the floors, classes of the ceilings.
    """

    def __init__(self, num_clusters: int, num_classes: int, seed: int = 0) -> None:
        self.num_clusters, self.num_classes, self.seed = num_clusters, num_classes, seed
        self.counts = {
            name: ImageCounts(num_clusters if name in FLOORS else num_classes, num_classes)
            for name in BOUNDS
        }

    def observe(self, sample: Sample, segments: int, patch: tuple[float, float]) -> None:
        """Take an image into account.

        Args:
            sample: with its annotation.
            segments: how many random segments.
            patch: height and width of a patch in pixels.
        """
        annotation = sample.annotation
        rows, cols = (
            _cells(length, side) for length, side in zip(annotation.shape, patch, strict=True)
        )
        grid = (int(rows[-1]) + 1, int(cols[-1]) + 1)
        patches = rows[:, None] * grid[1] + cols
        # PyTorch's generator on the CPU heeds only 32 bits of a seed.
        own = zlib.crc32(f"{self.seed} {sample.name}".encode(errors="surrogateescape"))
        noise = torch.Generator().manual_seed(own)
        cells = math.prod(grid)
        clusters = torch.randint(self.num_clusters, (cells,), generator=noise)
        self._add("random-clusters", clusters[patches], annotation)
        clusters = random_segments(grid, segments, self.num_clusters, noise)
        self._add("random-segments", clusters[patches], annotation)
        self._add("patches", self._best(patches, annotation), annotation)
        found = superpixels(sample.image, patches, grid)
        self._add("superpixels", self._best(found, annotation), annotation)

    def _best(self, regions: Tensor, annotation: Tensor) -> Tensor:
        """Every pixel with the most frequent class of its region; ties to the lower class."""
        counts = count_matrix(regions, annotation, int(regions.max()) + 1, self.num_classes)
        return counts.argmax(1)[regions]

    def _add(self, name: str, found: Tensor, annotation: Tensor) -> None:
        counts = self.counts[name]
        counts.add(count_matrix(found, annotation, counts.num_clusters, counts.num_classes))


def _cells(length: int, side: float) -> Tensor:
    """The cell that the middle of each pixel lies in, for cells ``side`` long: int64."""
    return ((torch.arange(length, dtype=torch.float64) + 0.5) / side).long()


def random_segments(
    grid: tuple[int, int], segments: int, num_clusters: int, noise: torch.Generator
) -> Tensor:
    """Voronoi cells of random points, each of a random cluster, on a grid: int64 ``[h·w]``.

    Args:
        grid: ``(h, w)``.
        segments: points; one that is no patch's nearest leaves none.
        num_clusters: K.
        noise: what is random.
    """
    size = torch.tensor(grid, dtype=torch.float64)
    points = torch.rand(segments, 2, dtype=torch.float64, generator=noise) * size
    clusters = torch.randint(num_clusters, (segments,), generator=noise)
    middles = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) + 0.5 for n in grid))
    return clusters[torch.cdist(middles, points).argmin(1)]


def superpixels(image: Tensor, patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """SLIC superpixels (Achanta et al. 2012), on RGB and without its last step that joins crumbs.

    Args:
        image: ``[3, H, W]`` RGB, uint8 or float in [0, 1].
        patches: int64 ``[H, W]``: the patch of each pixel, ``i·w + j``; they are where K-means in
            colour and place begins. A pixel goes to one of the nine about its patch.
        grid: ``(h, w)``.

    Returns:
        int64 ``[H, W]``, 0 to h·w − 1.
    """
    height, width = patches.shape
    colour = image.float() / 255 if image.dtype == torch.uint8 else image.float()
    place = torch.meshgrid(
        torch.arange(height) * (grid[0] / height),
        torch.arange(width) * (grid[1] / width),
        indexing="ij",
    )
    pixels = torch.cat([colour.cpu() * _COLOUR, torch.stack(place)]).flatten(1).T.contiguous()
    start, found = patches.flatten(), patches.flatten()
    row, col = start // grid[1], start % grid[1]
    for _ in range(_ROUNDS):
        centres = _means(pixels, found, math.prod(grid))
        least = pixels.new_full((len(pixels),), torch.inf)
        for down in (-1, 0, 1):
            for across in (-1, 0, 1):
                near = (row + down).clamp(0, grid[0] - 1) * grid[1]
                near += (col + across).clamp(0, grid[1] - 1)
                distance = (pixels - centres[near]).square_().sum(1)
                closer = distance < least
                found = torch.where(closer, near, found)
                least = torch.where(closer, distance, least)
    return found.view(height, width)


def _means(pixels: Tensor, groups: Tensor, count: int) -> Tensor:
    """Mean of each group ``[count, D]``; inf, near to nothing, of an empty one."""
    total = torch.zeros(count, pixels.shape[1]).index_add_(0, groups, pixels)
    sizes = groups.bincount(minlength=count)[:, None]
    return torch.where(sizes > 0, total / sizes, torch.inf)
