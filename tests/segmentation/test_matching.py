from itertools import permutations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nefkern.segmentation.matching import (
    UNMATCHED,
    class_logits,
    cluster_iou,
    hungarian,
    majority_vote,
    matched_confusion,
)
from nefkern.segmentation.metrics import count_matrix, scores

# A small cluster (row 1) inside the dominant class 0, with all of the rare class 1.
DOMINANT = torch.tensor([[900, 0], [60, 40]])


def random_counts(k, c, seed, high=50):
    return torch.randint(high, (k, c), generator=torch.Generator().manual_seed(seed))


def test_iou_and_count_can_disagree():
    """By count row 1 is class 0 (60 > 40); by IoU class 1: 40/100 against 60/1000."""
    assert majority_vote(DOMINANT, "iou").tolist() == [0, 1]
    assert majority_vote(DOMINANT, "count").tolist() == [0, 0]


def test_iou_equals_boolean_masks():
    generator = torch.Generator().manual_seed(3)
    clusters = torch.randint(6, (40, 40), generator=generator)
    labels = torch.randint(4, (40, 40), generator=generator)
    labels[:5] = 255
    clusters = torch.where(labels == 255, 5, clusters)  # void pixels don't enlarge a union
    iou = cluster_iou(count_matrix(clusters, labels, 6, 4))
    for k, c in product(range(6), range(4)):
        a, b = (clusters == k) & (labels != 255), labels == c
        assert iou[k, c] == pytest.approx(((a & b).sum() / (a | b).sum()).item())


@pytest.mark.parametrize("by", ["iou", "count"])
def test_ties_go_to_the_lower_class(by):
    counts = torch.tensor([[0, 5, 5], [7, 7, 7]])
    assert majority_vote(counts, by).tolist() == [1, 0]


@pytest.mark.parametrize("by", ["iou", "count"])
def test_empty_clusters_are_unmatched_and_harmless(by):
    counts = torch.tensor([[0, 0], [3, 1], [0, 0]])
    assignment = majority_vote(counts, by)
    assert assignment.tolist() == [UNMATCHED, 0, UNMATCHED]
    assert matched_confusion(counts, assignment).tolist() == [[3, 1], [0, 0]]


def test_unmatched_clusters_cannot_hide_pixels():
    with pytest.raises(ValueError, match="1 unmatched clusters hold annotated pixels"):
        matched_confusion(torch.tensor([[1, 0], [0, 2]]), torch.tensor([0, UNMATCHED]))


def test_another_vote_is_named():
    with pytest.raises(ValueError, match="'iou' or 'count', got 'dice'"):
        majority_vote(DOMINANT, "dice")


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 10**6))
def test_count_vote_has_the_best_accuracy_there_is(k, c, seed):
    counts = random_counts(k, c, seed) + 1
    voted = scores(matched_confusion(counts, majority_vote(counts, "count"))).accuracy
    best = max(
        scores(matched_confusion(counts, torch.tensor(assignment))).accuracy
        for assignment in product(range(c), repeat=k)
    )
    assert voted == pytest.approx(best)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 6), st.integers(0, 10**6))
def test_hungarian_is_the_best_permutation(n, seed):
    counts = random_counts(n, n, seed)
    assignment = hungarian(counts)
    assert sorted(assignment.tolist()) == list(range(n))
    best = max(
        sum(counts[k, c].item() for k, c in enumerate(order)) for order in permutations(range(n))
    )
    assert counts[torch.arange(n), assignment].sum().item() == best


def test_hungarian_by_iou_gives_a_small_class_its_small_cluster():
    counts = torch.tensor([[100, 1], [90, 9]])
    assert hungarian(counts).tolist() == [0, 1]  # 109 pixels agree, otherwise 91
    counts = torch.tensor([[100, 9], [6, 0]])
    assert hungarian(counts).tolist() == [0, 1]  # 100 agree, otherwise 15
    counts = torch.tensor([[50, 20], [40, 1]])
    assert hungarian(counts).tolist() == [1, 0]  # 60 agree, otherwise 51
    counts = torch.tensor([[60, 20], [39, 0]])
    assert hungarian(counts).tolist() == [0, 1]  # 60 agree, otherwise 59
    assert hungarian(counts, "iou").tolist() == [1, 0]  # 20/80 + 39/99, otherwise 60/119
    with pytest.raises(ValueError, match="by must be"):
        hungarian(counts, "pixels")


@pytest.mark.parametrize("shape", [(3, 2), (2, 3)])
def test_hungarian_says_why_not(shape):
    with pytest.raises(ValueError, match=f"got {shape[0]} clusters, {shape[1]} classes"):
        hungarian(torch.ones(shape, dtype=torch.int64))


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 10**6))
def test_matched_confusion_equals_relabelled_pixels(k, c, seed):
    generator = torch.Generator().manual_seed(seed)
    clusters = torch.randint(k, (500,), generator=generator)
    labels = torch.randint(c, (500,), generator=generator)
    counts = count_matrix(clusters, labels, k, c)
    assignment = majority_vote(counts)
    expected = count_matrix(assignment[clusters], labels, c, c)
    assert torch.equal(matched_confusion(counts, assignment), expected)


def test_class_logits_by_hand():
    logits = torch.tensor([5.0, 2.0, 7.0, 9.0])[:, None, None].expand(4, 2, 3)
    merged = class_logits(logits, torch.tensor([1, 0, 1, UNMATCHED]), 3)
    assert merged[:, 0, 0].tolist() == [2.0, 7.0, -torch.inf]
    assert merged.shape == (3, 2, 3)


def test_class_logits_keep_the_winner():
    logits = torch.randn(9, 50, generator=torch.Generator().manual_seed(0))
    assignment = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 0])
    assert torch.equal(class_logits(logits, assignment, 3).argmax(0), assignment[logits.argmax(0)])
