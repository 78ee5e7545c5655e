import json

import pytest
import torch

from nefkern.segmentation.evaluation import match
from nefkern.segmentation.tables import boundaries, class_table, summary_table

COUNTS = torch.tensor([[900, 0, 0], [60, 40, 0], [0, 0, 0]])
CLASSES = ["wall", "door", "absent"]


def test_every_matching_is_scored():
    found = match(COUNTS).as_dict(CLASSES)
    assert found["clusters_used"] == 2
    assert "no_hungarian" not in found
    iou, count = found["matchings"]["iou"], found["matchings"]["count"]
    assert iou["accuracy"] == pytest.approx(0.94)
    assert iou["mean_iou"] == pytest.approx((900 / 960 + 40 / 100) / 2)
    assert iou["classes_matched"] == 2
    assert iou["assignment"] == [0, 1, -1]
    assert count["accuracy"] == pytest.approx(0.96)
    assert count["classes_matched"] == 1
    assert count["iou"] == {"wall": pytest.approx(0.96), "door": 0.0, "absent": None}


def test_without_hungarian_the_reason_is_told():
    found = match(COUNTS[:2]).as_dict(CLASSES)
    assert set(found["matchings"]) == {"iou", "count"}
    assert "got 2 clusters, 3 classes" in found["no_hungarian"]


def test_figures_survive_json():
    found = match(COUNTS).as_dict(CLASSES)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_rescored_keeps_the_matching():
    plain = match(COUNTS)
    other = {name: torch.eye(3, dtype=torch.int64) * 5 for name in plain.confusions}
    figures = plain.rescored(other).as_dict(CLASSES)["matchings"]["count"]
    assert figures["accuracy"] == 1.0
    assert figures["assignment"] == plain.as_dict(CLASSES)["matchings"]["count"]["assignment"]


def evaluation():
    stage = match(COUNTS).as_dict(CLASSES)
    return {
        "classes": CLASSES,
        "num_clusters": 3,
        "pixels": dict(zip(CLASSES, COUNTS.sum(0).tolist(), strict=True)),
        "methods": {"ours": {"title": "", "stages": {"none": stage, "clusters": stage}}},
    }


def test_summary_has_a_line_for_each_matching_and_stage():
    lines = summary_table(evaluation()).splitlines()
    assert len(lines) == 2 + 2 * 4
    assert lines[2].split() == ["ours", "-", "majority", "by", "IoU", "94.0", "66.9", "2/3", "2/3"]
    assert lines[6].split()[:4] == ["ours", "CRF", "on", "clusters"]


def test_class_table_begins_with_the_largest_class():
    lines = class_table(evaluation()).splitlines()
    assert lines[0].split() == ["class", "pixels", "%", "ours", "ours+crf"]
    assert lines[2].split() == ["wall", "96.0", "93.8", "93.8"]
    assert lines[4].split() == ["absent", "0.0", "-", "-"]


def test_boundary_scores_are_told_where_they_were_asked_for():
    told = evaluation()
    assert boundaries(told) == []
    stages = told["methods"]["ours"]["stages"]
    stages["graph"] = match(COUNTS).as_dict(CLASSES)
    for stage, f in (("none", 0.25), ("graph", 0.5)):
        interval = {"f": (f - 0.1, f + 0.1)}
        stages[stage]["boundary"] = {"iou": {"f": f, "interval": interval}}
    told["boundary_differences"] = [
        {
            "first": ["ours", "none"],
            "second": ["ours", "graph"],
            "matching": "iou",
            "difference": 0.25,
            "interval": (0.2, 0.3),
            "differs": True,
        }
    ]
    text = "\n".join(boundaries(told))
    assert "majority by IoU  50.0 [40.0, 60.0]" in text
    assert "ours+graph - ours  majority by IoU  +25.0 [+20.0, +30.0]  higher" in text
