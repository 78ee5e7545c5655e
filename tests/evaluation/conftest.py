"""Scenes on disk, a run trained on them, and a segmenter that stands in for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from nefkern.segmentation.segmenter import Segmenter
from tests.evaluation.pointwise import Pointwise
from tests.evaluation.scenes import write_folder
from tests.training import outcomes


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "scenes", {"train": 6, "val": 4})


@pytest.fixture(scope="session")
def trained(folder, tmp_path_factory) -> Path:
    return outcomes.trained(folder, tmp_path_factory.mktemp("runs") / "run")


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
