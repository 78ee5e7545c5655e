"""The vote command: which pictures vote, what they say, and mistakes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nefkern.runtime.errors import UserError
from nefkern.segmentation.image_counts import ImageCounts
from nefkern.vote import check, drawn, main, measure, parser, table


def counts(*images: list[list[int]]) -> ImageCounts:
    """Of three clusters and two classes."""
    found = ImageCounts(3, 2)
    for image in images:
        found.add(torch.tensor(image))
    return found


#: Two pictures know one cluster each, the third is void; cluster 2 is like cluster 1.
PICTURES = counts([[10, 0], [0, 0], [0, 0]], [[0, 0], [0, 10], [0, 0]], [[0, 0]] * 3)
IMAGES = counts([[50, 0], [0, 30], [0, 20]], [[20, 0], [0, 0], [5, 15]])
SIMILARITY = np.array([[1.0, 0.1, 0.2], [0.1, 1.0, 0.9], [0.2, 0.9, 1.0]])


def test_choices_are_random_and_only_of_annotated_pictures():
    many = counts(*([[[1, 0]] * 3] * 9), [[0, 0]] * 3)
    chosen = drawn(many, 4, 50, seed=0)
    assert all(int(mask.sum()) == 4 and not mask[9] for mask in chosen)
    assert len({tuple(mask.tolist()) for mask in chosen}) > 40
    assert all(torch.equal(a, b) for a, b in zip(chosen, drawn(many, 4, 50, seed=0), strict=True))
    assert any((a != b).any() for a, b in zip(chosen, drawn(many, 4, 50, seed=1), strict=True))


def test_names_of_one_picture_and_of_all():
    """One picture names every cluster like its own; two name all rightly but for 5 pixels."""
    one, two, every, by_count, by_iou = measure(PICTURES, IMAGES, SIMILARITY, [1, 2], 8, seed=0)
    assert {round(draw["accuracy"] * 140) for draw in one["draws"]} == {75, 65}
    assert all(draw["named"] == 3 for draw in one["draws"])
    assert all(round(draw["accuracy"] * 140) == 135 for draw in two["draws"])
    right = every["draws"][0]
    assert right["mean_iou"] == pytest.approx((70 / 75 + 65 / 70) / 2)
    assert by_count["draws"][0] == by_iou["draws"][0] == right
    text = table([one, every])
    assert "| 1 | " in text
    assert "| all 3 | 96.4 | 93.1 |  | 3 |" in text


def test_more_pictures_than_are_annotated():
    with pytest.raises(UserError, match="--pictures 3: expected at most 2, all there are"):
        drawn(PICTURES, 3, 1, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pictures", "1,x"], "--pictures: expected numbers such as 1,2,5,10; got 1,x"),
        (["--pictures", "0"], "--pictures: expected numbers"),
        (["--json", "no/vote.json"], "--json no/vote.json: there is no folder no"),
        (["--pictures", "9" * 5000], "--pictures: expected numbers"),
        (["--draws", "0"], "--draws 0: expected 1 to 100000"),
    ],
)
def test_mistakes_are_told_in_one_line(options, message, capsys):
    assert main(["run", *options]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_numbers_are_sorted_and_told_once():
    assert check(parser().parse_args(["run", "--pictures", "10, 2,2,1"])) == [1, 2, 10]
