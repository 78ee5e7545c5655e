"""Runs without Gumbel noise: their outputs clustered by K-means, and the clusters merged."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from nefkern import segment, train
from nefkern.data import open_dataset
from nefkern.runtime.errors import UserError
from nefkern.segmentation.metrics import count_matrix
from nefkern.segmentation.segmenter import Segmenter
from nefkern.training.runs import CLUSTERS, Run
from tests.evaluation.command import evaluate, failure, figures


@pytest.fixture(scope="module")
def continuous(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "continuous"
    assert train.main([
        "--data", "folder", "--data-root", str(folder), "--out", str(out), "--crop", "64",
        "--backbone", "test_vit", "--weights", "random", "--k", "8", "-K", "6", "--no-gumbel",
        "--epochs", "1", "--batch-size", "3", "--workers", "0", "--pictures", "1",
    ]) == 0  # fmt: skip
    return out


def test_continuous_eigenfunctions_are_clustered_by_kmeans(continuous, folder):
    """What is scored are the run's own clusters, and they are K-means on unit rows."""
    own = ("--protocol", "sliding", "--resize", "none")
    result = evaluate(continuous, folder, *own, "--methods", "ours,kmeans")
    segmenter = Segmenter.load(continuous, "cpu")
    state = Run(continuous).load_clusters()
    counts = torch.zeros(6, 4, dtype=torch.int64)
    for sample in open_dataset("folder", root=folder, split="val"):
        maps = segmenter.maps(sample.image[None])
        outputs = maps.logits[0].flatten(1).T.double() * state["scale"].double()
        unit = outputs / outputs.norm(dim=1, keepdim=True)
        nearest = torch.cdist(unit, state["centers"].double()).argmin(1)
        found = segmenter.cluster_logits(maps)[0].flatten(1).argmax(0)
        assert torch.equal(found, nearest)
        assert not torch.equal(found, maps.logits[0].flatten(1).argmax(0))
        clusters = segmenter.logits(sample.image).argmax(0)
        counts += count_matrix(clusters, sample.annotation, 6, 4)
    accuracy = counts.amax(1).sum() / counts.sum()
    assert figures(result, matching="count")["accuracy"] == pytest.approx(accuracy.item(), abs=2e-3)
    assert "continuous" in result["methods"]["ours"]["title"]


def test_a_continuous_run_without_clusters(continuous, folder, tmp_path, capsys, caplog):
    """Refused in a line, fitted where there are images, and made by --resume as they were."""
    caplog.set_level("INFO")
    old = tmp_path / "old"
    shutil.copytree(continuous, old)
    (old / CLUSTERS).unlink()
    photo = str(folder / "images" / "val" / "0.png")
    assert segment.main([str(old), photo, "--out", str(tmp_path / "out")]) == 2
    (line,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("error: "))
    assert "the run has none (clusters.safetensors)" in line
    assert "--resume" in line
    result = evaluate(old, folder)
    assert "keeps no clusters" in caplog.text
    assert figures(result)["accuracy"] > 0.25
    config = ["--config", str(old / "config.yaml"), "--out", str(old), "--resume"]
    assert train.main(config) == 0
    made, before = (load_file(folder / CLUSTERS) for folder in (old, continuous))
    assert made.keys() == before.keys()
    assert all(torch.equal(made[name], before[name]) for name in made)
    assert segment.main([str(old), photo, "--out", str(tmp_path / "out"), "--flip"]) == 0


def test_clusters_of_an_earlier_step_and_damaged_ones(continuous, tmp_path):
    run = Run(tmp_path / "old")
    shutil.copytree(continuous, run.folder)
    assert run.load_clusters() is not None
    save_file(load_file(run.path(CLUSTERS)), run.path(CLUSTERS), {"step": "1"})
    assert run.load_clusters() is None
    run.path(CLUSTERS).write_bytes(b"none")
    with pytest.raises(UserError, match="not a readable file of clusters"):
        run.load_clusters()


@pytest.mark.parametrize("options", [[], ["--crf", "classes"], ["--crf"]])
def test_all_of_evaluate_takes_a_continuous_run(continuous, folder, options):
    if options:
        pytest.importorskip("pydensecrf")
    names = "ours,ours-untrained,hidden"
    result = evaluate(continuous, folder, "--methods", names, "--limit", "2", *options)
    assert list(result["methods"]) == ["ours", "ours-untrained", "ours*"]


# ---- merged clusters ----


def test_merged_clusters_are_scored_as_segment_merges_them(continuous, folder, tmp_path, capsys):
    """Counts of the index images of segment --classes, matched by count."""
    run = tmp_path / "run"
    shutil.copytree(continuous, run, ignore=shutil.ignore_patterns("evaluation-*"))
    own = ("--protocol", "sliding", "--resize", "none")
    methods = ("--methods", "ours,kmeans,probe")
    whole = evaluate(run, folder, *own, *methods)
    result = evaluate(run, folder, *own, *methods, "--merge", "3")
    assert len(list(run.glob("evaluation-*.json"))) == 2
    assert (result["num_clusters"], result["settings"]["merge"]) == (3, 3)
    assert "merge" not in whole["settings"]
    assert "merge" not in whole["asked"]
    assert len(figures(result)["assignment"]) == len(figures(result, "kmeans")["assignment"]) == 3
    assert figures(result, "probe", matching="own") == figures(whole, "probe", matching="own")
    groups = Segmenter.load(run, "cpu").merged(3)
    assert groups.unique().tolist() == [0, 1, 2]
    images = str(folder / "images" / "val")
    for out, options in (("all", []), ("merged", ["--classes", "3"])):
        assert segment.main([str(run), images, "--out", str(tmp_path / out), *options]) == 0
    for n in range(4):
        before, after = (
            np.array(Image.open(tmp_path / out / f"{n}.clusters.png")) for out in ("all", "merged")
        )
        assert np.array_equal(groups.numpy()[before], after)
    segmenter, counts = Segmenter.load(run, "cpu"), torch.zeros(3, 4, dtype=torch.int64)
    for sample in open_dataset("folder", root=folder, split="val"):
        counts += count_matrix(groups[segmenter.logits(sample.image).argmax(0)],
                               sample.annotation, 3, 4)  # fmt: skip
    accuracy = counts.amax(1).sum() / counts.sum()
    assert figures(result, matching="count")["accuracy"] == pytest.approx(accuracy.item(), abs=2e-3)
    assert "How clusters merge" in (run / "report.html").read_text("utf-8")


def test_boundaries_of_merged_clusters(continuous, folder, pointwise):
    result = evaluate(continuous, folder, "--merge", "2", "--boundary", "--edges", "graph")
    stages = result["methods"]["ours"]["stages"]
    assert all(0 <= stages[s]["boundary"]["iou"]["f"] <= 1 for s in ("none", "graph"))


def test_a_crf_on_classes_of_merged_clusters(continuous, folder, monkeypatch):
    pytest.importorskip("pydensecrf")
    monkeypatch.setattr("nefkern.segmentation.mean_field.mean_field", lambda image, p, _: p)
    crf = ("--crf", "classes", "--crf-workers", "0", "--merge", "2", "--methods", "ours,kmeans")
    result = evaluate(continuous, folder, *crf)
    for method in ("ours", "kmeans"):
        before = figures(result, method, "none", "count")
        assert figures(result, method, "classes", "count") == before


def test_what_cannot_be_merged(run, continuous, folder, tmp_path, capsys):
    line = failure(capsys, continuous, "--data-root", folder, "--merge", "7")
    assert "--merge 7: expected 1 to 6, the run's clusters" in line
    line = failure(capsys, run, "--data-root", folder, "--merge", "3")
    assert "those of ours are ψ's own outputs" in line
    photo = str(folder / "images" / "val" / "0.png")
    for where, count, said in (
        (run, 3, "--classes 3: merges the clusters of K-means"),
        (continuous, 7, "--classes 7: expected 1 to 6, the run's clusters"),
        (continuous, 0, "--classes 0: expected 1 to 6, the run's clusters"),
    ):
        asked = [str(where), photo, "--out", str(tmp_path / "out"), "--classes", str(count)]
        assert segment.main(asked) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
