"""Edges scored beside the plain figures: CRF, pixel graph, boundaries."""

from __future__ import annotations

import sys

import pytest

from tests.evaluation.command import evaluate, failure, figures


@pytest.mark.parametrize("on", ["clusters", "classes"])
def test_crf_is_scored_beside(run, folder, pointwise, on):
    """Noise of 25 levels: single pixels are often wrong, their neighbourhood never."""
    pytest.importorskip("pydensecrf")
    crf = ["--crf"] if on == "clusters" else ["--crf", "classes"]
    result = evaluate(run, folder, "--methods", "ours,kmeans", *crf)
    for method in ("ours", "kmeans"):
        assert set(result["methods"][method]["stages"]) == {"none", on}
        for matching in ("iou", "count"):
            before = figures(result, method, "none", matching)["accuracy"]
            after = figures(result, method, on, matching)["accuracy"]
            assert after > before - 0.02
    assert figures(result, "ours", on, "count") != figures(result, "ours", "none", "count")


def test_graph_is_scored_beside(run, folder, pointwise, capsys):
    """Each pixel is a patch of its own here: what is noise about an edge is smoothed away."""
    result = evaluate(run, folder, "--methods", "ours,kmeans", "--edges", "graph", "--boundary")
    for method in ("ours", "kmeans"):
        stages = result["methods"][method]["stages"]
        assert list(stages) == ["none", "graph"]
        for matching in ("iou", "count"):
            before = figures(result, method, "none", matching)["accuracy"]
            after = figures(result, method, "graph", matching)["accuracy"]
            assert after > before - 0.02
            assert all(0 < stages[s]["boundary"][matching]["f"] < 1 for s in stages)
    assert {d["second"] for d in result["differences"]} > {"ours+graph"}
    assert ["ours", "graph"] in [d["second"] for d in result["boundary_differences"]]
    assert result["settings"]["edges"] == result["asked"]["edges"] == "graph"
    assert result["graph"]["solves"] == 8
    out = capsys.readouterr().out
    assert "ours    graph  majority by IoU" in out
    assert "Boundary F-score (within 0.75% of the diagonal)" in out
    assert "edges on the pixel graph: 8 solves, each " in out


def test_graph_and_crf_beside_each_other(run, folder, pointwise, monkeypatch):
    """What changes nothing has the same figures, in both; boundaries too, after either CRF."""
    pytest.importorskip("pydensecrf")
    monkeypatch.setattr("nefkern.segmentation.mean_field.mean_field", lambda image, p, _: p)
    monkeypatch.setattr("nefkern.segmentation.graph_edges.graph_edges", lambda image, p, *_: p)
    sliding = ("--protocol", "sliding", "--crf-workers", "0", "--boundary", "--edges")
    for options in (["graph,crf"], ["graph", "--crf"], ["crf, graph", "--crf", "classes"]):
        result = evaluate(run, folder, *sliding, *options)
        stages = result["methods"]["ours"]["stages"]
        on = "classes" if "classes" in options else "clusters"
        assert list(stages) == ["none", "graph", on]
        for stage in ("graph", on):
            assert figures(result, "ours", stage) == figures(result, "ours", "none")
            assert stages[stage]["boundary"] == stages["none"]["boundary"]


def test_crf_on_classes_starts_from_the_matched_segmentation(run, folder, pointwise, monkeypatch):
    """With a CRF that changes nothing, nothing changes."""
    pytest.importorskip("pydensecrf")
    monkeypatch.setattr("nefkern.segmentation.mean_field.mean_field", lambda image, p, _: p)
    crf = ("--crf", "classes", "--crf-workers", "0")
    result = evaluate(run, folder, "--methods", "ours,kmeans", *crf)
    for method in ("ours", "kmeans"):
        for matching in ("iou", "count"):
            before = figures(result, method, "none", matching)
            assert figures(result, method, "classes", matching) == before


def test_crf_on_clusters_starts_from_the_clusters(run, folder, pointwise, monkeypatch):
    pytest.importorskip("pydensecrf")
    monkeypatch.setattr("nefkern.segmentation.mean_field.mean_field", lambda image, p, _: p)
    crf = ("--protocol", "sliding", "--crf", "--crf-workers", "0")
    result = evaluate(run, folder, "--methods", "ours,kmeans", *crf)
    for method in ("ours", "kmeans"):
        assert figures(result, method, "clusters") == figures(result, method, "none")


@pytest.mark.parametrize("on", ["clusters", "classes"])
def test_a_crf_that_changes_nothing_leaves_a_probe_alone(run, folder, pointwise, monkeypatch, on):
    pytest.importorskip("pydensecrf")
    monkeypatch.setattr("nefkern.segmentation.mean_field.mean_field", lambda image, p, _: p)
    crf = ("--crf", on, "--crf-workers", "0", "--protocol", "sliding")
    result = evaluate(run, folder, "--methods", "probe,ours", *crf)
    before = figures(result, "probe", "none", "own")
    assert figures(result, "probe", on, "own") == before


@pytest.mark.parametrize("on", ["clusters", pytest.param("classes", marks=pytest.mark.long)])
def test_crf_in_worker_processes_gives_the_same_figures(run, folder, pointwise, on, capsys):
    pytest.importorskip("pydensecrf")
    asked = ("--methods", "ours,kmeans", "--crf", on, "--crf-workers")
    here = evaluate(run, folder, *asked, "0")
    capsys.readouterr()
    there = evaluate(run, folder, *asked, "2")
    assert there["methods"] == here["methods"]
    assert (there["settings"], there["asked"]) == (here["settings"], here["asked"])
    images, jobs = 4, 2 if on == "clusters" else 2 * 2  # by IoU and by count
    for result, workers in ((here, 0), (there, 2)):
        assert (result["crf"]["workers"], result["crf"]["inferences"]) == (workers, images * jobs)
        assert result["crf"]["seconds_per_image"] > 0
        assert result["crf"]["seconds_per_inference"] > 0
    out, err = capsys.readouterr()
    assert f"CRF: {there['crf']['seconds_per_image']:.2f} s an image" in out
    last = [line for line in err.replace("\r", "\n").splitlines() if "|" in line][-1]
    assert f"{images}/{images} [" in last
    assert "s/image]" in last


def test_crf_without_its_package(run, folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    assert "pip install pydensecrf2" in failure(capsys, run, "--data-root", folder, "--crf")
