"""Published data sets: layouts, splits, labels to classes, and what is missing."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from nefkern.data import BENCHMARKS, DATASETS, VOID, open_dataset
from nefkern.data import prepare_potsdam as potsdam_module
from nefkern.data.potsdam import COLOURS as POTSDAM_COLOURS
from nefkern.data.prepare import prepare_pascal_context
from nefkern.data.prepare_potsdam import prepare_potsdam
from nefkern.runtime.errors import UserError
from nefkern.training.presets import CLASSES, PRESETS, WINDOWS
from tests.data import publisher

# Written down from the publishers' pages, apart from the package's tables: label, name, colour.
CITYSCAPES = {
    7: ("road", (128, 64, 128)), 9: ("parking", (250, 170, 160)), 11: ("building", (70, 70, 70)),
    17: ("pole", (153, 153, 153)), 21: ("vegetation", (107, 142, 35)),
    24: ("person", (220, 20, 60)), 26: ("car", (0, 0, 142)),
    29: ("caravan", (0, 0, 90)), 33: ("bicycle", (119, 11, 32)),
}  # fmt: skip
TRAIN_IDS = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11,
             25: 12, 26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18}  # fmt: skip
ADE20K = {1: "wall", 2: "building", 3: "sky", 8: "bed", 13: "person", 21: "car", 45:
          "chest of drawers", 90: "television receiver", 128: "bicycle", 150: "flag"}  # fmt: skip
PASCAL = {2: "aeroplane", 19: "bedclothes", 23: "bicycle", 45: "bus", 98: "cow", 284: "person",
          360: "sky", 397: "table", 416: "train", 427: "tvmonitor", 458: "wood"}  # fmt: skip

# The number of a label in COCO-Stuff's own list, its name there, and the group it belongs to.
COCOSTUFF = {
    1: ("person", "person"), 2: ("bicycle", "vehicle"), 9: ("boat", "vehicle"),
    10: ("traffic light", "outdoor"), 17: ("cat", "animal"), 33: ("suitcase", "accessory"),
    34: ("frisbee", "sports"), 44: ("bottle", "kitchen"), 61: ("cake", "food"),
    62: ("chair", "furniture"), 72: ("tv", "electronic"), 82: ("refrigerator", "appliance"),
    91: ("hair brush", "indoor"), 92: ("banner", "textile"), 95: ("bridge", "building"),
    102: ("ceiling-other", "ceiling"), 106: ("clouds", "sky"), 113: ("fence", "structural"),
    118: ("floor-wood", "floor"), 124: ("grass", "plant"), 130: ("light", "furniture-stuff"),
    135: ("mountain", "solid"), 139: ("paper", "raw-material"), 149: ("road", "ground"),
    153: ("salad", "food-stuff"), 171: ("wall-brick", "wall"), 178: ("water-other", "water"),
    181: ("window-other", "window"), 182: ("wood", "solid"),
}  # fmt: skip
VOC = {1: ("aeroplane", (128, 0, 0)), 9: ("chair", (192, 0, 0)), 12: ("dog", (64, 0, 128)),
       15: ("person", (192, 128, 128)), 20: ("tvmonitor", (0, 64, 128))}  # fmt: skip


def classes_of(dataset, values: list[int]) -> dict[int, int]:
    """What the labels in the first annotation, laid out in columns, are read as."""
    row = dataset[0].annotation[5].tolist()
    assert dataset[0].annotation.shape == (30, 40)
    return dict(zip(values, row, strict=False))


def error(*args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        list(open_dataset(*args, **kwargs))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_data_set_has_a_preset():
    assert tuple(PRESETS) == DATASETS
    assert set(WINDOWS) == {name for name, b in BENCHMARKS.items() if b.class_sets}
    for name, by_protocol in CLASSES.items():
        assert set(by_protocol.values()) == set(BENCHMARKS[name].class_sets)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_tables_are_whole(name):
    for count, classes in BENCHMARKS[name].class_sets.items():
        assert len(classes.names) == len(set(classes.names)) == len(classes.colours) == count
        assert all(name == name.strip() for name in classes.names)
        assert sorted(set(classes.label_map) - {VOID}) == list(range(count))
        assert all(0 <= part <= 255 for colour in classes.colours for part in colour)


# ---- Cityscapes ----


def test_cityscapes_27_are_the_label_ids_from_7(tmp_path):
    ids = list(range(34))
    dataset = open_dataset("cityscapes", root=publisher.cityscapes(tmp_path, ids), classes=27)
    found = classes_of(dataset, ids)
    assert [found[i] for i in range(7)] == [VOID] * 7
    assert [found[i] for i in range(7, 34)] == list(range(27))
    for label, (name, colour) in CITYSCAPES.items():
        assert dataset.classes[found[label]] == name
        assert dataset.colours[found[label]] == colour


def test_cityscapes_19_are_the_train_ids(tmp_path):
    ids = list(range(34))
    dataset = open_dataset("cityscapes", root=publisher.cityscapes(tmp_path, ids), classes=19)
    assert classes_of(dataset, ids) == {i: TRAIN_IDS.get(i, VOID) for i in ids}
    assert dataset.classes[TRAIN_IDS[24]] == "person"
    assert dataset.colours[TRAIN_IDS[26]] == (0, 0, 142)
    assert "parking" not in dataset.classes


def test_cityscapes_splits_and_names(tmp_path):
    root = publisher.cityscapes(tmp_path, [7])
    beside = root / "leftImg8bit" / "val" / "lindau" / "._lindau_000000_000019_leftImg8bit.png"
    beside.write_text("of macOS")
    assert len(open_dataset("cityscapes", root=root)) == 2
    assert open_dataset("cityscapes", root=root, split="val").names == [
        "lindau_000000_000019_leftImg8bit"
    ]
    assert len(open_dataset("cityscapes", root=root).classes) == 27
    assert "no split 'test', there is: train, val" in error("cityscapes", root=root, split="test")


def test_a_label_beyond_the_publisher_s_is_named(tmp_path):
    message = error("cityscapes", root=publisher.cityscapes(tmp_path, [7, 40]))
    assert "labelIds.png: holds index 40, this data set has 34 labels (0 to 33" in message


def test_ignored_classes_are_meant_after_the_mapping(tmp_path):
    root = publisher.cityscapes(tmp_path, [0, 7, 8, 11])
    dataset = open_dataset("cityscapes", root=root, classes=19, ignore_classes=["sidewalk"])
    assert classes_of(dataset, [0, 7, 8, 11]) == {0: VOID, 7: 0, 8: VOID, 11: 2}


def test_train_only_needs_images(tmp_path):
    root = publisher.cityscapes(tmp_path, [7])
    shutil.rmtree(root / "gtFine" / "train")
    assert not open_dataset("cityscapes", root=root).annotated
    assert open_dataset("cityscapes", root=root, split="val").annotated
    next((root / "gtFine" / "val").rglob("*labelIds.png")).unlink()
    message = error("cityscapes", root=root, split="val")
    assert "this annotation is missing, 1 of 1 are; get gtFine_trainvaltest.zip" in message


# ---- ADE20K ----


@pytest.mark.parametrize("home", ["", "ADEChallengeData2016"])
def test_ade20k(tmp_path, home):
    values = [0, *ADE20K]
    publisher.ade20k(tmp_path / home, values)
    dataset = open_dataset("ade20k", root=tmp_path)
    found = classes_of(dataset, values)
    assert found == {0: VOID, **{value: value - 1 for value in ADE20K}}
    assert {value: dataset.classes[found[value]] for value in ADE20K} == ADE20K
    assert dataset.colours[0] == (120, 120, 120)
    assert dataset.colours[149] == (92, 0, 255)
    assert len(dataset) == 2
    assert len(open_dataset("ade20k", root=tmp_path, split="val")) == 1
    assert "there is: train, val" in error("ade20k", root=tmp_path, split="test")


def test_ade20k_ends_at_150(tmp_path):
    publisher.ade20k(tmp_path, [150, 151])
    assert "holds index 151, this data set has 151 labels (0 to 150" in error(
        "ade20k", root=tmp_path
    )


# ---- Pascal Context ----


@pytest.mark.parametrize("home", ["", "VOC2010", "VOCdevkit/VOC2010"])
def test_pascal_context_in_both_ways_to_count(tmp_path, home):
    # 1 (accordion) and 431 (unknown) are labels outside the 59
    values = [0, 1, 431, 459, *PASCAL]
    publisher.pascal_context(tmp_path, values, home)
    assert not open_dataset("pascal_context", root=tmp_path).annotated
    prepare_pascal_context(tmp_path)
    without = open_dataset("pascal_context", root=tmp_path)
    found = classes_of(without, values)
    assert len(without.classes) == 59
    assert [found[v] for v in (0, 1, 431, 459)] == [VOID] * 4
    assert {v: without.classes[found[v]] for v in PASCAL} == PASCAL
    background = open_dataset("pascal_context", root=tmp_path, classes=60)
    found = classes_of(background, values)
    assert {background.classes[found[v]] for v in (0, 1, 431, 459)} == {"background"}
    assert {v: background.classes[found[v]] for v in PASCAL} == PASCAL
    assert background.classes[0] == "background"
    assert background.colours[1:] == without.colours


def test_pascal_context_splits(tmp_path):
    publisher.pascal_context(tmp_path, [2])
    assert open_dataset("pascal_context", root=tmp_path).names == ["2008_000002", "2008_000003"]
    lists = tmp_path / "VOCdevkit" / "VOC2010" / "ImageSets" / "SegmentationContext"
    lists.mkdir()
    (lists / "train.txt").write_text("2008_000009\n")
    assert open_dataset("pascal_context", root=tmp_path).names == ["2008_000009"]
    assert open_dataset("pascal_context", root=tmp_path, split="val").names == ["2008_000007"]
    assert "expected train, val or trainval" in error("pascal_context", root=tmp_path, split="x")
    (lists / "train.txt").write_text("2008_000009\n2008_000010\n")
    assert "2008_000010.jpg: this image is missing, 1 of 2" in error(
        "pascal_context", root=tmp_path
    )
    (lists / "train.txt").write_text("\n")
    assert "the file is empty" in error("pascal_context", root=tmp_path)


# ---- ImageNet ----


@pytest.mark.parametrize("home", ["", "ILSVRC/Data/CLS-LOC"])
def test_imagenet(tmp_path, home):
    publisher.imagenet(tmp_path / home)
    for name in ("notes.txt", "._n01440764_0.JPEG"):
        (tmp_path / home / "train" / "n01440764" / name).write_text("no image")
    dataset = open_dataset("imagenet", root=tmp_path)
    assert dataset.names == ["n01440764_0", "n02119789_0", "n02119789_1"]
    assert not dataset.annotated
    assert dataset.classes == []
    assert dataset[1].image.shape == (3, 30, 40)
    publisher.write_image(tmp_path / home / "val" / "ILSVRC2012_val_00000001.JPEG")
    assert len(open_dataset("imagenet", root=tmp_path, split="val")) == 1


# ---- mistakes ----


@pytest.mark.parametrize("name", BENCHMARKS)
def test_what_is_not_there_is_named_with_its_source(tmp_path, name):
    site = {
        "pascal_context": "host.robots.ox.ac.uk", "cityscapes": "www.cityscapes-dataset.com",
        "ade20k": "sceneparsing.csail.mit.edu", "imagenet": "image-net.org",
        "voc2012": "host.robots.ox.ac.uk", "cocostuff": "cocodataset.org",
        "potsdam": "www.isprs.org",
    }[name]  # fmt: skip
    message = error(name, root=tmp_path)
    assert BENCHMARKS[name].title in message
    assert BENCHMARKS[name].images.folder in message
    assert site in message
    assert "does not exist" in error(name, root=tmp_path / "gone")
    assert f"data '{name}': expected a data root" in error(name)


@pytest.mark.parametrize(
    ("name", "count", "message"),
    [
        ("cityscapes", 60, "60 classes: cityscapes has 19 or 27 classes"),
        ("pascal_context", 27, "pascal_context has 59 or 60 classes"),
        ("ade20k", 151, "ade20k has 150 classes"),
        ("imagenet", 1000, "imagenet has no classes"),
        ("folder", 3, "3 classes: 'folder' has one way to count them"),
    ],
)
def test_ways_to_count(tmp_path, name, count, message):
    assert message in error(name, root=tmp_path, classes=count)


def test_annotations_of_another_size(tmp_path):
    publisher.ade20k(tmp_path, [1])
    path = tmp_path / "annotations" / "training" / "ADE_train_00000001.png"
    Image.new("L", (30, 40)).save(path)
    dataset = open_dataset("ade20k", root=tmp_path)
    assert torch.equal(dataset[0].annotation, torch.zeros(30, 40, dtype=torch.uint8))
    with pytest.raises(UserError, match="expected the size of its image"):
        dataset[1]


def test_a_split_that_should_be_there(tmp_path):
    (tmp_path / "JPEGImages").mkdir()
    hint = f"python -m nefkern.data check pascal_context --data-root {tmp_path} says what"
    with pytest.raises(UserError, match=f"train.txt in .*; {re.escape(hint)}"):
        open_dataset("pascal_context", root=tmp_path)
    with pytest.raises(UserError, match="split 'test'") as caught:
        open_dataset("pascal_context", root=tmp_path, split="test")
    assert "nefkern.data check" not in str(caught.value), "there is no such split"


# ---- Pascal VOC 2012 ----


@pytest.mark.parametrize("home", ["", "VOC2012", "VOCdevkit/VOC2012"])
def test_voc2012_in_both_ways_to_count(tmp_path, home):
    values = [0, 255, *VOC]
    publisher.voc2012(tmp_path, values, home)
    dataset = open_dataset("voc2012", root=tmp_path)
    assert classes_of(dataset, values) == {255: VOID, 0: 0, **{value: value for value in VOC}}
    assert {v: (dataset.classes[v], dataset.colours[v]) for v in VOC} == VOC
    objects = open_dataset("voc2012", root=tmp_path, classes=20)
    assert classes_of(objects, values) == {255: VOID, 0: VOID, **{v: v - 1 for v in VOC}}
    assert {v: (objects.classes[v - 1], objects.colours[v - 1]) for v in VOC} == VOC


def test_voc2012_s_splits_are_those_of_segmentation(tmp_path):
    publisher.voc2012(tmp_path, [1])
    assert open_dataset("voc2012", root=tmp_path).names == ["2007_000032", "2007_000039"]
    assert open_dataset("voc2012", root=tmp_path, split="val").names == ["2007_000033"]
    assert "expected train, val, trainval, and the file test.txt in" in error(
        "voc2012", root=tmp_path, split="test"
    )


# ---- COCO-Stuff ----


@pytest.mark.parametrize("home", ["", "dataset", "cocostuff"])
def test_cocostuff_s_labels_in_27_groups(tmp_path, home):
    values = [255, *(number - 1 for number in COCOSTUFF)]
    publisher.cocostuff(tmp_path / home, values)
    dataset = open_dataset("cocostuff", root=tmp_path)
    found = classes_of(dataset, values)
    assert found.pop(255) == VOID
    assert {v + 1: dataset.classes[c] for v, c in found.items()} == {
        number: group for number, (_, group) in COCOSTUFF.items()
    }
    assert set(found.values()) == set(range(27))
    assert dataset.classes.index("electronic") == 0
    assert dataset.classes.index("ceiling") == 12


def test_cocostuff_takes_the_usual_part_where_its_list_is(tmp_path):
    publisher.cocostuff(tmp_path, [0])
    assert len(open_dataset("cocostuff", root=tmp_path)) == 2
    assert open_dataset("cocostuff", root=tmp_path, split="val").names == ["000000000000"]
    shutil.rmtree(tmp_path / "curated")
    assert len(open_dataset("cocostuff", root=tmp_path)) == 3
    assert len(open_dataset("cocostuff", root=tmp_path, split="val")) == 2


# ---- Potsdam ----


def test_potsdam_of_pieces_that_others_cut(tmp_path):
    publisher.potsdam(tmp_path, [0, 1, 2, 3, 4, 5, 255])
    prepare_potsdam(tmp_path)
    three = open_dataset("potsdam", root=tmp_path)
    assert classes_of(three, [0, 1, 2, 3, 4, 5, 255]) == {
        0: 0, 4: 0, 1: 1, 5: 1, 2: 2, 3: 2, 255: VOID,
    }  # fmt: skip
    six = open_dataset("potsdam", root=tmp_path, classes=6, split="val")
    assert six.names == ["3"]
    assert classes_of(six, [0, 1, 2, 3, 4, 5, 255]) == {**{i: i for i in range(6)}, 255: VOID}
    assert three.names == ["0", "1", "2"]
    assert (three[2].annotation == VOID).all()  # of the unlabelled list
    assert six.colours[4] == (255, 255, 0)


def test_potsdam_of_the_publisher_s_pictures(tmp_path, monkeypatch):
    """Two by two pieces of 4 pixels in place of 15 by 15 of 400, and labels painted not quite as
    the publisher says, as one of the real files is."""
    monkeypatch.setattr(potsdam_module, "_SIDE", 4)
    monkeypatch.setattr(potsdam_module, "_ACROSS", 2)
    index = np.random.default_rng(0).integers(0, 6, (8, 9), np.uint8)  # a column too many
    painted = np.array(POTSDAM_COLOURS, np.uint8)[index]
    painted[painted == 255] = 252
    pixels = np.random.default_rng(1).integers(0, 255, (8, 9, 3), np.uint8)
    for part, array, end in (("2_Ortho_RGB", pixels, "RGB"), ("5_Labels_all", painted, "label")):
        (tmp_path / "Potsdam" / part).mkdir(parents=True)
        for name in ("2_10", "7_13"):
            path = tmp_path / "Potsdam" / part / f"top_potsdam_{name}_{end}.tif"
            Image.fromarray(array).save(path)
    prepare_potsdam(tmp_path)
    train = open_dataset("potsdam", root=tmp_path, classes=6)
    assert train.names == ["2_10_000", "2_10_001", "2_10_002", "2_10_003"]
    assert open_dataset("potsdam", root=tmp_path, split="val").names[0] == "7_13_000"
    piece = train[1]  # of the first row, the second
    assert piece.annotation.tolist() == index[:4:2, 4:8:2].tolist()
    mean = pixels[:4, 4:8].reshape(2, 2, 2, 2, 3).mean((1, 3))
    assert np.abs(piece.image.permute(1, 2, 0).numpy() - mean).max() <= 0.5


def test_potsdam_s_mistakes(tmp_path, monkeypatch):
    def told() -> str:
        with pytest.raises(UserError) as caught:
            prepare_potsdam(tmp_path)
        return str(caught.value)

    assert "expected 2_Ortho_RGB/*_RGB.tif or imgs/*.mat, none found; get 2_Ortho_RGB" in told()
    monkeypatch.setattr(potsdam_module, "_SIDE", 4)
    monkeypatch.setattr(potsdam_module, "_ACROSS", 2)
    picture = tmp_path / "2_Ortho_RGB" / "top_potsdam_2_10_RGB.tif"
    labels = tmp_path / "5_Labels_all" / "top_potsdam_2_10_label.tif"
    for path in (picture, labels):
        path.parent.mkdir()
    Image.new("RGB", (8, 7)).save(picture)
    assert "label.tif: these labels are missing" in told()
    Image.new("RGB", (8, 8)).save(labels)
    assert "RGB.tif: expected 8 pixels on each side, got 8 x 7 (1 of 1 files" in told()
    Image.new("RGB", (8, 8)).save(picture)
    assert "six colours of Potsdam's labels, pixel (0, 0) is (0, 0, 0)" in told()
    publisher.potsdam(tmp_path, [0, 6])
    assert "0.mat: expected labels 0 to 5, gt holds 6 (3 of 4 files not converted)" in told()
    (tmp_path / "gt" / "1.mat").write_bytes(b"MATLAB")
    assert "cannot read this .mat file" in told() or "gt holds 6" in told()
    (tmp_path / "labelled_test.txt").unlink()
    assert "labelled_test.txt: this list of pieces is missing" in told()
