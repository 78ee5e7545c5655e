"""The evaluate command: the files it writes, mistakes told in a line, help."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from PIL import Image

from nefkern.evaluate import parser
from nefkern.evaluation.records import free_name
from nefkern.runtime.files import replace_file
from nefkern.runtime.tensor_files import packed
from nefkern.training.runs import Run
from tests.evaluation.command import evaluate, failure
from tests.evaluation.scenes import CLASSES, scene, write_folder

# ---- files ----


def test_pictures_beside_the_scores(run, folder, pointwise):
    evaluate(run, folder, "--methods", "ours,ours*", "--pictures", "3")
    (drawn,) = (path for path in run.glob("evaluation-*") if path.is_dir())
    names = sorted(path.name for path in drawn.iterdir())
    assert names[:3] == [f"{i:03d}-image-annotation-ours-ours_.png" for i in range(3)]
    assert names[3:] == ["classes.svg", "confusion-ours.svg", "confusion-ours_.svg", "iou.svg"]
    page = (run / "report.html").read_text("utf-8")
    assert all(f"{drawn.name}/{name}" in page for name in names)
    evaluate(run, folder, "--methods", "ours,ours*", "--pictures", "0")
    assert sorted(path.name for path in drawn.iterdir()) != names


def test_only_the_same_settings_overwrite(run, folder, pointwise):
    for options in ([], ["--seed", "1"], [], ["--seed", "1"], ["--protocol", "sliding"]):
        evaluate(run, folder, *options)
    names = sorted(p.name for p in run.glob("evaluation-*.json"))
    assert names == [
        "evaluation-scenes-val-crop320-2.json",
        "evaluation-scenes-val-crop320.json",
        "evaluation-scenes-val-sliding.json",
    ]


def test_the_file_name_tells_what_is_ignored(run, folder, pointwise):
    ignored = CLASSES[0]
    evaluate(run, folder, "--ignore-class", ignored)
    assert [p.name for p in run.glob("evaluation-*.json")] == [
        f"evaluation-scenes-val-crop320-without-{ignored}.json"
    ]


def test_many_ignored_classes_fit_into_a_file_name(tmp_path):
    """The name is as long as a file system takes it, and lists that begin alike are told apart."""
    every = [f"class {i} of ours" for i in range(60)]
    settings = {"data_root": "voc", "split": "val", "protocol": "crop320", "ignored": every[:50]}
    first = free_name(tmp_path, settings)
    replace_file(first, json.dumps({"settings": settings}))
    assert free_name(tmp_path, settings) == first
    assert free_name(tmp_path, settings | {"ignored": every}) != first


def test_a_damaged_file_is_left_alone(run, folder, pointwise):
    damaged = run / "evaluation-scenes-val-crop320.json"
    damaged.write_text("{")
    evaluate(run, folder)
    assert damaged.read_text("utf-8") == "{"
    assert (run / "evaluation-scenes-val-crop320-2.json").exists()
    assert "not readable" in (run / "report.html").read_text("utf-8")


# ---- mistakes ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "kmean"], "probe, hidden, untrained, linear-probe; got 'kmean'"),
        (["--fit-passes", "0"], "--fit-passes 0: expected at least 1"),
        (["--fit-images", "plain", "--fit-passes", "2"], "--fit-passes: only for --fit-images"),
        (["--limit", "0"], "--limit 0: expected at least 1"),
        (["--pictures", "-1"], "--pictures -1: expected 0 or more"),
        (["--merge", "0"], "--merge 0: expected at least 1"),
        (["--bootstrap", "-1"], "--bootstrap -1: expected 0 or more"),
        (["--cross-match", "-1"], "--cross-match -1: expected 0 or more"),
        (["--seed", "-1"], "argument --seed: expected a number from 0"),
        (["--size", "9"], "--size 9: expected at least 16, a patch"),
        (["--protocol", "sliding", "--window", "9"], "--window 9: expected at least 16, a patch"),
        (["--protocol", "sliding", "--resize", "9"], "--resize 9: expected at least 16, a patch"),
        (["--protocol", "sliding", "--resize", "-9"], "--resize -9: expected at least 1, or none"),
        (["--resize", "big"], "argument --resize: expected pixels or none, got 'big'"),
        (["--window", "64"], "--window, --stride, --resize: only for --protocol sliding"),
        (["--resize", "64"], "--window, --stride, --resize: only for --protocol sliding"),
        (["--protocol", "sliding", "--stride", "999"], "--stride 999: expected at most the window"),
        (["--split", "test"], "no split 'test', there is: train, val"),
        (["--baseline", "kmeans", "--fit-split", "test"], "no split 'test'"),
        (["--ignore-class", "pink"], "ignored class 'pink'"),
        ([f"--ignore-class={c}" for c in CLASSES], "--ignore-class: every class is ignored"),
        (["--data", "samples"], "invalid choice: 'samples'"),
        (["--device", "cuda:77"], "--device cuda:77: not usable"),
        (["--protocol", "tiles"], "invalid choice: 'tiles'"),
        (["--crf", "--crf-workers", "-1"], "--crf-workers -1: expected 0 to 256"),
        (["--crf", "--crf-workers", "999"], "--crf-workers 999: expected 0 to 256"),
        (["--edges", "sharp"], "--edges sharp: expected some of bilinear,graph,crf"),
        (["--crf-workers", "2"], "--crf-workers 2: expected --crf, or --edges crf, beside it"),
    ],
)
def test_mistaken_options_are_one_line(run, folder, capsys, options, message):
    line = failure(capsys, run, "--data-root", folder, *options)
    assert message in line


def test_no_run_there(folder, tmp_path, capsys):
    line = failure(capsys, tmp_path / "nothing", "--data-root", folder)
    assert "nothing: not a run folder" in line


def test_a_checkpoint_of_another_version(run, folder, capsys):
    weights, metadata = Run(run).load()
    weights.pop(next(iter(weights)))
    (run / "checkpoint.safetensors").write_bytes(packed(weights, metadata))
    assert "does not fit this version" in failure(capsys, run, "--data-root", folder)


def test_no_annotations(run, folder, tmp_path, capsys):
    (tmp_path / "bare" / "images" / "val").mkdir(parents=True)
    scene(80, 80, 0)[0].save(tmp_path / "bare" / "images" / "val" / "a.png")
    line = failure(capsys, run, "--data-root", tmp_path / "bare")
    assert "no annotations for split 'val'" in line


def test_an_image_smaller_than_a_patch_is_named(run, tmp_path, capsys):
    root = write_folder(tmp_path / "small", {"val": 1})
    Image.new("RGB", (9, 30)).save(root / "images" / "val" / "0.png")
    Image.new("L", (9, 30)).save(root / "annotations" / "val" / "0.png")
    line = failure(capsys, run, "--data-root", root, "--protocol", "sliding")
    assert "at least one patch" in line
    assert line.startswith(f"error: {root / 'images' / 'val' / '0.png'}:")


def test_help_teaches_and_is_light():
    text = parser().format_help()
    assert "examples:" in text
    assert "K-means on the graph features" in text
    assert "--crf-workers N" in text
    code = "import nefkern.evaluate as e, sys; e.parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
