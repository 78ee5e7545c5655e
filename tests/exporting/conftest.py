"""Runs of seconds of every kind, and photographs of several sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nefkern import train

SIZES = {"wide.png": (120, 70), "tall.jpg": (80, 130), "large.png": (150, 130), "own.png": (64, 64)}

_ALL = [
    *("--data", "folder", "--backbone", "test_vit", "--weights", "random", "--crop", "64"),
    *("-K", "6", "--batch-size", "3", "--workers", "0", "--pictures", "0"),
]
_PSI = ["--method", "neural", "--k", "16", "--epochs", "1", "--heads", "3", "--mlp-hidden", "96"]
KINDS = {
    "quantised": _PSI,
    "continuous": [*_PSI, "--no-gumbel", "--psi", "convolution", "--high", "keys:1"],
    "elu": [*_PSI, "--feature-map", "elu", "--standardize"],
    "spectral": ["--method", "spectral", "--k", "6"],
    "vectors": ["--method", "spectral", "--k", "6", "--alpha", "0", "--cluster-on", "vectors"],
    "every": ["--method", "spectral", "--k", "6", "--graph-features", "all"],
    "native": ["--method", "spectral", "--k", "6", "--input-size", "48"],
}


@pytest.fixture(scope="session")
def pictures(photograph, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for seed, (name, size) in enumerate(SIZES.items()):
        photograph(*size, seed).save(folder / name)
    return folder


@pytest.fixture(scope="session")
def run_of(pictures, tmp_path_factory) -> Callable[[str], Path]:
    """run_of(kind): the folder of a run of that kind; trained once."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            out = tmp_path_factory.mktemp("runs") / kind
            where = ["--data-root", str(pictures), "--out", str(out)]
            assert train.main([*_ALL, *KINDS[kind], *where]) == 0
            made[kind] = out
        return made[kind]

    return make
