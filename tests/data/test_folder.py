"""A folder of the user's own: layouts, classes, and every way to get it wrong."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from nefkern.data import VOID, open_dataset
from nefkern.runtime.errors import UserError


def open_folder(root, **options):
    return open_dataset("folder", root=root, **{"split": "train", **options})


def error(root, **options) -> str:
    """The one line that opening ``root`` and reading all of it ends in."""
    with pytest.raises(UserError) as caught:
        list(open_folder(root, **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_splits_with_annotations(annotated_folder, picture):
    dataset = open_folder(annotated_folder, split="val")
    assert dataset.annotated
    assert dataset.classes == ["sky", "tree", "road sign"]
    assert dataset.names == ["val0", "val1"]
    assert len(dataset) == 2
    for number, sample in enumerate(dataset):
        assert sample.name == f"val{number}"
        assert np.array_equal(sample.image.permute(1, 2, 0), picture(40, 30, phase=number))
        assert sample.annotation.shape == (30, 40)
        assert sample.annotation[0].eq(VOID).all()
        assert sample.annotation[1].tolist() == [(40 + x) % 3 for x in range(40)]


def test_split_without_annotations(annotated_folder):
    shutil.rmtree(annotated_folder / "annotations" / "train")
    dataset = open_folder(annotated_folder)
    assert not dataset.annotated
    assert dataset[0].annotation is None
    assert dataset.classes == ["sky", "tree", "road sign"]


@pytest.mark.parametrize("split", ["train", "anything"])
def test_plain_folder_is_all_of_every_split(images_folder, split):
    (images_folder / "notes.txt").write_text("no image")
    (images_folder / "._a.jpg").write_bytes(b"what some systems leave beside files")
    dataset = open_folder(images_folder, split=split)
    assert dataset.names == list("abcdefg")
    assert dataset.classes == []
    assert not dataset.annotated


def test_images_without_splits(annotated_folder):
    for kind in ("images", "annotations"):
        flat = annotated_folder / "flat" / kind
        shutil.copytree(annotated_folder / kind / "val", flat)
    shutil.copy(annotated_folder / "classes.txt", annotated_folder / "flat")
    dataset = open_folder(annotated_folder / "flat")
    assert dataset.names == ["val0", "val1"]
    assert dataset[1].annotation is not None


def test_suffixes_of_any_case_and_shared_stems(tmp_path, picture):
    picture(10, 10).save(tmp_path / "a.png")
    picture(10, 10).save(tmp_path / "a.jpg")
    picture(10, 10).save(tmp_path / "B.PNG")
    assert open_folder(tmp_path).names == ["B", "a.jpg", "a.png"]


@pytest.mark.parametrize("ignored", [["sky"], [0], ["0"], ["sky", 0]])
def test_ignored_class_becomes_void(annotated_folder, ignored):
    kept = open_folder(annotated_folder)[0].annotation
    dataset = open_folder(annotated_folder, ignore_classes=ignored)
    labels = dataset[0].annotation
    assert dataset.ignored == [0]
    assert dataset.classes[0] == "sky"  # indices of the others stay
    assert torch.equal(labels, torch.where(kept == 0, VOID, kept))
    assert (labels == VOID).sum() > (kept == VOID).sum()


@pytest.mark.parametrize("ignored", ["lamp", 3, -1, "-1", "255"])
def test_unknown_ignored_class(annotated_folder, ignored):
    message = error(annotated_folder, ignore_classes=[ignored])
    assert repr(ignored) in message
    assert "sky, tree, road sign" in message


def test_ignored_class_without_classes(images_folder):
    assert "no classes" in error(images_folder, ignore_classes=["sky"])


def test_root_is_needed_and_must_be_a_folder(images_folder):
    assert "data root" in error(None)
    assert "does not exist" in error(images_folder / "gone")
    assert "it is a file" in error(images_folder / "a.jpg")


def test_unknown_data_set_lists_the_known():
    with pytest.raises(UserError, match=r"samples, folder.*'imagenet22k'"):
        open_dataset("imagenet22k")


def test_missing_split_says_which_exist(annotated_folder):
    message = error(annotated_folder, split="test")
    assert "'test'" in message
    assert "train, val" in message


def test_empty_folders(tmp_path, annotated_folder):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "none found" in error(empty)
    (empty / "holiday").mkdir()
    assert "holiday" in error(empty)
    for path in (annotated_folder / "images" / "val").iterdir():
        path.unlink()
    assert "none found" in error(annotated_folder, split="val")


@pytest.mark.parametrize("layout", ["plain", "split"])
def test_images_in_folders_inside_are_told_once(tmp_path, picture, caplog, layout):
    folder = tmp_path if layout == "plain" else tmp_path / "images" / "train"
    (folder / "a.jpg" / "b").mkdir(parents=True)
    (folder / "empty").mkdir()
    (folder / ".hidden").mkdir()
    for name in ("c.png", "a.jpg/b/d.png", ".hidden/e.png"):
        picture(10, 10).save(folder / name)
    for _ in range(2):
        assert open_folder(tmp_path).names == ["c"]
    (record,) = caplog.records
    assert record.message == f"{folder}: the images in folders inside are not taken: a.jpg"


def test_missing_annotations_are_counted(annotated_folder):
    (annotated_folder / "annotations" / "train" / "train1.png").unlink()
    message = error(annotated_folder)
    assert "train1.png" in message
    assert "1 of 3 missing" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "annotations need this file"),
        ("", "the file is empty"),
        (" \n\n", "the file is empty"),
        ("sky\n\nroad\n", "line 2 is empty"),
        ("sky\nroad\nsky\n", "repeated: sky"),
        ("\n".join(map(str, range(256))), "at most 255"),
    ],
)
def test_bad_class_names(annotated_folder, text, expected):
    path = annotated_folder / "classes.txt"
    path.unlink() if text is None else path.write_text(text)
    message = error(annotated_folder)
    assert "classes.txt" in message
    assert expected in message


def test_class_names_that_are_no_text(annotated_folder):
    (annotated_folder / "classes.txt").write_bytes(b"\xff\xfe\x00sky")
    assert "UTF-8" in error(annotated_folder)


def test_class_names_with_byte_order_mark_and_crlf(annotated_folder):
    (annotated_folder / "classes.txt").write_bytes("\ufeffciel\r\nforêt\r\nroute\r\n".encode())
    assert open_folder(annotated_folder).classes == ["ciel", "forêt", "route"]


def test_bad_annotation_is_named(annotated_folder, picture):
    path = annotated_folder / "annotations" / "train" / "train2.png"
    Image.fromarray(np.full((30, 40), 3, np.uint8)).save(path)
    assert "train2.png: holds index 3" in error(annotated_folder)
    Image.fromarray(np.zeros((40, 30), np.uint8)).save(path)
    assert "train2.png: expected the size" in error(annotated_folder)
    picture(40, 30).save(path)
    assert "train2.png: expected an index image" in error(annotated_folder)


@pytest.mark.parametrize("strict", [False, True])
def test_a_bad_image_is_never_skipped_outside_training(images_folder, strict, truncate):
    truncate(images_folder / "c.jpg")
    assert "c.jpg" in error(images_folder, strict=strict)


def test_indexing_ends(images_folder):
    dataset = open_folder(images_folder)
    assert dataset[-1].name == "g"
    with pytest.raises(IndexError):
        dataset[7]
