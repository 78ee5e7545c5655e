"""The linear probe: labels of patches, and the classifier against scikit-learn's."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.testing import assert_close

from nefkern.baselines.probe import NO_LABEL, Probe, patch_labels
from nefkern.segmentation.methods import METHODS


def separable(n=600, classes=4, channels=6, seed=0):
    """Maps [3, channels, 10, n / 30] of classes far apart, channels of very different scale."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (3, 10, n // 30), generator=generator)
    means = 6 * torch.randn(classes, channels, generator=torch.Generator().manual_seed(1))
    rows = means[labels] + 0.3 * torch.randn(*labels.shape, channels, generator=generator)
    scale = torch.tensor([1, 100, 1e-3, 1, 1, 0.0][:channels])
    return (rows * scale + 5).movedim(-1, 1), labels


def fitted(maps, labels, classes=4):
    probe = Probe(METHODS["probe"], classes)
    for image, label in zip(maps, labels, strict=True):
        probe.observe({"graph": image[None]}, label[None])
    return probe.finish("cpu")


def test_patches_take_the_class_of_most_of_their_pixels():
    annotation = torch.tensor(
        [[0, 0, 1, 1, 2], [0, 1, 1, 255, 2], [255, 255, 2, 0, 1], [255, 255, 2, 0, 1]],
        dtype=torch.uint8,
    )
    found = patch_labels(annotation, (3, 3), (6, 6), 3)
    # The third column of patches has one column of pixels, the third row none.
    assert found.tolist() == [[0, 1, 2], [NO_LABEL, 0, 1], [NO_LABEL] * 3]


def test_patches_of_resized_images_may_be_no_whole_pixels():
    """Patches 2.5 pixels wide: the middle of the third pixel is where the second one begins."""
    annotation = torch.tensor([[0, 0, 1, 1, 1]] * 2, dtype=torch.uint8)
    assert patch_labels(annotation, (1, 2), (2.5, 5.0), 2).tolist() == [[0, 1]]


def test_classes_that_can_be_told_apart_are():
    maps, labels = separable()
    probe = fitted(maps, labels)
    assert torch.equal(probe.logits({"graph": maps}).argmax(1), labels)
    unseen, expected = separable(seed=7)
    assert torch.equal(probe.logits({"graph": unseen}).argmax(1), expected)
    assert_close(probe.probabilities(probe.logits({"graph": maps})[0]).sum(0), torch.ones(10, 20))


def test_it_is_the_softmax_regression_of_scikit_learn():
    """Classes that overlap, so that the optimum is inside."""
    generator = torch.Generator().manual_seed(3)
    maps = torch.randn(2, 5, 12, 15, generator=generator)
    labels = (maps[:, :3] + torch.randn(2, 3, 12, 15, generator=generator)).argmax(1)
    probe = fitted(maps, labels, classes=3)
    rows, n = maps.movedim(1, -1).flatten(0, 2).double(), labels.numel()
    standard = (rows - rows.mean(0)) / rows.std(0)
    theirs = LogisticRegression(C=1 / (n * 1e-4), tol=1e-8, max_iter=1000)
    expected = theirs.fit(standard.numpy(), labels.flatten().numpy()).predict_proba(
        standard.numpy()
    )
    found = probe.logits({"graph": maps}).softmax(1).movedim(1, -1).flatten(0, 2)
    assert_close(found.double(), torch.from_numpy(expected), atol=2e-3, rtol=0)


def test_patches_without_a_label_do_not_count():
    maps, labels = separable()
    spoilt, void = maps.clone(), labels.clone()
    void[:, :2] = NO_LABEL
    spoilt[:, :, :2] = 1e3
    assert torch.equal(fitted(spoilt, void).logits({"graph": maps}).argmax(1), labels)


def test_the_number_of_threads_changes_no_bit(monkeypatch):
    monkeypatch.setattr("nefkern.spectral.kmeans._BLOCK", 64)
    maps, labels = separable()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(fitted(maps, labels).logits({"graph": maps}))
    assert torch.equal(*found)


def test_nothing_annotated_is_refused():
    probe = Probe(METHODS["probe"], 4)
    probe.observe({"graph": torch.zeros(1, 3, 2, 2)}, torch.full((1, 2, 2), NO_LABEL))
    with pytest.raises(ValueError, match="no annotated patch"):
        probe.finish("cpu")
