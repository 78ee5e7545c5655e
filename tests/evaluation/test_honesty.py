import json

import pytest
import torch

from nefkern.evaluation.honesty import Honesty, Key, unpacked
from nefkern.segmentation.evaluation import match, matchings, unmatched
from nefkern.segmentation.image_counts import ImageCounts


def counted(tables: torch.Tensor) -> ImageCounts:
    counts = ImageCounts(*tables.shape[1:])
    for table in tables:
        counts.add(table)
    return counts


def asked(wrong: dict[str, list[int]], **options: int) -> Honesty:
    """Methods with so many wrong pixels of 200 in each image."""
    options = {"bootstrap": 500, "splits": 2} | options
    images = len(next(iter(wrong.values())))
    honesty = Honesty(torch.full((images,), 200), **options)
    for name, pixels in wrong.items():
        tables = torch.tensor([[[100 - w, 0], [w, 100]] for w in pixels])
        counts = counted(tables)
        honesty.add(name, "none", counts, match(counts.total()), lambda t: matchings(t)[0])
    return honesty


def difference(honesty: Honesty, images: str) -> dict:
    (found,) = (
        d for d in honesty.differences() if (d["matching"], d["images"]) == ("count", images)
    )
    return found


@pytest.mark.parametrize("images", ["same", "cross"])
def test_a_difference_is_paired(images):
    """The images differ by far more than the methods do, which differ in every image alike."""
    worse = [5, 45, 10, 40, 0, 50, 20, 30]
    found = difference(asked({"a": worse, "b": [w // 2 for w in worse]}), images)
    assert (found["first"], found["second"]) == ("a", "b")
    assert found["accuracy"]["difference"] == pytest.approx(98 / 1600, abs=0.01)
    assert found["accuracy"]["differs"]
    low, high = found["accuracy"]["interval"]
    assert 0 < low < found["accuracy"]["difference"] < high
    intervals = [e.intervals()["accuracy"] for k, e in asked({"a": worse, "b": worse})
                 .estimates.items() if k.matching == "count"]  # fmt: skip
    assert all(high - low > 0.05 for low, high in intervals), "one method's interval is wide"


def test_a_difference_in_one_image_is_none():
    found = difference(asked({"a": [5] * 8, "b": [5] * 7 + [30]}), "same")
    assert found["accuracy"]["difference"] == pytest.approx(-25 / 1600)
    assert found["accuracy"]["interval"][1] == 0  # the image is missed by a third of the resamples
    assert not found["accuracy"]["differs"]


def test_classes_of_ones_own_are_held_against_every_matching():
    honesty = asked({"a": [5, 6, 7, 8]})
    own = counted(torch.tensor([[[100, 0], [0, 100]]] * 4))
    honesty.add("probe", "none", own, unmatched(own.total()), lambda t: {"own": torch.arange(2)})
    found = [(d["matching"], d["images"]) for d in honesty.differences()]
    matched = ("iou", "count", "hungarian", "hungarian-iou")
    assert sorted(found) == sorted((m, i) for m in matched for i in ("same", "cross"))
    assert all(d["accuracy"]["difference"] > 0 for d in honesty.differences())


def test_one_image_has_no_interval_and_no_other_half():
    honesty = asked({"a": [5], "b": [9]})
    assert honesty.settings() == {"bootstrap": 0, "splits": 0, "seed": 0}
    assert honesty.differences() == []
    assert {key.images for key in honesty.estimates} == {"same"}


def test_what_is_told_is_json():
    honesty = Honesty(torch.tensor([10, 10]), 50, 1)
    counts = counted(torch.tensor([[[5, 0], [0, 5]], [[5, 0], [0, 5]]]))
    told = honesty.add(
        "a", "none", counts, match(counts.total()), lambda table: matchings(table)[0]
    )
    assert json.loads(json.dumps(told, allow_nan=False))["cross"]["iou"] == {
        "accuracy": 1, "mean_iou": 1, "interval": {"accuracy": [1, 1], "mean_iou": [1, 1]},
    }  # fmt: skip
    assert set(told["intervals"]) == {"iou", "count", "hungarian", "hungarian-iou"}


def test_resamples_survive_the_file():
    honesty = asked({"a": [5, 6, 7], "b": [9, 9, 1]})
    images, found = unpacked(honesty.packed())
    assert found.keys() == honesty.estimates.keys()
    key = Key("b", "none", "count", "cross")
    assert torch.equal(found[key].float(), honesty.estimates[key].resampled.float())
    assert unpacked(asked({"a": [1, 2, 3]}).packed())[0] == images, "of the images, not of scores"
    with pytest.raises(ValueError, match="not resampled scores"):
        unpacked(b"PK nothing")
