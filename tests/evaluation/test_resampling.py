"""Scores on other images and intervals, against figures worked by hand."""

import math

import pytest
import torch

from nefkern.evaluation.resampling import (
    cross_matched,
    differs,
    figures,
    halves,
    interval,
    part,
    resamples,
)
from nefkern.segmentation.evaluation import match, matchings
from nefkern.segmentation.image_counts import ImageCounts
from nefkern.segmentation.metrics import scores


def counted(*tables: list[list[int]]) -> ImageCounts:
    counts = ImageCounts(len(tables[0]), len(tables[0][0]))
    for table in tables:
        counts.add(torch.tensor(table))
    return counts


def mask(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.bool)


def once(images: int) -> torch.Tensor:
    return torch.ones(1, images, dtype=torch.float64)


# Cluster 0 is class 0 in the first image and class 1 in the second.
TURNED = counted([[8, 0], [0, 2]], [[0, 6], [4, 0]])


def test_scores_of_all_images_once_are_the_plain_ones():
    generator = torch.Generator().manual_seed(0)
    tables = torch.randint(0, 50, (7, 5, 3), generator=generator)
    counts = counted(*tables.tolist())
    for name, assignment in match(counts.total()).assignments.items():
        plain = scores(match(counts.total()).confusions[name])
        found = figures([part(counts, assignment)], once(7))
        assert found[:, 0].tolist() == pytest.approx([plain.accuracy, plain.mean_iou], abs=1e-12)


def test_an_image_drawn_twice_counts_twice():
    """Cluster k is class k: the first image is all right, the second all wrong."""
    found = figures([part(TURNED, torch.tensor([0, 1]))], torch.tensor([[2, 1], [2, 0]]).double())
    assert found[0].tolist() == pytest.approx([20 / 30, 1.0])
    # Class 0: hit 16, predicted 16 + 6, annotated 16 + 4; class 1: hit 4, 4 + 4, 4 + 6.
    assert found[1].tolist() == pytest.approx([(16 / 26 + 4 / 14) / 2, 1.0])


def test_matching_on_one_half_scored_on_the_other():
    """Where clusters turn round between the halves nothing is right, and both halves count."""

    def find(counts):
        return matchings(counts)[0]

    cross = cross_matched(TURNED, find, [mask(1, 0), mask(0, 1)])
    assert figures(cross["count"], once(2))[:, 0].tolist() == [0, 0]
    # Three images: the first two agree, the third has cluster 0 half and half.
    counts = counted([[4, 0], [0, 4]], [[4, 0], [0, 4]], [[3, 1], [0, 4]])
    cross = cross_matched(counts, find, [mask(1, 1, 0), mask(0, 0, 1)])
    accuracy, mean_iou = figures(cross["count"], once(3))[:, 0].tolist()
    assert accuracy == pytest.approx((7 / 8 + 1) / 2)
    assert mean_iou == pytest.approx(((3 / 4 + 4 / 5) / 2 + 1) / 2)


def test_pixels_of_a_cluster_that_the_matching_has_not_met_are_wrong():
    counts = counted([[5, 0], [0, 0]], [[5, 0], [0, 5]])
    cross = cross_matched(counts, lambda t: matchings(t)[0], [mask(1, 0), mask(0, 1)])
    learnt_on_first = figures(cross["count"][:1], once(2))[:, 0].tolist()
    assert learnt_on_first == pytest.approx([0.5, (1 + 0) / 2])


def test_halves_share_the_annotated_images_evenly():
    masks = halves(torch.tensor([5, 0, 7, 1, 9, 2]), 3)
    assert len(masks) == 6
    for first, second in zip(masks[::2], masks[1::2], strict=True):
        assert (int(first.sum()), int(second.sum())) == (2, 3)
        assert torch.equal(first ^ second, mask(1, 0, 1, 1, 1, 1))
    assert not torch.equal(masks[0], masks[2]) or not torch.equal(masks[0], masks[4])
    assert all(map(torch.equal, masks, halves(torch.tensor([1, 0, 1, 1, 1, 1]), 3)))
    assert halves(torch.tensor([3, 0]), 3) == []


def test_resamples_draw_as_many_images_and_are_the_same_again():
    weights = resamples(40, 500)
    assert torch.equal(weights.sum(1), torch.full((500,), 40.0, dtype=torch.float64))
    assert weights.mean(0).sub(1).abs().max() < 0.2
    # Of 40 images a resample misses (1 - 1/40)^40 = 36%.
    assert (weights == 0).double().mean().item() == pytest.approx(0.363, abs=0.01)
    assert torch.equal(weights, resamples(40, 500))
    assert not torch.equal(weights, resamples(40, 500, seed=1))


def test_the_interval_of_a_mean_is_the_one_known():
    """Accuracies 0 and 1 of equal images: their mean's standard error is sqrt(p(1-p)/n)."""
    n, right = 400, 100
    tables = [[[10, 0], [0, 0]]] * right + [[[0, 10], [0, 0]]] * (n - right)
    weights = resamples(n, 2000)
    low, high = interval(figures([part(counted(*tables), torch.tensor([0, 1]))], weights)[0])
    error = 1.96 * math.sqrt(0.25 * 0.75 / n)
    assert low == pytest.approx(0.25 - error, abs=0.006)
    assert high == pytest.approx(0.25 + error, abs=0.006)


def test_an_interval_covers_the_truth_as_often_as_it_says():
    """200 data sets of 60 images, of which each is right with probability 0.7."""
    generator = torch.Generator().manual_seed(0)
    weights, covered = resamples(60, 400), 0
    for _ in range(200):
        right = (torch.rand(60, generator=generator) < 0.7).double()
        low, high = interval(weights @ right / 60)
        covered += low <= 0.7 <= high
    assert 0.9 <= covered / 200 <= 0.98


def test_quantiles_and_what_is_left_out():
    low, high = interval(torch.arange(101.0))
    assert (low, high) == (pytest.approx(2.5), pytest.approx(97.5))
    assert interval(torch.tensor([math.nan, 0.5])) == (0.5, 0.5)
    assert interval(torch.tensor([math.nan])) is None
    assert interval(torch.zeros(0)) is None


@pytest.mark.parametrize(
    ("between", "called"),
    [((0.1, 0.2), True), ((-0.2, -0.1), True), ((-0.1, 0.1), False), ((0.0, 0.1), False),
     (None, False)],
)  # fmt: skip
def test_a_difference_is_one_if_its_interval_excludes_zero(between, called):
    assert differs(between) is called


def test_no_annotated_image_drawn_is_no_figure():
    counts = counted([[0, 0], [0, 0]], [[5, 0], [0, 5]])
    found = figures([part(counts, torch.tensor([0, 1]))], torch.tensor([[2, 0], [0, 2]]).double())
    assert found[:, 0].isnan().all()
    assert found[:, 1].tolist() == [1, 1]
