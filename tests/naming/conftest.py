"""A run of seconds, its photographs, and names of its clusters."""

from __future__ import annotations

from pathlib import Path

import pytest

from nefkern.naming.names import Names, fingerprint, write_names
from nefkern.training.options import TrainOptions
from nefkern.training.runs import Run
from nefkern.training.spectral import SpectralTrainer
from nefkern.training.trainer import Trainer

SIZES = {"wide.png": (120, 50), "tall.jpg": (40, 90), "large.png": (150, 130)}


@pytest.fixture(scope="session")
def pictures(photograph, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for seed, (name, size) in enumerate(SIZES.items()):
        photograph(*size, seed).save(folder / name)
    return folder


@pytest.fixture(scope="session", params=["neural", "spectral"])
def run(pictures, tmp_path_factory, request) -> Path:
    """A run with a small random backbone, K = 6, of either method."""
    spectral = request.param == "spectral"
    sizes = {"k": "6", "eigenvectors": 6} if spectral else {"k": "16", "heads": 3, "epochs": 1}
    options = TrainOptions(
        data="folder", data_root=str(pictures), method=request.param, batch_size=3, workers=0,
        backbone="test_vit", weights="random", crop=64, num_eigenfunctions=6, pictures=0,
        mlp_hidden=96, out=str(tmp_path_factory.mktemp("runs") / "run"), **sizes,
    )  # fmt: skip
    trainer = SpectralTrainer if spectral else Trainer
    trainer(options, Run.create(options)).train()
    return Path(options.out)


@pytest.fixture
def names(run, tmp_path) -> Path:
    """names.yaml: two classes of two clusters each; two clusters have no name."""
    path = tmp_path / "names.yaml"
    given = {0: "sky", 1: "road & <b>", 2: "sky", 5: "road & <b>"}
    write_names(path, Names(6, given, {"road & <b>": None, "sky": "#0080ff"}, fingerprint(run)))
    return path
