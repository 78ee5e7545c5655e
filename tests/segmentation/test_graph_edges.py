"""The solve on the pixel graph: against a dense one, where edges go, and what it promises."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from nefkern.segmentation import graph_edges as module
from nefkern.segmentation.graph_edges import (
    GraphEdges,
    GraphRefiner,
    graph_edges,
    random_walk,
    solved,
)
from nefkern.segmentation.refinement import Job

SMALL = GraphEdges(distances=(1, 2), steps=8)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def dense_walk(image: torch.Tensor, p: GraphEdges) -> torch.Tensor:
    """P = D⁻¹ W of the pixels, pair by pair."""
    _, height, width = image.shape
    weights = torch.zeros(height * width, height * width, dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            for d in p.distances:
                for dy in (-d, 0, d):
                    for dx in (-d, 0, d):
                        other = y + dy, x + dx
                        inside = 0 <= other[0] < height and 0 <= other[1] < width
                        if (dy, dx) == (0, 0) or not inside:
                            continue
                        apart = (image[:, y, x] - image[:, other[0], other[1]]).double()
                        alike = math.exp(-0.5 * float(apart.square().sum()) / p.colour**2) + 1e-4
                        weights[y * width + x, other[0] * width + other[1]] = alike
    return weights / weights.sum(1, keepdim=True)


def inside(height: int, width: int, frame: int) -> torch.Tensor:
    index = torch.arange((height + 2 * frame) * (width + 2 * frame))
    grid = index.view(height + 2 * frame, width + 2 * frame)
    return grid[frame:-frame, frame:-frame].flatten()


@pytest.mark.parametrize("size", [(6, 7), (1, 9), (5, 2), (3, 3), (2, 1)])
def test_the_walk_is_that_of_all_pairs(size):
    """Images narrower than the graph reaches too: no two neighbours fall on one node."""
    image = drawn(3, *size) * 0.2
    walk = random_walk(image, SMALL)
    walk.validate()
    pixels = inside(*size, SMALL.reach)
    dense = walk.to_dense().double()
    assert_close(dense[pixels][:, pixels], dense_walk(image, SMALL), atol=1e-6, rtol=1e-5)
    frame = torch.ones(len(dense), dtype=torch.bool)
    frame[pixels] = False
    assert not dense[frame].any()
    assert not dense[:, frame].any()


@pytest.mark.parametrize(("steps", "error"), [(20, 0.1), (40, 0.01), (90, 1e-5)])
def test_the_iteration_tends_to_the_solution(steps, error):
    p = GraphEdges(distances=(1, 2), steps=steps)
    image, given = drawn(3, 9, 8) * 0.1, drawn(4, 9, 8, seed=1).mul(4).softmax(0)
    first, second = given.double().topk(2, 0).values.flatten(1)
    trust = torch.diag(p.least + (1 - p.least) * (first - second))
    matrix = trust + p.smoothness * (torch.eye(72).double() - dense_walk(image, p))
    start = given.flatten(1).T.double()
    exact = torch.linalg.solve(matrix, trust @ start)
    found = graph_edges(image, given, parameters=p).flatten(1).T.double()
    assert (found - exact).abs().max() < error * (start - exact).abs().max()


def halves(edge: int, size: int = 64) -> torch.Tensor:
    """Red before a column, blue from it on."""
    image = torch.zeros(3, size, size, dtype=torch.uint8)
    image[0, :, :edge], image[2, :, edge:] = 255, 255
    return image


def ramp(size: int = 64) -> torch.Tensor:
    """Two labels that are level in the middle, as between patches of 16 pixels."""
    first = ((size / 2 - torch.arange(size) - 0.5) / 16 + 0.5).clamp(0.05, 0.95)
    return torch.stack([first, 1 - first])[:, None].repeat(1, size, 1)


@pytest.mark.parametrize(
    ("edge", "patch"), [(26, 1.0), (37, 1.0), (26, 16.0), (37, 16.0), (26, 23.0), (32, 23.0)]
)
def test_segments_snap_to_an_edge(edge, patch):
    """To the pixel, where nodes are of two or three pixels too."""
    after = graph_edges(halves(edge), ramp(), patch).argmax(0)
    assert (after[:, :edge] == 0).all()
    assert (after[:, edge:] == 1).all()


def test_without_an_edge_nothing_moves():
    grey = torch.full((3, 64, 64), 128, dtype=torch.uint8)
    assert torch.equal(graph_edges(grey, ramp()).argmax(0), ramp().argmax(0))


def test_still_a_distribution():
    given = drawn(5, 40, 30).mul(6).softmax(0)
    for patch in (1.0, 14.0):
        found = graph_edges(drawn(3, 40, 30, seed=1), given, patch)
        assert_close(found.sum(0), torch.ones(40, 30), atol=1e-4, rtol=0)
        assert found.min() > -0.02


def test_bands_give_the_very_same_result(monkeypatch):
    image, given = drawn(3, 150, 20), drawn(3, 150, 20, seed=1).softmax(0)
    whole = graph_edges(image, given, parameters=SMALL)
    monkeypatch.setattr(module, "_MOST_NODES", 40 * 20)
    assert len(list(module._bands(150, 20, SMALL))) == 4
    assert torch.equal(graph_edges(image, given, parameters=SMALL), whole)


def test_the_same_with_any_number_of_threads():
    image, given = drawn(3, 64, 64), drawn(7, 64, 64, seed=1).softmax(0)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(graph_edges(image, given))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize("patch", [1.0, 14.0])
def test_differentiable_in_probabilities_and_image(patch):
    p = GraphEdges(distances=(1, 2), steps=3, colour=0.5)
    image = (drawn(3, 5, 4).double() * 0.5).requires_grad_()
    given = drawn(2, 5, 4, seed=1).double().softmax(0).requires_grad_()
    assert torch.autograd.gradcheck(lambda image, given: solved(image, given, p), (image, given))
    image, given = drawn(3, 15, 14).requires_grad_(), drawn(3, 15, 14).softmax(0).requires_grad_()
    graph_edges(image, given, patch, p)[0].square().sum().backward()
    assert (given.grad[0] != 0).all()
    assert (image.grad != 0).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (5, 3)])
def test_tiny_images(size):
    given = drawn(3, *size).softmax(0)
    found = graph_edges(torch.zeros(3, *size, dtype=torch.uint8), given)
    assert_close(found.sum(0), torch.ones(size) if size != (1, 1) else found.sum(0))
    assert found.isfinite().all()


def test_one_label_needs_no_solve():
    one = torch.ones(1, 4, 4)
    assert torch.equal(graph_edges(torch.zeros(3, 4, 4, dtype=torch.uint8), one), one)


def test_jobs_are_refined_in_their_order():
    labels = torch.tensor([4, 9])
    jobs = [Job(str(e), halves(e), ramp(), labels, e) for e in (26, 38)]
    refiner = GraphRefiner()
    with refiner(jobs) as results:
        for found, edge in results:
            assert torch.equal(found, labels[graph_edges(halves(edge), ramp()).argmax(0)])
    assert refiner.inferences == 2
    assert refiner.seconds > 0


@pytest.mark.parametrize(
    ("image", "probabilities", "message"),
    [
        (torch.zeros(3, 4, 4, dtype=torch.int64), torch.ones(2, 4, 4), "image must be uint8 or"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), torch.ones(2, 4, 4), r"image must be \[3, H, W"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), torch.ones(2, 4, 5), r"\[K, 4, 4\]"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), torch.ones(2, 4, 4).long(), "floating point"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), torch.full((2, 4, 4), torch.nan), "NaN"),
    ],
)
def test_wrong_input_is_named(image, probabilities, message):
    with pytest.raises(ValueError, match=message):
        graph_edges(image, probabilities)
