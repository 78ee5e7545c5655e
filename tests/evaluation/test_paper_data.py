"""The paper's data sets: classes and windows by protocol, a run of its own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nefkern import train
from nefkern.evaluate import main
from tests.evaluation.command import failure, figures
from tests.evaluation.scenes import scene


@pytest.fixture
def cityscapes(tmp_path) -> Path:
    """Two splits in Cityscapes' layout; the labels are road, parking, car and ego vehicle."""
    for split in ("train", "val"):
        for n in range(2):
            image, mask = scene(90, 60, seed=n)
            frame = f"ulm_{n:06}_000019"
            for kind, suffix in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds")):
                folder = tmp_path / "data" / kind / split / "ulm"
                folder.mkdir(parents=True, exist_ok=True)
                picture = image if kind == "leftImg8bit" else mask.point([7, 9, 26, 1] + [0] * 252)
                picture.save(folder / f"{frame}_{suffix}.png")
    return tmp_path / "data"


def evaluate_cityscapes(run: Path, root: Path, *options: str) -> dict:
    before = set(run.glob("evaluation-*.json"))
    assert main([str(run), "--data", "cityscapes", "--data-root", str(root), *options]) == 0
    (written,) = set(run.glob("evaluation-*.json")) - before
    return json.loads(written.read_text("utf-8")) | {"name": written.name}


@pytest.mark.parametrize(
    ("options", "classes", "parking"),
    [
        (["--size", "48"], 27, True),
        (["--size", "48", "--classes", "19"], 19, False),
        (["--protocol", "sliding"], 19, False),
        (["--protocol", "sliding", "--classes", "27"], 27, True),
    ],
)
def test_classes_follow_the_protocol_unless_given(
    run, cityscapes, pointwise, options, classes, parking
):
    pointwise.patch = 16
    result = evaluate_cityscapes(run, cityscapes, *options)
    assert len(result["classes"]) == result["settings"]["classes"] == classes
    protocol = "sliding" if "sliding" in options else "crop320"
    assert result["name"] == f"evaluation-cityscapes-{classes}-val-{protocol}.json"
    met = {name for name, pixels in result["pixels"].items() if pixels}
    assert met == {"road", "car"} | ({"parking"} if parking else set())


@pytest.mark.parametrize(
    ("patch", "options", "expected"),
    [
        (16, [], (768, 512, 1024)),
        (14, [], (770, 518, 1024)),  # on the patch grid
        (16, ["--window", "60", "--resize", "80"], (60, 40, 80)),
        (16, ["--stride", "384"], (768, 384, 1024)),
        (16, ["--window", "60", "--stride", "50", "--resize", "none"], (60, 50, None)),
    ],
)
def test_sliding_windows_are_the_paper_s_unless_given(
    run, cityscapes, pointwise, patch, options, expected
):
    pointwise.patch = patch
    settings = evaluate_cityscapes(run, cityscapes, "--protocol", "sliding", *options)["settings"]
    assert (settings["window"], settings["stride"], settings["resize"]) == expected


def test_data_sets_that_cannot_be_scored(run, cityscapes, pointwise, tmp_path, capsys):
    asked = [run, "--data", "cityscapes", "--data-root", cityscapes]
    assert "cityscapes has 19 or 27 classes" in failure(capsys, *asked, "--classes", "20")
    (cityscapes / "gtFine" / "val").rename(tmp_path / "elsewhere")
    line = failure(capsys, *asked)
    assert "no annotations for split 'val'; get gtFine_trainvaltest.zip" in line
    (tmp_path / "net" / "train" / "n01440764").mkdir(parents=True)
    scene(80, 80, 0)[0].save(tmp_path / "net" / "train" / "n01440764" / "a.JPEG")
    asked = [run, "--data", "imagenet", "--data-root", tmp_path / "net", "--split", "train"]
    assert "imagenet is only to train on" in failure(capsys, *asked)


@pytest.mark.drawn
def test_a_run_on_a_paper_s_data_set(cityscapes, tmp_path, capsys):
    """Trained by the command and scored, K-means fitted on the training split."""
    out = tmp_path / "city"
    assert train.main([
        "--data", "cityscapes", "--data-root", str(cityscapes), "--out", str(out), "--crop", "64",
        "--resize", "64", "--backbone", "test_vit", "--weights", "random", "--k", "8", "-K", "6",
        "--epochs", "1", "--batch-size", "2", "--workers", "0", "--pictures", "1",
    ]) == 0  # fmt: skip
    result = evaluate_cityscapes(out, cityscapes, "--size", "48", "--methods", "ours,kmeans")
    assert list(result["methods"]) == ["ours", "kmeans"]
    assert figures(result, matching="count")["accuracy"] > 0.3
    assert main([str(out), "--size", "48", "--methods", "ours,kmeans"]) == 0
    assert len(list(out.glob("evaluation-*.json"))) == 1, "the run knows its data set"
    (scene_root := tmp_path / "other").mkdir()
    assert main([str(out), "--data-root", str(scene_root)]) == 2
    assert "expected Cityscapes, with the folder leftImg8bit" in capsys.readouterr().err
    drawn = out / Path(result["name"]).stem
    picture = np.array(Image.open(next(drawn.glob("000-image-annotation-*.png"))))
    annotation = {tuple(rgb) for rgb in picture[:48, 56:104].reshape(-1, 3).tolist()}
    road, parking, car = (128, 64, 128), (250, 170, 160), (0, 0, 142)
    assert annotation == {road, parking, car, (0, 0, 0)}, "as the publisher paints them"
    names = (drawn / "classes.svg").read_text("utf-8")
    assert "<!-- road -->" in names
    assert "<!-- train -->" not in names, "only what the pictures show"
    assert "classes.svg" in (out / "report.html").read_text("utf-8")


def test_a_run_on_data_without_annotations_asks_for_some(run, cityscapes, pointwise, capsys):
    config = run / "config.yaml"
    config.write_text(config.read_text("utf-8").replace("data: folder", "data: imagenet"), "utf-8")
    line = failure(capsys, run)
    assert "--data-root: expected the folder with the annotated images" in line
    assert "trained on imagenet" in line
