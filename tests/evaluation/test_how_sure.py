"""How sure the scores are: intervals, the other half, bounds, differences."""

from __future__ import annotations

import pytest

from tests.evaluation.command import evaluate, figures


def test_scores_come_with_intervals_the_other_half_and_bounds(run, folder, pointwise, capsys):
    result = evaluate(run, folder, "--methods", "ours,kmeans,probe", "--bootstrap", "200")
    assert result["resampling"] == {"bootstrap": 200, "splits": 10, "seed": 0}
    for method, matching in (("ours", "iou"), ("kmeans", "count"), ("probe", "own")):
        stage = result["methods"][method]["stages"]["none"]
        found, cross = figures(result, method, matching=matching), stage["cross"][matching]
        for score in ("accuracy", "mean_iou"):
            low, high = stage["intervals"][matching][score]
            assert low <= found[score] <= high
            assert low < high
            low, high = cross["interval"][score]
            assert low <= cross[score] <= high
    bounds = {
        name: bound["stages"]["none"]["matchings"] for name, bound in result["bounds"].items()
    }
    assert bounds["patches"]["own"]["accuracy"] == 1, "patches of a pixel"
    floor = bounds["random-clusters"]["count"]["accuracy"]
    share = max(result["pixels"].values()) / sum(result["pixels"].values())
    assert floor == pytest.approx(share, abs=0.02)
    assert floor < figures(result)["accuracy"]
    printed = capsys.readouterr().out
    assert "other half" in printed
    assert "floor: random-segments" in printed
    assert "kmeans - ours" in printed


def test_differences_are_between_every_two_methods(run, folder, pointwise):
    result = evaluate(run, folder, "--methods", "ours,kmeans,probe", "--cross-match", "0")
    pairs = {(d["first"], d["second"], d["matching"]) for d in result["differences"]}
    names = [("ours", "kmeans"), ("ours", "probe"), ("kmeans", "probe")]
    assert pairs == {(*pair, matching) for pair in names for matching in ("iou", "count")}
    (found,) = (d for d in result["differences"] if (d["first"], d["second"], d["matching"]) ==
                ("ours", "kmeans", "iou"))  # fmt: skip
    before, after = (figures(result, name)["mean_iou"] for name in ("ours", "kmeans"))
    assert found["mean_iou"]["difference"] == pytest.approx(after - before, abs=1e-12)


def test_what_is_said_beside_the_scores_changes_none(run, folder, pointwise, capsys):
    full = evaluate(run, folder)
    assert next(run.glob("evaluation-*.npz")).stem == next(run.glob("evaluation-*.json")).stem
    off = ("--bootstrap", "0", "--cross-match", "0", "--no-bounds")
    capsys.readouterr()
    bare = evaluate(run, folder, *off)
    assert (bare["settings"], bare["asked"]) == (full["settings"], full["asked"])
    assert figures(bare) == figures(full)
    stage = bare["methods"]["ours"]["stages"]["none"]
    assert "intervals" not in stage
    assert "cross" not in stage
    assert "bounds" not in bare
    assert "How sure" not in capsys.readouterr().out
    assert not list(run.glob("evaluation-*.npz")), "those of the scores before are gone"


@pytest.mark.parametrize("on", ["clusters", "classes"])
def test_a_crf_has_intervals_and_differences_too(run, folder, pointwise, monkeypatch, on):
    pytest.importorskip("pydensecrf")
    monkeypatch.setattr("nefkern.segmentation.mean_field.mean_field", lambda image, p, _: p)
    crf = ("--protocol", "sliding", "--crf", on, "--crf-workers", "0")
    result = evaluate(run, folder, *crf)
    plain, refined = (result["methods"]["ours"]["stages"][stage] for stage in ("none", on))
    assert refined["intervals"] == plain["intervals"]
    assert ("cross" in refined) == (on == "clusters"), "classes are refined after one matching"
    found = [d for d in result["differences"] if d["second"] == "ours+crf"]
    assert found
    assert not any(d[score]["differs"] for d in found for score in ("accuracy", "mean_iou"))
