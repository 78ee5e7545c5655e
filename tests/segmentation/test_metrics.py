import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, jaccard_score
from torch.testing import assert_close
from torchmetrics.functional.classification import multiclass_jaccard_index

from nefkern.segmentation.metrics import count_matrix, scores

VOID = 255


def random_maps(classes, seed, void=0.1, shape=(37, 53)):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, shape, generator=generator)
    wrong = torch.rand(shape, generator=generator) < 0.4
    predicted = torch.where(wrong, torch.randint(classes, shape, generator=generator), labels)
    labels[torch.rand(shape, generator=generator) < void] = VOID
    return predicted, labels


def test_counts_by_hand():
    clusters = torch.tensor([[0, 0, 1], [2, 2, 2]])
    labels = torch.tensor([[0, 1, 1], [1, VOID, 1]], dtype=torch.uint8)
    assert count_matrix(clusters, labels, 4, 2).tolist() == [[1, 1], [0, 1], [0, 2], [0, 0]]


def test_void_pixels_may_hold_any_cluster():
    counts = count_matrix(torch.tensor([999, -1, 0]), torch.tensor([VOID, VOID, 1]), 1, 2)
    assert counts.tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("clusters", "labels", "message"),
    [
        ([0, 3], [0, 1], r"clusters must lie in 0..2, got values from 0 to 3"),
        ([0, -1], [0, 1], r"clusters must lie in 0..2, got values from -1 to 0"),
        ([0, 1], [0, 2], r"labels must lie in 0..1, got values from 0 to 2"),
        ([0, 1], [0], r"one shape, got \(2,\) and \(1,\)"),
    ],
)
def test_wrong_input_is_named(clusters, labels, message):
    with pytest.raises(ValueError, match=message):
        count_matrix(torch.tensor(clusters), torch.tensor(labels), 3, 2)


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 60), st.integers(0, 10**6))
def test_counts_equal_scikit_learn(classes, seed):
    predicted, labels = random_maps(classes, seed)
    seen = labels != VOID
    expected = confusion_matrix(predicted[seen], labels[seen], labels=np.arange(classes))
    assert count_matrix(predicted, labels, classes, classes).tolist() == expected.tolist()


@pytest.mark.parametrize("classes", [2, 11, 21])
def test_scores_equal_torchmetrics_and_scikit_learn(classes):
    predicted, labels = random_maps(classes, seed=classes)
    seen = labels != VOID
    result = scores(count_matrix(predicted, labels, classes, classes))
    iou = multiclass_jaccard_index(
        predicted, labels, num_classes=classes, ignore_index=VOID, average="none"
    )
    assert_close(result.iou, iou.double(), rtol=1e-6, atol=0)
    mean = multiclass_jaccard_index(predicted, labels, num_classes=classes, ignore_index=VOID)
    assert result.mean_iou == pytest.approx(mean.item(), rel=1e-6)
    p, l = predicted[seen], labels[seen]
    assert result.mean_iou == pytest.approx(jaccard_score(l, p, average="macro"))
    assert result.accuracy == pytest.approx(accuracy_score(l, p))
    assert result.mean_class_accuracy == pytest.approx(balanced_accuracy_score(l, p))
    assert result.support.tolist() == torch.bincount(l, minlength=classes).tolist()


def test_classes_that_occur_nowhere_are_left_out_as_torchmetrics_does():
    """Class 2 is neither annotated nor predicted, 3 is only predicted, 4 only annotated."""
    labels = torch.tensor([0, 0, 0, 1, 1, 4])
    predicted = torch.tensor([0, 0, 1, 1, 3, 1])
    result = scores(count_matrix(predicted, labels, 5, 5))
    assert_close(result.iou, torch.tensor([2 / 3, 1 / 4, torch.nan, 0, 0]).double(), equal_nan=True)
    assert result.mean_iou == pytest.approx((2 / 3 + 1 / 4) / 4)
    mean = multiclass_jaccard_index(predicted, labels, num_classes=5)
    assert result.mean_iou == pytest.approx(mean.item())
    assert result.class_accuracy.isnan().tolist() == [False, False, True, True, False]


def test_a_set_is_scored_at_once_not_image_by_image():
    first = count_matrix(torch.tensor([0, 0]), torch.tensor([0, 0]), 2, 2)
    second = count_matrix(torch.tensor([0, 0, 1]), torch.tensor([1, 1, 1]), 2, 2)
    assert scores(first + second).mean_iou == pytest.approx((2 / 4 + 1 / 3) / 2)


def test_nothing_to_score_is_nan_not_zero():
    result = scores(torch.zeros(3, 3, dtype=torch.int64))
    assert np.isnan([result.accuracy, result.mean_iou, result.mean_class_accuracy]).all()


def test_counts_beyond_float32_stay_exact():
    result = scores(torch.tensor([[2**40 + 1, 0], [0, 1]]))
    assert result.support.tolist() == [2**40 + 1, 1]
    assert result.accuracy == 1.0
