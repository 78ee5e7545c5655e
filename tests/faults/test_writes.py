"""A full or read-only disk at every write of every command: one line, and what was there stays."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nefkern import atlas, eigenmaps, evaluate, segment, spectrum, train
from nefkern.runtime.errors import UserError
from nefkern.training.runs import CHECKPOINT, Run
from tests.faults.kills import _COMMON, METHODS, PATIENCE, photographs
from tests.faults.processes import Forked
from tests.faults.writes import KINDS, failing, writes

pytestmark = [
    pytest.mark.skipif("not hasattr(__import__('os'), 'fork')", reason="forks"),
    pytest.mark.long,
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder with annotated photographs and a finished run of each method; left as it is."""
    folder = tmp_path_factory.mktemp("whole")
    root = folder / "data"
    for split in ("train", "val"):
        photographs(root / "images" / split, 3)
        (root / "annotations" / split).mkdir(parents=True)
        for path in (root / "images" / split).iterdir():
            labels = (np.array(Image.open(path))[..., 0] > 127).astype(np.uint8)
            Image.fromarray(labels).save(root / "annotations" / split / path.name)
    (root / "classes.txt").write_text("dark\nlight\n")
    for method in ("neural", "spectral"):
        arguments = trained(method, folder, folder / method)
        ended = Forked(lambda given=arguments: train.main(given)).wait(PATIENCE)
        assert ended is not None
        assert ended.code == 0, ended.text
    (folder / "names.yaml").write_text("clusters: 5\nnames: {0: sky, 1: road, 2: sky}\n")
    return folder


def trained(method: str, folder: Path, out: Path, *more: str) -> list[str]:
    flags = [*_COMMON, *METHODS[method], "--data-root", str(folder / "data"), "--out", str(out)]
    flags += ["--epochs", "1"] if method == "neural" else []
    return [*flags, *more]


def commands(whole: Path, there: Path) -> dict:
    """By name: a command, and its arguments, which write below ``there`` alone."""
    run, photo = str(there / "spectral"), str(whole / "data" / "images" / "val" / "0.png")
    named = ["--names", str(whole / "names.yaml")]
    if importlib.util.find_spec("pycocotools"):
        named += ["--formats", "coco,coco-rle,labelme,cvat,voc"]
    data = ["--data", "folder", "--data-root", str(whole / "data")]
    return {
        "train spectral": (train.main, trained("spectral", whole, there / "new")),
        "train neural": (train.main, trained("neural", whole, there / "new")),
        "train longer": (
            train.main,
            [*trained("neural", whole, there / "neural"), "--resume", "--epochs", "2"],
        ),
        "evaluate": (evaluate.main, [run, *data, "--size", "64", "--feature-cache",
                                     str(there / "cache")]),
        "segment": (segment.main, [run, photo, "--out", str(there / "segments")]),
        "segment named": (segment.main, [run, photo, "--out", str(there / "named"), *named]),
        "eigenmaps": (eigenmaps.main, [run, photo]),
        "spectrum": (spectrum.main, [run, *data, "--split", "val", "--images", "2"]),
        "atlas": (atlas.main, [run, *data, "--split", "val"]),
    }  # fmt: skip


NAMES = (
    "train spectral", "train neural", "train longer", "evaluate", "segment", "segment named",
    "eigenmaps", "spectrum", "atlas",
)  # fmt: skip


def fresh(whole: Path, folder: Path) -> Path:
    """What a command begins with."""
    there = folder / "there"
    shutil.rmtree(there, ignore_errors=True)
    there.mkdir()
    for method in ("neural", "spectral"):
        shutil.copytree(whole / method, there / method)
    return there


def check_runs(there: Path) -> None:
    """Every checkpoint in the folder is whole, and no half-written file is left."""
    for path in there.rglob(CHECKPOINT):
        run = Run(path.parent)
        _, metadata = run.load()
        if "state" in metadata:
            run.load_state(metadata)
    assert not list(there.rglob(".*.part"))


@pytest.mark.parametrize("name", NAMES)
def test_every_write_of_a_command(name, whole, tmp_path):
    main, arguments = commands(whole, fresh(whole, tmp_path))[name]
    there = tmp_path / "there"
    count, ended = writes(lambda: main(arguments), there)
    assert ended.code == 0, ended.text
    assert count > 0
    # What can only be read is so from the start on, or becomes it by an error of the disk.
    at = {"full": range(1, count + 1), "read-only": {1, 2, count // 2 + 1, count}}
    for kind in KINDS:
        for first in at[kind]:
            fresh(whole, tmp_path)
            ended = failing(lambda: main(arguments), there, kind, first)
            case = f"{kind} from write {first} of {count}:\n{ended.text}"
            assert ended.code in (0, 2), case
            assert "Traceback" not in ended.text, case
            if ended.code == 2:
                assert ended.last.startswith("error: "), case
            check_runs(there)


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_fails_halfway(kind, whole, tmp_path):
    """As above, in the middle of one training, which --resume then brings to its end."""
    there = fresh(whole, tmp_path)
    arguments = trained("neural", whole, there / "new")
    ended = failing(lambda: train.main(arguments), there, kind, 12)
    assert ended.code == 2, ended.text
    assert ended.last.startswith("error: cannot read or write "), ended.text
    assert "Traceback" not in ended.text
    check_runs(there)
    try:
        assert train.main([*arguments, "--resume"]) == 0
    except UserError as error:
        raise AssertionError(error) from None
    assert Run(there / "new").is_trained(Run(there / "new").options())
