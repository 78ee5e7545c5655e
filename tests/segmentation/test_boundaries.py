"""The boundary F-score on cases that can be counted by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nefkern.segmentation.boundaries import boundary, boundary_f

# 120 × 160: the diagonal is 200, the tolerance 1.5 pixels, which reaches diagonal neighbours.
SHAPE = (120, 160)


def halves(column: int) -> np.ndarray:
    """Class 1 from a column on, class 0 before."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[:, column:] = 1
    return labels


def test_the_boundary_of_two_halves():
    found = boundary(halves(80))
    assert found[:, 79:81].all()
    assert found.sum() == 2 * SHAPE[0], "the frame is none"


@pytest.mark.parametrize(("shift", "score"), [(0, 1.0), (1, 1.0), (-1, 1.0), (2, 0.0), (9, 0.0)])
def test_a_shifted_edge_counts_up_to_the_tolerance(shift, score):
    """Each class's boundary moves by the shift; other classes' boundaries do not count for it."""
    assert boundary_f(halves(80 + shift), halves(80)) == score


def test_the_tolerance_itself_is_within():
    assert boundary_f(halves(84), halves(80), tolerance=0.02) == 1.0  # 4 pixels
    assert boundary_f(halves(84), halves(80), tolerance=0.0199) == 0.0


def test_precision_and_recall():
    """The predicted edge runs along the upper half of the annotated one: there all is found; below
    a step of 80 columns leads to the frame. Of either class 60 of 120 annotated points are found,
    and, but for two at the step, 60 of 60 + 80 predicted ones are right."""
    predicted = halves(80)
    predicted[60:] = 0
    precision, recall = 61 / 140, 61 / 120
    upper = 2 * precision * recall / (precision + recall)
    assert boundary_f(predicted, halves(80)) == pytest.approx(upper, abs=0.01)


def test_a_class_of_one_only_counts_as_nothing():
    """Classes 0 and 1 are right all around; 2, predicted alone, has 0."""
    annotated = halves(80)
    predicted = annotated.copy()
    predicted[50:60, 10:20] = 2
    inner = 40  # of class 0, about the false square; its outer corners are not its neighbours
    precision = 120 / (120 + inner)
    of_0 = 2 * precision / (precision + 1)
    assert boundary_f(predicted, annotated) == pytest.approx((of_0 + 1.0 + 0.0) / 3)
    assert boundary_f(annotated, predicted) == pytest.approx((of_0 + 1.0 + 0.0) / 3)


def test_an_image_of_one_class():
    one = np.zeros(SHAPE, np.uint8)
    assert boundary_f(one, one) == 1.0
    assert boundary_f(one + 1, one) == 0.0


def test_an_edge_under_a_void_band_runs_along_its_middle():
    annotated = halves(80)
    annotated[:, 79:81] = 255
    assert boundary_f(halves(80), annotated) == 1.0
    assert boundary_f(halves(84), annotated) == 0.0


def test_an_object_missed_behind_its_void_band_is_not_found():
    """The band's own outline is no boundary."""
    annotated = np.zeros(SHAPE, np.uint8)
    annotated[40:80, 40:80] = 255
    annotated[42:78, 42:78] = 1
    assert boundary_f(np.zeros(SHAPE, np.uint8), annotated) == 0.0


def test_deep_in_void_nothing_counts():
    annotated = halves(80)
    annotated[:60] = 255
    predicted = halves(80)
    predicted[20:30, 100:140] = 0  # far from anything annotated
    assert boundary_f(predicted, annotated) == 1.0
    predicted[70:90, 100:140] = 0
    assert boundary_f(predicted, annotated) < 1.0


def test_no_class_is_predicted_there():
    predicted = halves(80).astype(np.int64)
    predicted[predicted == 1] = -1
    assert boundary_f(predicted, halves(80)) == 0.5  # class 0 is right, class 1 is missed


def test_nothing_annotated():
    assert math.isnan(boundary_f(halves(80), np.full(SHAPE, 255, np.uint8)))


@pytest.mark.parametrize("shape", [(120,), (160, 120)])
def test_shapes_that_differ(shape):
    with pytest.raises(ValueError, match=r"one shape, got \[120, 160\]"):
        boundary_f(halves(80), np.zeros(shape, np.uint8))
