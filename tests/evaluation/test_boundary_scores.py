"""Boundary F-scores of an evaluation: what is kept, and what is told."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nefkern.evaluation.boundary_scores import BoundaryScores, mean
from nefkern.evaluation.resampling import resamples
from nefkern.segmentation.boundaries import boundary_f


def labels(seed: int) -> torch.Tensor:
    """Blocks of 300 clusters, more than 8 bits hold."""
    blocks = torch.randint(300, (6, 8), generator=torch.Generator().manual_seed(seed))
    return blocks.repeat_interleave(9, 0).repeat_interleave(11, 1)


def annotation(seed: int) -> torch.Tensor:
    found = (labels(seed) % 3).to(torch.uint8)
    found[:2] = 255
    return found


@pytest.fixture
def scored():
    """Four images; clusters of one more map, and classes refined after a matching."""
    scores = BoundaryScores()
    for image in range(4):
        scores.annotate(annotation(image))
        scores.keep(("ours", "none"), labels(image + 1))
        scores.keep(("ours", "classes", "iou"), annotation(image).clamp(max=2).long())
    table = torch.arange(300) % 3
    table[5] = -1
    scores.score("ours", "none", {"iou": table, "count": (table + 1).clamp(max=2)})
    scores.score("ours", "classes", {"iou": table})
    return scores, table


def test_the_mean_over_images_of_the_matched_classes(scored):
    scores, table = scored
    expected = [
        boundary_f(table[labels(image + 1)].numpy(), annotation(image).numpy())
        for image in range(4)
    ]
    told = scores.told("ours", "none", resamples(4, 50))
    assert list(told) == ["iou", "count"]
    assert told["iou"]["f"] == pytest.approx(np.mean(expected))
    low, high = told["iou"]["interval"]["f"]
    assert min(expected) <= low < told["iou"]["f"] < high <= max(expected)


def test_classes_are_taken_as_they_are(scored):
    scores, _ = scored
    told = scores.told("ours", "classes", resamples(4, 50))
    assert told["iou"]["f"] > 0.9


def test_differences_are_paired(scored):
    scores, _ = scored
    (found,) = scores.differences(resamples(4, 50))
    assert (found["first"], found["second"]) == (["ours", "none"], ["ours", "classes"])
    assert found["differs"]
    assert found["interval"][0] > 0


def test_without_resamples_there_are_no_intervals(scored):
    scores, _ = scored
    none = torch.zeros(0, 4, dtype=torch.float64)
    assert scores.told("ours", "none", none)["iou"]["interval"] == {"f": None}
    assert not scores.differences(none)[0]["differs"]


def test_images_without_a_score_do_not_count():
    scores = torch.tensor([0.5, float("nan"), 1.0], dtype=torch.float64)
    weights = torch.tensor([[1.0, 5.0, 1.0], [2.0, 0.0, 0.0]], dtype=torch.float64)
    assert mean(scores).item() == 0.75
    assert mean(scores, weights).tolist() == [0.75, 0.5]
