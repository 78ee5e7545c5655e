"""Scenes on disk, a run trained on them, and a segmenter that stands in for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from nefkern.segmentation.segmenter import Segmenter
from nefkern.training.options import TrainOptions
from nefkern.training.runs import Run
from nefkern.training.trainer import Trainer
from tests.evaluation.pointwise import Pointwise
from tests.evaluation.scenes import write_folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "scenes", {"train": 6, "val": 4})


@pytest.fixture(scope="session")
def trained(folder, tmp_path_factory) -> Path:
    """A run of a few seconds with a small random backbone, K = 6."""
    options = TrainOptions(
        data="folder", data_root=str(folder), out=str(tmp_path_factory.mktemp("runs") / "run"),
        backbone="test_vit", weights="random", crop=64, k="16", num_eigenfunctions=6,
        heads=3, mlp_hidden=96, epochs=1, batch_size=3, workers=0, pictures=0,
    )  # fmt: skip
    Trainer(options, Run.create(options)).train()
    return Path(options.out)


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the trained run, to write into."""
    copy = tmp_path / "run"
    copy.mkdir()
    for file in trained.iterdir():
        if file.is_file():
            (copy / file.name).write_bytes(file.read_bytes())
    return copy


@pytest.fixture
def pointwise(monkeypatch) -> Pointwise:
    """Stands in for the loaded run."""
    segmenter = Pointwise()
    monkeypatch.setattr(Segmenter, "load", lambda run, device, cache: segmenter)
    return segmenter
