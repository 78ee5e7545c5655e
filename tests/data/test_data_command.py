"""python -m nefkern.data: check and prepare, what they print and how they end."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nefkern.data import BENCHMARKS, prepare
from nefkern.data.__main__ import main
from nefkern.data.prepare_potsdam import prepare_potsdam
from nefkern.data.tables.pascal_context import CLASSES
from tests.data import publisher

COUNTS = {
    "cityscapes": {"train": (2,), "val": (1,)},
    "ade20k": {"train": (2,), "val": (1,)},
    "pascal_context": {"train": (9, 2), "val": (1,)},
    "imagenet": {"train": (3,)},
    "voc2012": {"train": (2,), "val": (1,)},
    "cocostuff": {"train": (2,), "val": (1,)},
    "potsdam": {"train": (3,), "val": (1,)},
}


@pytest.fixture
def complete(monkeypatch):
    """The tiny data sets count as whole."""
    for name, counts in COUNTS.items():
        whole = dataclasses.replace(BENCHMARKS[name], counts=counts)
        monkeypatch.setitem(BENCHMARKS, name, whole)


@pytest.fixture
def run(capsys):
    """run(*arguments): exit code, output, the error line."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(errors) == (code == 2)
        assert "Traceback" not in err
        return code, out, "".join(errors)

    return call


def check(run, name, root, *options):
    return run("check", name, "--data-root", root, "--workers", 0, *options)


def build(name: str, root: Path) -> Path:
    if name == "imagenet":
        return publisher.imagenet(root)
    root = getattr(publisher, name)(root, [0, 3, 5] if name == "potsdam" else [2, 9, 13])
    if name == "pascal_context":
        prepare.prepare_pascal_context(root)
    if name == "potsdam":
        prepare_potsdam(root)
    return root


@pytest.mark.parametrize("name", COUNTS)
def test_complete(run, tmp_path, complete, name):
    code, out, _ = check(run, name, build(name, tmp_path))
    assert code == 0
    count = COUNTS[name]["train"][-1]
    assert f"train  {count} of {count} images, {0 if name == 'imagenet' else count} anno" in out
    assert "complete, every file is usable" in out
    code, out, _ = check(run, name, tmp_path, "--quick")
    assert code == 0
    assert "complete, files not read" in out


def test_the_real_counts(run, tmp_path):
    code, out, line = check(run, "cityscapes", build("cityscapes", tmp_path), "--quick")
    assert code == 2
    assert "train  2 of 2,975 images, 2 annotations" in out
    assert "val    1 of 500 images, 1 annotations" in out
    assert "get leftImg8bit_trainvaltest.zip from www.cityscapes-dataset.com" in out
    assert line == "error: cityscapes: 2 problems, listed above"
    known = {name: {s: c[0] for s, c in b.counts.items()} for name, b in BENCHMARKS.items()}
    assert known == {
        "pascal_context": {"train": 4998, "val": 5105},
        "cityscapes": {"train": 2975, "val": 500},
        "ade20k": {"train": 20210, "val": 2000},
        "imagenet": {"train": 1281167},
        "voc2012": {"train": 1464, "val": 1449},
        "cocostuff": {"train": 49629, "val": 2175},
        "potsdam": {"train": 5400, "val": 3150},
    }


def test_missing_annotations(run, tmp_path, complete):
    build("ade20k", tmp_path)
    (tmp_path / "annotations" / "training" / "ADE_train_00000001.png").unlink()
    code, out, _ = check(run, "ade20k", tmp_path)
    assert code == 2
    assert "train  2 of 2 images, 1 annotations" in out
    assert "1 of 2 annotations missing, such as" in out
    assert "ADEChallengeData2016.zip" in out


def test_pascal_context_before_prepare(run, tmp_path, complete):
    publisher.pascal_context(tmp_path, [2])
    code, out, _ = check(run, "pascal_context", tmp_path)
    assert code == 2
    assert "annotations missing, none in" in out
    assert "then python -m nefkern.data prepare pascal_context" in out
    (tmp_path / "VOCdevkit" / "VOC2010" / "JPEGImages" / "2008_000003.jpg").unlink()
    _, out, _ = check(run, "pascal_context", tmp_path, "--quick")
    assert "1 images, expected 2, such as" in out


def test_a_missing_split(run, tmp_path, complete):
    build("cityscapes", tmp_path)
    (tmp_path / "leftImg8bit" / "val").rename(tmp_path / "leftImg8bit" / "other")
    code, out, _ = check(run, "cityscapes", tmp_path)
    assert code == 2
    assert "no split 'val', there is: other, train" in out


@pytest.mark.parametrize("workers", [0, 1])
def test_files_are_read(run, tmp_path, complete, truncate, workers):
    build("ade20k", tmp_path)
    truncate(tmp_path / "images" / "training" / "ADE_train_00000000.jpg")
    publisher.write_labels(
        tmp_path / "annotations" / "training" / "ADE_train_00000001.png", [3, 200]
    )
    Image.new("L", (30, 40)).save(
        tmp_path / "annotations" / "validation" / "ADE_valid_00000000.png"
    )
    assert check(run, "ade20k", tmp_path, "--quick")[0] == 0
    code, out, line = run("check", "ade20k", "--data-root", tmp_path, "--workers", workers)
    assert code == 2
    assert "ADE_train_00000000.jpg: cannot read this image" in out
    assert "ADE_train_00000001.png: holds index 200" in out
    assert "ADE_valid_00000000.png: expected the size of its image" in out
    assert line == "error: ade20k: 3 problems, listed above"


def test_images_without_annotations_are_read_to_the_end(run, tmp_path, complete, truncate):
    build("imagenet", tmp_path)
    truncate(tmp_path / "train" / "n02119789" / "n02119789_1.JPEG")
    code, out, _ = check(run, "imagenet", tmp_path)
    assert code == 2
    assert "n02119789_1.JPEG: cannot read this image" in out


def test_a_folder_of_one_s_own(run, tmp_path):
    for split, count in (("train", 2), ("val", 1)):
        for n in range(count):
            publisher.write_image(tmp_path / "images" / split / f"{n}.jpg", n)
            publisher.write_labels(tmp_path / "annotations" / split / f"{n}.png", [0, 1, 255])
    (tmp_path / "classes.txt").write_text("wall\ndoor\n")
    code, out, _ = check(run, "folder", tmp_path)
    assert code == 0
    assert "train  2 images, 2 annotations" in out
    assert "val    1 images, 1 annotations" in out
    assert "complete, every file is usable" in out
    publisher.write_labels(tmp_path / "annotations" / "train" / "1.png", [0, 2])
    assert check(run, "folder", tmp_path, "--quick")[0] == 0
    (tmp_path / "annotations" / "val" / "0.png").unlink()
    code, out, line = check(run, "folder", tmp_path)
    assert code == 2
    assert "1.png: holds index 2" in out
    assert "expected an annotation for every image, 1 of 1 missing" in out
    assert line == "error: folder: 2 problems, listed above"


def binary(root: Path, values: list[int], names: str = "ground\nobject\n") -> Path:
    """Two images with masks of columns of these values."""
    for n in range(2):
        publisher.write_image(root / "images" / "val" / f"{n}.jpg", n)
        publisher.write_labels(root / "annotations" / "val" / f"{n}.png", values)
    (root / "classes.txt").write_text(names)
    return root


def test_masks_of_0_and_255(run, tmp_path):
    code, out, line = check(run, "folder", binary(tmp_path, [0, 255]))
    assert code == 2
    assert "val: no pixel is object (1), but 50% of the pixels are 255, which is void" in out
    assert "write its index instead (object: 1)" in out
    assert line == "error: folder: 1 problems, listed above"
    assert check(run, "folder", tmp_path, "--quick")[0] == 0


def test_a_class_that_occurs_nowhere_is_noted(run, tmp_path):
    names = "".join(f"{letter}\n" for letter in "abcdefgh")
    code, out, _ = check(run, "folder", binary(tmp_path / "no void", [0, 3], names))
    assert code == 0
    assert "    note: no pixel is b (1), c (2), e (4), f (5), g (6) and 1 more\n" in out
    code, out, _ = check(run, "folder", binary(tmp_path / "void", [0, 3, 255, 255], "a\nb\nc\nd"))
    assert code == 0
    assert "    note: no pixel is b (1), c (2), but 50% of the pixels are 255" in out


def test_masks_that_say_nothing(run, tmp_path):
    code, out, _ = check(run, "folder", binary(tmp_path / "all", [255]))
    assert code == 2
    assert "val: every annotated pixel is void (255)" in out
    root = binary(tmp_path / "one", [0, 1])
    publisher.write_labels(root / "annotations" / "val" / "1.png", [255])
    code, out, _ = check(run, "folder", root)
    assert code == 0
    assert "note: 1 of 2 annotations are void throughout, such as " in out
    assert "1.png" in out
    assert "no pixel" not in out


def test_a_void_of_the_publisher_s_is_no_class(run, tmp_path, complete):
    """ADE20K's void is index 0: nothing is said of 255."""
    _, out, _ = check(run, "ade20k", build("ade20k", tmp_path))
    assert "note: no pixel is wall" in out or "note: no pixel is building" in out
    assert "255" not in out.replace(str(tmp_path), "")  # a folder of many runs may be called so


def test_images_in_folders_inside_are_noted(run, tmp_path):
    root = binary(tmp_path, [0, 1])
    publisher.write_image(root / "images" / "val" / "x.jpg" / "deep" / "a.jpg")
    (root / "images" / "val" / "empty").mkdir()
    code, out, _ = check(run, "folder", root)
    assert code == 0
    assert f"note: {root}/images/val: the images in folders inside are not taken: x.jpg\n" in out


def test_a_folder_of_images_alone(run, tmp_path, truncate):
    publisher.write_image(tmp_path / "a.jpg")
    truncate(publisher.write_image(tmp_path / "b.jpg", 1))
    code, out, _ = check(run, "folder", tmp_path)
    assert code == 2
    assert "all    2 images, 0 annotations" in out
    assert "b.jpg: cannot read this image" in out
    assert "does not exist" in check(run, "folder", tmp_path / "gone")[2]


def test_names_do_not_move_the_cursor(run, tmp_path):
    (tmp_path / "a\x1b[2J.jpg").write_bytes(b"no image")
    code, out, _ = check(run, "folder", tmp_path)
    assert code == 2
    assert "\x1b" not in out
    assert r"a\x1b[2J.jpg: expected an image" in out


def test_help_shows_what_belongs_where(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    for name in (*BENCHMARKS, "folder", "leftImg8bit", "gtFine_labelIds", "trainval/*.mat"):
        assert name in out


def test_mistakes_are_one_line(run, tmp_path):
    assert "expected ADE20K" in check(run, "ade20k", tmp_path)[2]
    assert "does not exist" in check(run, "ade20k", tmp_path / "gone")[2]
    assert "invalid choice: 'coco'" in check(run, "coco", tmp_path)[2]
    assert "--workers -1" in run("check", "ade20k", "--data-root", tmp_path, "--workers", "-1")[2]
    assert "invalid choice: 'ade20k'" in run("prepare", "ade20k", "--data-root", tmp_path)[2]
    assert "--data-root" in run("check", "ade20k")[2]


# ---- prepare ----


@pytest.fixture
def voc(tmp_path) -> Path:
    return publisher.pascal_context(tmp_path, [2, 1, 458])


def converted(root: Path) -> dict[str, np.ndarray]:
    folder = root / "VOCdevkit" / "VOC2010" / "SegmentationClassContext"
    return {path.name: np.array(Image.open(path)) for path in sorted(folder.iterdir())}


def do_prepare(run, root):
    return run("prepare", "pascal_context", "--data-root", root)


def test_prepare_writes_index_images(run, voc):
    code, out, _ = do_prepare(run, voc)
    assert code == 0
    assert "written: " in out
    files = converted(voc)
    assert list(files) == ["2008_000002.png", "2008_000003.png", "2008_000007.png"]
    for index in files.values():
        assert np.array_equal(index, publisher.labels_of([1, 0, 59]))


def test_prepare_goes_on_where_it_was_interrupted(run, voc, monkeypatch):
    read, done = prepare.read_label_map, []

    def interrupted(path):
        if done:
            raise KeyboardInterrupt
        done.append(path)
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "read_label_map", interrupted)
        assert do_prepare(run, voc)[0] == 130
    folder = voc / "VOCdevkit" / "VOC2010" / "SegmentationClassContext"
    (folder / ".2008_000003.png.1.part").write_bytes(b"half")
    (first,) = folder.glob("*.png")
    before = first.stat().st_mtime_ns
    assert do_prepare(run, voc)[0] == 0
    assert first.stat().st_mtime_ns == before
    assert list(converted(voc)) == ["2008_000002.png", "2008_000003.png", "2008_000007.png"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b"no mat file" * 50), "cannot read this .mat file"),
        (lambda path: path.write_bytes(b""), "cannot read this .mat file"),
        (lambda path: path.write_bytes(path.read_bytes()[:150]), "cannot read this .mat file"),
        (lambda path: publisher.write_mat(path, [2], "Other"), "expected the variable LabelMap"),
        (lambda path: publisher.write_mat(path, [2, 460]), "LabelMap holds 460"),
        (lambda path: publisher.write_mat(path, [-1], dtype=np.int16), "LabelMap holds -1"),
        (lambda path: publisher.write_mat(path, [2], dtype=np.complex64), "got complex64"),
    ],
)
def test_a_bad_mat_file_is_named_and_stops_no_other(run, voc, damage, message):
    damage(voc / "trainval" / "2008_000003.mat")
    code, _, line = do_prepare(run, voc)
    assert code == 2
    assert "2008_000003.mat: " in line
    assert message in line
    assert "(1 of 3 files not converted)" in line
    assert list(converted(voc)) == ["2008_000002.png", "2008_000007.png"]


def test_the_publisher_s_label_list_decides(run, voc):
    names = {label: f"thing {label}" for label in range(1, 460)}
    names.update((label, name) for name, label in CLASSES)
    names[2], names[5] = names[5], names[2]  # as if aeroplane were label 5
    lines = "".join(f"{label}: {name}\n" for label, name in names.items())
    (voc / "labels.txt").write_text(lines)
    assert do_prepare(run, voc)[0] == 0
    assert np.array_equal(converted(voc)["2008_000002.png"], publisher.labels_of([0, 0, 59]))


def test_another_label_list(run, voc):
    (voc / "trainval" / "labels.txt").write_text("1: accordion\n2: aeroplane\n")
    code, _, line = do_prepare(run, voc)
    assert code == 2
    assert "labels.txt: expected 459 lines" in line
    assert "bag, bed, bedclothes ..." in line


def test_no_mat_files(run, voc):
    for path in (voc / "trainval").iterdir():
        path.unlink()
    code, _, line = do_prepare(run, voc)
    assert code == 2
    assert "expected *.mat files, none found; get trainval.tar.gz" in line
