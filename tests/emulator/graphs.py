"""Neighbour lists to count costs on: like those of photographs, of scattered clusters, with a hub.

What a kernel of κ can share depends on how many neighbours the rows beside each other have in
common, so that lists drawn at random would tell nothing. Real photographs are not part of the
repository; ``python -m bench.graph_inputs`` says how these compare with some.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Lists:
    """Neighbour lists of N nodes.

    Attributes:
        indices: int32 [N, k], feature neighbours.
        weights: float32 [N, k], their similarities.
        pixels: int32 [N, near], pixel neighbours.
    """

    indices: np.ndarray
    weights: np.ndarray
    pixels: np.ndarray


def photographs(images: int, side: int, k: int, near: int = 15, seed: int = 0) -> Lists:
    """Of ``images`` made-up photographs of side x side patches.

    A patch has the prototype of its region's class, which other images have too, and what varies
    smoothly over the image.
    """
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    prototypes = random.standard_normal((12, 24))
    rows, points = [], []
    for _ in range(images):
        centres = random.random((9, 2))
        distance = (x[..., None] - centres[:, 0]) ** 2 + (y[..., None] - centres[:, 1]) ** 2
        region = random.integers(len(prototypes), size=9)[distance.argmin(-1)]
        waves = random.standard_normal((24, 4))
        smooth = np.stack([np.sin(3 * (a * x + b * y + c)) * d for a, b, c, d in waves], -1)
        rows.append((prototypes[region] + 0.7 * smooth).reshape(-1, 24))
        colour = prototypes[region][..., :3] + 0.3 * smooth[..., :3]
        points.append(np.concatenate([colour, 8 * np.stack([x, y], -1)], -1).reshape(-1, 5))
    features = np.concatenate(rows) + 0.3 * random.standard_normal((images * side**2, 24))
    return Lists(*_cosine(features, k), _within(points, near))


def scattered(nodes: int, k: int, near: int = 15, seed: int = 0) -> Lists:
    """Of clusters whose nodes stand in no order: rows beside each other have little in common."""
    ordered = photographs(1, int(np.ceil(nodes**0.5)), k, near, seed)
    random = np.random.default_rng(seed)
    place = random.permutation(len(ordered.indices)).astype(np.int32)
    back = np.argsort(place)
    return Lists(place[ordered.indices[back]], ordered.weights[back], place[ordered.pixels[back]])


def with_hub(lists: Lists, hub: int = 0) -> Lists:
    """The same with one node that every other one lists, in place of its last neighbour."""
    indices = lists.indices.copy()
    others = np.arange(len(indices)) != hub
    unlisted = others & ~(indices == hub).any(1)
    indices[unlisted, -1] = hub
    return Lists(indices, lists.weights, lists.pixels)


def half_a_hub(nodes: int, seed: int = 0) -> Lists:
    """Every node lists one other, and every second one node 0 besides; short lists, so that there
    can be many."""
    random = np.random.default_rng(seed)
    own = np.arange(nodes)
    indices = (own[:, None] + random.integers(1, nodes, (nodes, 2))) % nodes
    indices[1::2, 1] = 0
    weights = random.random((nodes, 2), dtype=np.float32)
    return Lists(indices.astype(np.int32), weights, ((own[:, None] + 1) % nodes).astype(np.int32))


def _cosine(features: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    scores = unit @ unit.T
    np.fill_diagonal(scores, -np.inf)
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return best.astype(np.int32), np.take_along_axis(scores, best, 1).astype(np.float32)


def _within(points: list[np.ndarray], near: int) -> np.ndarray:
    """Nearest neighbours of each image's points among themselves."""
    found, first = [], 0
    for own in points:
        distance = ((own[:, None] - own) ** 2).sum(-1)
        np.fill_diagonal(distance, np.inf)
        found.append(first + np.argsort(distance, axis=1, kind="stable")[:, :near])
        first += len(own)
    return np.concatenate(found).astype(np.int32)


def adjacency(lists: Lists) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row offsets, columns, values) of a matrix with κ's entries; the values are made up."""
    nodes = len(lists.indices)
    both = np.concatenate([lists.indices, lists.pixels], 1)
    rows = np.repeat(np.arange(nodes), both.shape[1])
    keys = np.unique(
        np.concatenate([rows * nodes + both.ravel(), both.ravel().astype(np.int64) * nodes + rows])
    )
    offsets = np.searchsorted(keys, np.arange(nodes + 1) * nodes)
    columns = (keys % nodes).astype(np.int32)
    values = np.random.default_rng(1).random(len(keys), dtype=np.float32)
    return offsets.astype(np.int64), columns, values


def some_rows(
    graph: tuple[np.ndarray, np.ndarray, np.ndarray], count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``count`` rows from the middle of a graph, in the order of a graph's first rows.

    The columns are numbered anew, those that occur by their order: what rows share stays, and other
    rows are empty. A block of 64 stays a block.
    """
    offsets, columns, values = graph
    first = (len(offsets) - 1 - count) // 128 * 64
    begin, end = offsets[first], offsets[first + count]
    names, columns = np.unique(columns[begin:end], return_inverse=True)
    rows = np.full(max(count, len(names)) + 1, end - begin)
    rows[: count + 1] = offsets[first : first + count + 1] - begin
    return rows, columns.astype(np.int32), values[begin:end]


def sharing(offsets: np.ndarray, columns: np.ndarray, rows: int) -> float:
    """Different columns in ``rows`` rows beside each other, as a share of their entries."""
    nodes = len(offsets) - 1
    different = sum(
        len(np.unique(columns[offsets[first] : offsets[min(nodes, first + rows)]]))
        for first in range(0, nodes, rows)
    )
    return different / max(1, len(columns))
