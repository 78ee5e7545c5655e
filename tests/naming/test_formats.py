"""segment --names, and its annotations read back by the tools' own readers."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nefkern.data import read_image
from nefkern.naming.choices import FORMATS
from nefkern.naming.formats import WRITERS, Annotated, voc_colours
from nefkern.naming.names import read_names
from nefkern.segment import main
from nefkern.segmentation.listing import image_files, output_names
from nefkern.segmentation.segmenter import Segmenter

CLASSES = ["road & <b>", "sky"]
MIN_AREA = 40


def pixels(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


@pytest.fixture
def written(run, pictures, names, tmp_path):
    """written("coco"): what the command wrote of photographs in a folder of the given folder."""
    pytest.importorskip("skimage")
    pytest.importorskip("pycocotools")

    def write(formats: str) -> Path:
        out, images = tmp_path / "out", tmp_path / "photos"
        shutil.copytree(pictures, images / "trip")
        more = ["--formats", formats, "--min-area", str(MIN_AREA), "--recursive"]
        arguments = [str(run), str(images), "--out", str(out), "--names", str(names), *more]
        assert main(arguments) == 0
        return out

    return write


def test_writers_are_those_the_help_lists():
    assert list(WRITERS) == list(FORMATS)


@pytest.mark.parametrize("options", [[], ["--sliding"], ["--crf"]])
def test_classes_are_those_of_the_clusters(run, pictures, names, tmp_path, options):
    if "--crf" in options:
        pytest.importorskip("pydensecrf")
    out, plain, image = tmp_path / "out", tmp_path / "plain", str(pictures / "large.png")
    assert main([str(run), image, "--out", str(out), "--names", str(names), *options]) == 0
    assert main([str(run), image, "--out", str(plain), *options]) == 0
    clusters = pixels(plain / "large.clusters.png")
    assert np.array_equal(pixels(out / "large.classes.png"), read_names(names).class_of()[clusters])
    assert sorted(p.name for p in out.iterdir()) == [
        "classes.legend.png", "classes.txt", "large.classes.png", "large.confidence.png",
        "large.overlay.png",
    ]  # fmt: skip
    assert (out / "classes.txt").read_text("utf-8").splitlines() == CLASSES
    shown = np.array(Image.open(out / "large.classes.png").convert("RGB"))
    sky = pixels(out / "large.classes.png") == 1
    if sky.any():
        assert (shown[sky] == [0, 128, 255]).all()


def test_confidence_is_the_classes_probability(run, pictures, names, tmp_path):
    """Where patches are certain it is high; summed over all classes it would be 1 everywhere."""
    image = pictures / "large.png"
    assert main([str(run), str(image), "--out", str(tmp_path / "o"), "--names", str(names)]) == 0
    found = pixels(tmp_path / "o" / "large.confidence.png") / 255.0
    classes = pixels(tmp_path / "o" / "large.classes.png")
    segmenter = Segmenter.load(run, "cpu")
    predict, image_pixels, *_ = segmenter.at_training_scale(read_image(image))
    logits, _ = predict(image_pixels[None])
    shares = segmenter.probabilities(logits[0].float())
    table = read_names(names).class_of()
    for label in np.unique(classes):
        coarse = shares[np.flatnonzero(table == label)].sum(0)
        inside = found[classes == label]
        assert coarse.min() - 0.003 <= inside.min()
        assert inside.max() <= coarse.max() + 0.003
    assert found.max() > found.min()


def test_coco_is_read_by_pycocotools(written):
    """Areas and boxes are the pixels'; runs are exact, polygons nearly."""
    COCO = pytest.importorskip("pycocotools.coco").COCO
    out = written("coco,coco-rle")
    for file, least in (("coco.json", 0.9), ("coco-rle.json", 1.0)):
        coco = COCO(str(out / file))
        assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == CLASSES
        assert len(coco.getImgIds()) == 3
        for image in coco.loadImgs(coco.getImgIds()):
            assert image["file_name"] in ("trip/wide.png", "trip/tall.jpg", "trip/large.png")
            name = Path(image["file_name"]).with_suffix("")
            classes = pixels(out / f"{name}.classes.png")
            assert classes.shape == (image["height"], image["width"])
            drawn = np.full_like(classes, 255)
            for annotation in coco.loadAnns(coco.getAnnIds(image["id"])):
                mask = coco.annToMask(annotation).astype(bool)
                drawn[mask] = annotation["category_id"] - 1
                if least == 1:
                    assert annotation["area"] == mask.sum() >= MIN_AREA
                    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
                    box = [cols[0], rows[0], np.ptp(cols) + 1, np.ptp(rows) + 1]
                    assert annotation["bbox"] == box
            assert (drawn == classes).mean() >= least


def test_labelme_is_read_by_labelme(written, monkeypatch):
    monkeypatch.setenv("QT_QPA_PLATFORM", "offscreen")
    out = written("labelme")
    files = sorted(out.glob("labelme/trip/*.json"))
    assert [f.name for f in files] == ["large.json", "tall.json", "wide.json"]
    reader = pytest.importorskip("labelme._label_file", exc_type=ImportError)
    for file in files:
        label = reader.read_label_file(str(file))
        classes = pixels(out / "trip" / f"{file.stem}.classes.png")
        assert label.image_data  # found beside
        drawn = np.full_like(classes, 255)
        for shape in label.shapes:
            from labelme.utils import shape_to_mask

            drawn[shape_to_mask(classes.shape, shape["points"], "polygon")] = CLASSES.index(
                shape["label"]
            )
        assert (drawn == classes).mean() > 0.85


def test_cvat_is_read_by_datumaro(written, tmp_path):
    datumaro = pytest.importorskip("datumaro")
    out = written("cvat")
    os.symlink(tmp_path / "photos", out / "images")
    found = datumaro.Dataset.import_from(str(out / "cvat.xml"), "cvat")
    assert_masks(found, out)


def test_voc_is_read_by_datumaro(written):
    datumaro = pytest.importorskip("datumaro")
    out = written("voc")
    for reader in ("voc_instance_segmentation", "voc_segmentation"):
        found = datumaro.Dataset.import_from(str(out / "voc"), reader)
        assert_masks(found, out)
    boxes = datumaro.Dataset.import_from(
        str(out / "voc"), "voc_detection", coordinate_mode="voc-one-based"
    )
    for item in boxes:
        classes = pixels(out / f"{item.id}.classes.png")
        labels = boxes.categories()[datumaro.AnnotationType.label]
        for box in item.annotations:
            x, y, w, h = map(int, box.get_bbox())
            label = CLASSES.index(labels[box.label].name)
            inside = classes[y : y + h, x : x + w] == label
            assert inside[0].any()
            assert inside[-1].any()
            assert inside[:, 0].any()
            assert inside[:, -1].any()


def assert_masks(dataset, out: Path) -> None:
    """The masks of every image are its classes."""
    import datumaro

    labels = dataset.categories()[datumaro.AnnotationType.label]
    assert len(dataset) == 3
    for item in dataset:
        classes = pixels(out / f"{item.id}.classes.png")
        drawn = np.full_like(classes, 255)
        for annotation in item.annotations:
            if annotation.type != datumaro.AnnotationType.mask:
                continue
            name = labels[annotation.label].name
            if name != "background":
                drawn[annotation.image.astype(bool)] = CLASSES.index(name)
        assert np.array_equal(drawn, classes)


def test_what_was_written_is_not_read_again(run, pictures, names, tmp_path):
    """Also where it lies among the photographs, in folders that are called as an image is."""
    pytest.importorskip("skimage")
    pytest.importorskip("pycocotools")
    folder = tmp_path / "photos"
    folder.mkdir()
    shutil.copy(pictures / "wide.png", folder / "coco.png")
    more = ["--formats", ",".join(FORMATS), "--names", str(names), "--recursive"]
    for _ in range(2):
        assert main([str(run), str(folder), "--out", str(folder), *more]) == 0
        assert image_files([folder], recursive=True) == [folder / "coco.png"]
    assert len(json.loads((folder / "coco.json").read_text("utf-8"))["images"]) == 1
    assert (folder / "labelme" / "coco.json").exists()


def test_masks_of_a_killed_run_are_not_read_again(tmp_path):
    """It has not come to what is written of all images."""
    image = tmp_path / "wide.png"
    Image.new("RGB", (4, 3)).save(image)
    voc = WRITERS["voc"](tmp_path, ["sky"], np.zeros((1, 3), np.uint8))
    voc.add(Annotated(image, "wide", np.zeros((3, 4), np.uint8), []))
    assert (tmp_path / "voc" / "SegmentationClass" / "wide.png").exists()
    assert image_files([tmp_path], recursive=True) == [image]


@pytest.mark.parametrize(("format", "file"), [("coco", "coco.json"), ("cvat", "cvat.xml")])
def test_images_of_one_name_in_several_folders_are_told_apart(tmp_path, format, file):
    files = [Path(f"{folder}/x.jpg") for folder in "ab"] + [Path("a/y.png")]
    writer = WRITERS[format](tmp_path, ["sky"], np.zeros((1, 3), np.uint8))
    for image, name in zip(files, output_names(files), strict=True):
        writer.add(Annotated(image, name, np.zeros((3, 4), np.uint8), []))
    writer.finish()
    text = (tmp_path / file).read_text("utf-8")
    assert all(text.count(f'"{name}"') == 1 for name in ("x.jpg", "b/x.jpg", "y.png"))


def test_a_name_of_two_lines_is_not_two_names(tmp_path, caplog):
    voc = WRITERS["voc"](tmp_path, ["sky"], np.zeros((1, 3), np.uint8))
    for name in ("a b", "two\nlines", "-ü"):
        voc.add(Annotated(Path(f"{name}.png"), name, np.zeros((3, 4), np.uint8), []))
    voc.finish()
    for task in ("Segmentation", "Main"):
        assert (tmp_path / "voc/ImageSets" / task / "default.txt").read_text("utf-8") == "a b\n-ü\n"
    assert "left out of voc/ImageSets" in caplog.text


def test_voc_colours_are_the_publishers():
    assert voc_colours()[[0, 1, 2, 3, 15, 255]].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [192, 128, 128], [224, 224, 192],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--formats", "coco"], "--formats coco: expected --names FILE beside it"),
        (["--min-area", "9"], "--min-area 9: expected --names FILE beside it"),
        (["--min-area", "-1"], "--min-area -1: expected 0 or more pixels"),
        (["--names", "x.yaml", "--classes", "4"], "--classes 4: expected none with --names"),
        (["--names", "no.yaml"], "no.yaml: no such file; python -m nefkern.atlas"),
        (["--names", "NAMES", "--formats", "coco,yolo"], "--formats 'yolo': expected some of coco"),
    ],
)
def test_mistakes_are_one_line(run, pictures, names, tmp_path, capsys, options, line):
    options = [str(names) if option == "NAMES" else option for option in options]
    out = tmp_path / "o"
    assert main([str(run), str(pictures), "--out", str(out), *options]) == 2
    assert line in capsys.readouterr().err
    assert not out.exists()


def test_names_of_another_run_are_refused(run, pictures, names, tmp_path, capsys):
    names.write_text(names.read_text("utf-8").replace("checkpoint: ", "checkpoint: other"), "utf-8")
    arguments = [str(run), str(pictures), "--out", str(tmp_path / "o"), "--names", str(names)]
    assert main(arguments) == 2
    assert "checkpoint: names the clusters of another training" in capsys.readouterr().err


def test_classes_of_a_data_set_are_not_replaced(run, pictures, names, tmp_path, capsys):
    (tmp_path / "classes.txt").write_text("mine")
    command = [str(run), str(pictures), "--names", str(names), "--out"]
    assert main([*command, str(tmp_path)]) == 2
    assert "would replace classes.txt" in capsys.readouterr().err
    assert (tmp_path / "classes.txt").read_text("utf-8") == "mine"
    for _ in range(2):
        assert main([*command, str(tmp_path / "out")]) == 0


def test_a_name_that_voc_cannot_hold(run, pictures, names, tmp_path, capsys):
    pytest.importorskip("skimage")
    pytest.importorskip("pycocotools")
    names.write_text(names.read_text("utf-8").replace("sky", "sky:blue"), "utf-8")
    arguments = [str(run), str(pictures), "--out", str(tmp_path / "o"), "--names", str(names)]
    assert main([*arguments, "--formats", "voc"]) == 2
    assert "--formats voc: the name 'sky:blue' cannot stand in" in capsys.readouterr().err
    assert main([*arguments, "--formats", "coco"]) == 0
    assert json.loads((tmp_path / "o" / "coco.json").read_text("utf-8"))["categories"][1]["name"]
