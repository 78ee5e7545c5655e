from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from nefkern.data.benchmark import missing_files
from nefkern.data.dataset import ImageDataset
from nefkern.data.paths import Paths

NAMES = ["a/b.jpg", "a/ü.png", os.fsdecode(b"a/\xff.jpg"), "b/b.jpg", "c/b.png", "c/d.e.jpg"]


def test_paths_come_back_as_they_were():
    given = [Path(name) for name in NAMES]
    paths = Paths(given)
    assert list(paths) == given
    assert (len(paths), paths[-1], paths[1]) == (6, given[-1], given[1])
    for index in (6, -7):
        with pytest.raises(IndexError):
            paths[index]
    assert paths[1:3] == given[1:3]
    assert paths == given
    assert paths != given[:-1]
    assert Paths([]) == []


def test_names_are_stems_where_those_are_unique():
    names = ImageDataset([Path(name) for name in NAMES]).names
    assert list(names) == ["b.jpg", "ü", os.fsdecode(b"\xff"), "b.jpg-2", "b.png", "d.e"]
    assert names[-1] == "d.e"


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["n1/1.JPEG", "n2/1.JPEG", "n3/1.JPEG"], ["1.JPEG", "1.JPEG-2", "1.JPEG-3"]),
        (["x.jpg", "x.png", "x.jpg.png"], ["x.jpg", "x.png", "x.jpg-2"]),
        (["a/x.jpg", "b/x.jpg", "x.jpg-2.png"], ["x.jpg", "x.jpg-2", "x.jpg-2-2"]),
    ],
)
def test_no_name_comes_twice(paths, expected):
    """What is drawn of an image goes to a file of its name."""
    assert list(ImageDataset([Path(path) for path in paths]).names) == expected


def test_a_million_images_are_few_objects():
    """Worker processes get a copy of every object that they look at, and of its neighbours."""
    dataset = ImageDataset([Path(f"train/n{i % 100:08}/{i:08}.JPEG") for i in range(20_000)])
    held = (dataset.paths, dataset.names)
    kinds = {type(value) for part in held for value in vars(part).values()}
    assert kinds == {np.ndarray, Paths}
    assert sum(v.nbytes for v in vars(dataset.paths).values()) < 45 * len(dataset)


def test_missing_files(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("1.jpg", "2.jpg"):
        (tmp_path / "a" / name).touch()
    files = [tmp_path / name for name in ("a/1.jpg", "a/3.jpg", "b/1.jpg", "a/1.jpg/x", "a/2.jpg")]
    assert missing_files(files) == files[1:4]
