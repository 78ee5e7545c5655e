"""The figures of bench.label_free, on cases with a known answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench.label_free import CRITERIA, agreement, altered, explained, interval, of_clusters, table
from bench.label_free import spearman as rank_correlation


def records(values: dict[str, list[float]], target: list[float]) -> list[dict]:
    """Settings of K = 4 with these criteria; the others say nothing."""
    return [
        {"block": 9, "alpha": 0.5, "k": 64 + at, "K": 4, "mIoU": mean_iou}
        | {name: values.get(name, [0.0] * len(target))[at] for name in CRITERIA}
        for at, mean_iou in enumerate(target)
    ]


def test_rank_correlation_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    a, b = np.random.default_rng(0).integers(0, 6, (2, 30)).astype(float)  # with ties
    assert rank_correlation(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert np.isnan(rank_correlation(a, np.zeros(30)))


def test_the_interval_holds_the_correlation():
    a = np.arange(20.0)
    b = a + np.random.default_rng(1).normal(0, 4, 20)
    low, high = interval(a, b)
    assert -1 <= low < rank_correlation(a, b) < high <= 1


def test_the_table_says_what_each_criterion_picks():
    told = table(records({"zoom": [0.1, 0.3, 0.2], "flip": [3, 2, 1]}, [10, 30, 20]), 4)
    rows = {line.split("|")[1].strip(): line for line in told.splitlines() if line.startswith("| ")}
    assert rows["zoom"].startswith("| zoom | +1.00 [")
    assert rows["zoom"].endswith("k 65 | 30.0 |")
    assert rows["flip"].startswith("| flip | -0.50 [")
    assert rows["flip"].endswith("k 64 | 10.0 |")
    assert "the default's 10.0" in told


def test_criteria_of_known_clusters():
    halves = torch.tensor([[0, 1], [0, 1]]).repeat(3, 1, 1).flatten()
    rows = torch.eye(2)[halves]
    told = of_clusters(halves, (2, 2), rows, rows.view(3, 4, 2))
    assert told["smooth"] == 0.5  # equal downwards, never to the right
    assert told["segments"] == -2
    assert told["spread"] == 3
    assert told["colour"] == told["features"] == 1
    assert explained(halves, torch.arange(12.0)[:, None] // 2 % 2, 2) == pytest.approx(0)
    assert agreement(halves, 1 - halves) == pytest.approx(1)


def test_altered_views_are_of_the_same_size():
    images = torch.randint(0, 256, (2, 3, 84, 84), dtype=torch.uint8)
    found = altered(images)
    assert all(v.shape == images.shape and v.dtype == torch.uint8 for v in found.values())
    assert found["flip"][..., 0].equal(images[..., -1])
