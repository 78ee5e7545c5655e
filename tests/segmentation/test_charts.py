from __future__ import annotations

import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from PIL import Image

from nefkern.segmentation.charts import (
    Functions,
    comparison_row,
    comparison_sheet,
    confusion_matrix,
    eigenfunction_maps,
    function_sheet,
    iou_bars,
    legend,
    panels,
)
from nefkern.segmentation.pictures import BACKGROUND, grid

pytestmark = pytest.mark.drawn

EVALUATION = {
    "pixels": {"sky": 10, "road": 90},
    "methods": {
        name: {"stages": {"none": {"matchings": {"iou": {"iou": {"sky": sky, "road": 0.5}}}}}}
        for name, sky in (("ours", 0.25), ("kmeans", None))
    },
}


def words(svg: str) -> str:
    """What a reader can search for: matplotlib keeps a comment beside every drawn text."""
    ET.fromstring(svg)
    return svg


def test_iou_bars_name_classes_and_methods():
    text = words(iou_bars(EVALUATION))
    for word in ("sky", "road", "ours", "kmeans"):
        assert f"<!-- {word} -->" in text
    assert text.index("<!-- road -->") < text.index("<!-- sky -->"), "the larger class first"
    assert text == iou_bars(EVALUATION), "the same every time"


def test_iou_bars_of_many_classes_stand_in_rows_without_those_that_do_not_occur():
    iou = {f"class {i}": None if i % 2 else 0.5 for i in range(150)}
    stage = {"none": {"matchings": {"iou": {"iou": iou}}}}
    evaluation = {"pixels": dict.fromkeys(iou, 1), "methods": {"ours": {"stages": stage}}}
    text = words(iou_bars(evaluation))
    assert "<!-- class 148 -->" in text
    assert "<!-- class 1 -->" not in text
    assert text.count("<!-- IoU, % -->") == 2, "75 classes in two rows"
    width = float(text.partition('width="')[2].partition("pt")[0])
    assert width < 72 * 22
    evaluation["pixels"] = {}
    words(iou_bars(evaluation))


def test_confusion_matrix_shows_percent_of_the_annotated():
    confusion = torch.tensor([[30, 1], [10, 1]])  # predicted x annotated
    text = words(confusion_matrix(confusion, ["sky", "road"], "ours"))
    for number in ("75", "25", "50"):
        assert f"<!-- {number} -->" in text


def test_confusion_matrix_of_many_classes_has_no_numbers():
    text = confusion_matrix(torch.eye(40).long(), [f"class {i}" for i in range(40)], "ours")
    assert "<!-- class 39 -->" in text
    assert "<!-- 100 -->" not in text


def test_comparison_row_paints_classes_and_leaves_void_black():
    image = torch.full((3, 4, 6), 9, dtype=torch.uint8)
    labels = torch.zeros(4, 6, dtype=torch.uint8)
    labels[0, 0] = 255
    predicted = torch.ones(4, 6, dtype=torch.int64)
    predicted[1, 1] = -1
    colours = np.array([[1, 2, 3], [4, 5, 6]], np.uint8)
    picture = np.array(comparison_row(image, labels, [predicted], colours))
    left, middle, right = picture[:, :6], picture[:, 14:20], picture[:, 28:34]
    assert (left == 9).all()
    assert tuple(middle[0, 0]) == BACKGROUND
    assert (middle[1:] == colours[0]).all()
    assert tuple(right[1, 1]) == BACKGROUND
    assert (right[2:] == colours[1]).all()


def test_comparison_row_of_a_large_image_is_drawn_smaller():
    labels = (torch.arange(4096) >= 2048).expand(100, -1)
    colours = np.array([[1, 2, 3], [4, 5, 6]], np.uint8)
    image = torch.full((3, 100, 4096), 9, dtype=torch.uint8)
    picture = np.array(comparison_row(image, labels.byte(), [labels.long()], colours))
    assert picture.shape == (50, 3 * 2048 + 2 * 8, 3)
    for left in (2056, 4112):
        assert (picture[:, left : left + 1024] == colours[0]).all()
        assert (picture[:, left + 1024 : left + 2048] == colours[1]).all()


def test_legend_names_every_class_in_its_colour():
    text = words(legend(["sky", "road"], np.array([[70, 130, 180], [128, 64, 128]], np.uint8)))
    assert "<!-- sky -->" in text
    assert text.index("#4682b4") < text.index("#804080")
    assert len(words(legend([f"class {i}" for i in range(150)], np.zeros((150, 3))))) > 0


def test_names_are_taken_as_they_are():
    """Neither left out for an underscore, as LabelMe's background, nor read as formulas."""
    classes = ["_background_", "$_$", r"a$x$b\$"]
    colours, confusion = np.zeros((3, 3), np.uint8), torch.eye(3, dtype=torch.int64)
    scored = dict.fromkeys(classes, 0.5)
    stages = {"none": {"matchings": {"iou": {"iou": scored}}}}
    evaluation = {"pixels": dict.fromkeys(classes, 1), "methods": {"ours": {"stages": stages}}}
    charts = [
        legend(classes, colours), confusion_matrix(confusion, classes, ""), iou_bars(evaluation)
    ]  # fmt: skip
    for chart in charts:
        assert all(f"<!-- {name} -->" in chart for name in classes[:2])
        assert "a$x$b" in chart


def test_comparison_sheet_stacks_rows_below_heads():
    shown = [grid([[np.full((20, 60, 3), shade, np.uint8)] * 2]) for shade in (10, 20)]
    rows = [panels(picture, 2) for picture in shown]
    picture = np.array(comparison_sheet(rows, ["image", "ours"]))
    height, width = picture.shape[:2]
    assert width == shown[0].width
    above = picture[: height - 48]
    for half in (above[:, : width // 2], above[:, width // 2 :]):
        assert (half < 100).any(), "a head above each column"
    assert (picture[-48:-28, :60] == 10).all()
    assert (picture[-20:, -60:] == 20).all()


def test_comparison_sheet_of_pictures_of_several_sizes_keeps_its_columns():
    wide = [Image.new("RGB", (60, 20), colour) for colour in ("red", "blue")]
    high = [Image.new("RGB", (30, 50), colour) for colour in ("red", "blue")]
    picture = np.array(comparison_sheet([high, wide], ["image", "ours"]))
    assert picture.shape == (24 + 50 + 8 + 20, 60 + 8 + 60, 3)
    for top in (24, 24 + 50 + 8):
        assert tuple(picture[top, 0]) == (255, 0, 0)
        assert tuple(picture[top, 68]) == (0, 0, 255)
    assert (picture[:24, 68:] < 100).any(), "the head above the second column"


@pytest.mark.parametrize("count", [1, 2, 5])
def test_panels_take_a_row_apart(count):
    pictures = [np.full((6, 10, 3), 9 * i, np.uint8) for i in range(count)]
    found = panels(grid([pictures]), count)
    assert all((np.array(f) == p).all() for f, p in zip(found, pictures, strict=True))
    assert len(found) == count


def test_function_sheet_paints_signed_functions_around_white():
    image = torch.full((3, 224, 224), 9, dtype=torch.uint8)
    values = torch.tensor([[[-1.0, 0.0], [1.0, 2.0]]])
    rows = [Functions(["ψ 4"], values, False), Functions(["v 1"], values, True)]
    picture = np.array(function_sheet(image, rows)).astype(int)
    assert picture.shape == (2 * (24 + 224) + 8, 2 * 224 + 8, 3)
    assert (picture[24:248, :224] == 9).all(), "the photograph"
    assert (picture[256:, :224] == 255).all(), "once"
    plain, signed = picture[24:248, 232:], picture[280:, 232:]
    assert tuple(plain[0, 0]) == (68, 1, 84), "the least, viridis' dark end"
    assert tuple(plain[-1, -1]) == (253, 231, 36), "the largest"
    assert (signed[0, -1] > 240).all(), "0 is white"
    red, blue = signed[-1, -1], signed[0, 0]
    assert red[0] > red[2]
    assert blue[2] > blue[0]
    assert (plain[:112, :112] == plain[0, 0]).all(), "patch by patch"


def test_function_sheet_cuts_padding_off_and_takes_a_constant():
    image = torch.zeros(3, 90, 224, dtype=torch.uint8)
    values = torch.zeros(1, 2, 2)
    values[0, 1] = 1  # a row of patches of which the image covers none
    sheet = function_sheet(image, [Functions(["ψ 0"], values, False)], (0.5, 1.0))
    picture = np.array(sheet)[24:, 232:]
    assert picture.shape == (90, 224, 3)
    assert (picture == picture[0, 0]).all()
    function_sheet(image, [Functions(["ψ 0"], torch.ones(1, 2, 2), False)])


def test_eigenfunction_maps_take_the_heaviest_and_scale_each():
    image = torch.zeros(3, 20, 20, dtype=torch.uint8)
    probabilities = torch.zeros(5, 2, 2)
    probabilities[3] = 0.5
    probabilities[1, 0, 0] = 0.1
    picture = np.array(eigenfunction_maps(image, probabilities, count=2))
    assert (picture[:, 28:48] == 255).all(), "the heaviest, uniform"
    second = picture[:, 56:76]
    assert (second[:10, :10] == 255).all()
    assert (second[10:] == 0).all()
