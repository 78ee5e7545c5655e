"""Scores of the evaluate command, against independent computations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import accuracy_score, jaccard_score
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from nefkern.data import eval_transform, open_dataset
from nefkern.segmentation.segmenter import Segmenter
from tests.evaluation.command import evaluate, failure, figures
from tests.evaluation.scenes import write_folder


def shorter_side_to(side: int, size: torch.Size) -> list[int]:
    return [round(side * length / min(size)) for length in size]


def by_hand(samples, segmenter, by, shorter=None):
    """Accuracy and mean IoU by scikit-learn, the vote by loops over boolean masks.

    With ``shorter``, of images seen at that shorter side, the logits resized to their own.
    """

    def clusters_of(image):
        size, pixels = image.shape[1:], image[None]
        if shorter:
            seen = shorter_side_to(shorter, size)
            pixels = resize(pixels, seen, InterpolationMode.BILINEAR, antialias=True)
        logits = segmenter.cluster_logits(pixels.float() / 255)
        return F.interpolate(logits, size, mode="bilinear").argmax(1).flatten()

    clusters = torch.cat([clusters_of(s.image) for s in samples]).numpy()
    labels = torch.cat([s.annotation.flatten() for s in samples]).numpy()
    clusters, labels = clusters[labels != 255], labels[labels != 255]
    vote = np.zeros(5, int)
    for k in range(5):
        merit = []
        for c in range(4):
            both = ((clusters == k) & (labels == c)).sum()
            merit.append(both / ((clusters == k) | (labels == c)).sum() if by == "iou" else both)
        vote[k] = np.argmax(merit)
    predicted = vote[clusters]
    return accuracy_score(labels, predicted), jaccard_score(labels, predicted, average="macro")


@pytest.mark.parametrize("by", ["iou", "count"])
def test_sliding_figures_equal_an_independent_computation(run, folder, pointwise, by):
    result = evaluate(run, folder, "--protocol", "sliding", "--resize", "none")
    samples = list(open_dataset("folder", root=folder, split="val"))
    accuracy, mean_iou = by_hand(samples, pointwise, by)
    found = figures(result, matching=by)
    assert found["accuracy"] == pytest.approx(accuracy, abs=1e-12)
    assert found["mean_iou"] == pytest.approx(mean_iou, abs=1e-12)
    assert 0.6 < accuracy < 1  # neither trivial nor chance


@pytest.mark.parametrize(("options", "shorter"), [([], 69), (["--resize", "130"], 130)])
def test_protocol_b_sees_images_resized_and_scores_them_at_their_own(
    run, folder, pointwise, options, shorter
):
    """By default at the size that training starts from: 13/12 of its crop of 64."""
    result = evaluate(run, folder, "--protocol", "sliding", *options, "--methods", "ours,kmeans")
    samples = list(open_dataset("folder", root=folder, split="val"))
    accuracy, mean_iou = by_hand(samples, pointwise, "iou", shorter)
    assert figures(result)["accuracy"] == pytest.approx(accuracy, abs=1e-3)
    assert figures(result)["mean_iou"] == pytest.approx(mean_iou, abs=2e-3)
    assert abs(accuracy - by_hand(samples, pointwise, "iou")[0]) > 5e-3, "scale matters here"
    assert sum(result["pixels"].values()) == sum((s.annotation != 255).sum() for s in samples)
    assert result["settings"]["resize"] == shorter


def test_protocol_b_fits_and_scores_at_one_scale(run, folder, pointwise):
    asked = ("--protocol", "sliding", "--resize", "130", "--window", "999", "--methods", "kmeans")
    evaluate(run, folder, *asked, "--fit-images", "plain")
    expected = {
        tuple(shorter_side_to(130, sample.image.shape[1:]))
        for split in ("train", "val")
        for sample in open_dataset("folder", root=folder, split=split)
    }
    assert set(pointwise.seen) == expected
    assert len(pointwise.seen) == 6 + 4


def test_crop320_figures_equal_an_independent_computation(run, folder, pointwise):
    result = evaluate(run, folder)
    cropped = map(
        eval_transform("crop320", size=48), open_dataset("folder", root=folder, split="val")
    )
    accuracy, mean_iou = by_hand(list(cropped), pointwise, "iou")
    assert figures(result)["accuracy"] == pytest.approx(accuracy, abs=1e-12)
    assert figures(result)["mean_iou"] == pytest.approx(mean_iou, abs=1e-12)
    assert sum(result["pixels"].values()) == sum((s.annotation != 255).sum().item() for s in map(
        eval_transform("crop320", size=48), open_dataset("folder", root=folder, split="val")
    ))  # fmt: skip


def test_sliding_on_a_real_run_equals_its_logits(run, folder):
    result = evaluate(run, folder, "--protocol", "sliding", "--resize", "none")
    segmenter = Segmenter.load(run, "cpu")
    counts = torch.zeros(6, 4, dtype=torch.int64)
    for sample in open_dataset("folder", root=folder, split="val"):
        clusters, seen = segmenter.logits(sample.image).argmax(0), sample.annotation != 255
        pairs = clusters[seen] * 4 + sample.annotation[seen]
        counts += torch.bincount(pairs, minlength=24).view(6, 4)
    accuracy = counts.amax(1).sum() / counts.sum()
    assert figures(result, matching="count")["accuracy"] == pytest.approx(accuracy.item(), abs=2e-3)


def test_ignored_classes_are_void_and_gone(run, folder, pointwise):
    asked = ("--protocol", "sliding", "--resize", "none", "--ignore-class", "grey")
    result = evaluate(run, folder, *asked)
    assert result["classes"] == ["red", "green", "blue"]
    samples = list(open_dataset("folder", root=folder, split="val", ignore_classes=["grey"]))
    accuracy, _ = by_hand(samples, pointwise, "iou")
    assert figures(result)["accuracy"] == pytest.approx(accuracy, abs=1e-12)
    assert list(figures(result)["iou"]) == ["red", "green", "blue"]


def test_ignoring_a_class_in_the_middle_keeps_the_names_right(run, folder, pointwise):
    everything = evaluate(run, folder, "--protocol", "sliding")
    without = evaluate(run, folder, "--protocol", "sliding", "--ignore-class", "green")
    del everything["pixels"]["green"]
    assert without["pixels"] == everything["pixels"]
    assert figures(without)["iou"]["blue"] > 0.5


def test_hungarian_when_there_are_as_many_clusters_as_classes(run, folder, pointwise, capsys):
    evaluate(run, folder)
    assert "as many clusters as classes, got 5 clusters, 4 classes" in capsys.readouterr().out
    pointwise.num_clusters = 4
    pointwise.centres = pointwise.centres[:4]
    result = evaluate(run, folder, "--limit", "3")
    for matching in ("hungarian", "hungarian-iou"):
        assert sorted(figures(result, matching=matching)["assignment"]) == [0, 1, 2, 3]
    out = capsys.readouterr().out
    assert "as many clusters" not in out
    assert "Hungarian by IoU" in out


@pytest.mark.parametrize("protocol", ["crop320", "sliding"])
def test_masks_of_0_and_255_are_told(run, tmp_path, pointwise, capsys, protocol):
    """The object, all of it void, would score as if it were not there."""
    root = write_folder(tmp_path / "masks", {"val": 2})
    (root / "classes.txt").write_text("ground\nobject\n")
    for path in (root / "annotations" / "val").iterdir():
        mask = np.zeros(Image.open(path).size[::-1], np.uint8)
        mask[:, : mask.shape[1] // 2] = 255
        Image.fromarray(mask).save(path)
    result = evaluate(run, root, "--protocol", protocol)
    assert result["pixels"]["object"] == 0
    share = result["void_pixels"] / (result["void_pixels"] + result["pixels"]["ground"])
    assert share == pytest.approx(0.5, abs=0.02)
    printed = capsys.readouterr().out
    assert f"note: no pixel is object (1), but {100 * share:.0f}% of the pixels are 255" in printed
    assert "(object: 1)" in printed
    result = evaluate(run, root, "--protocol", protocol, "--ignore-class", "object")
    assert "void_pixels" not in result
    assert "note:" not in capsys.readouterr().out


def test_nothing_is_noted_where_every_class_occurs(run, folder, pointwise, capsys):
    evaluate(run, folder)
    assert "note:" not in capsys.readouterr().out


def test_nothing_but_void(run, tmp_path, pointwise, capsys):
    root = write_folder(tmp_path / "void", {"val": 1})
    Image.new("L", (70, 90), 255).save(root / "annotations" / "val" / "0.png")
    assert "every annotated pixel is void" in failure(capsys, run, "--data-root", root)
