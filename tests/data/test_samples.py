"""The photographs inside installed packages: colour, offline, without importing the packages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nefkern.data import open_dataset, samples
from nefkern.runtime.errors import UserError

COUNTS = {"skimage": 5, "sklearn": 2, "foolbox": 20}


def need(package: str) -> None:
    if samples.find_spec(package) is None:
        pytest.skip(f"the package {package} is not installed")


@pytest.mark.parametrize("package", COUNTS)
def test_photographs_of_each_package(monkeypatch, package):
    need(package)
    monkeypatch.setattr(samples, "_SOURCES", [s for s in samples._SOURCES if s[0] == package])
    dataset = open_dataset("samples", split="val")
    assert len(dataset) == COUNTS[package]
    assert not dataset.annotated
    for sample in dataset:
        assert min(sample.image.shape[1:]) >= 300
        assert sample.annotation is None
        channels = sample.image.float()
        spread = (channels.amax(0) - channels.amin(0)).mean()
        assert spread > 3, f"{sample.name} looks gray"


def test_names_are_unique_and_in_a_fixed_order():
    need("skimage")
    first, second = open_dataset("samples"), open_dataset("samples")
    assert first.names == second.names
    assert len(set(first.names)) == len(first)
    assert first.names[:3] == ["astronaut", "chelsea", "coffee"]


def test_packages_are_not_imported_and_the_network_is_not_touched():
    need("skimage")
    code = """
import socket, sys
def refuse(*args, **kwargs):
    raise AssertionError("network used")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from nefkern.data import open_dataset
assert sum(1 for _ in open_dataset("samples")) >= 5
assert not {"skimage", "sklearn", "foolbox", "pooch"} & set(sys.modules)
"""
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=60)


def test_without_any_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(samples, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install scikit-image scikit-learn foolbox"):
        open_dataset("samples")


def test_options_that_samples_cannot_honour(tmp_path):
    with pytest.raises(UserError, match="did you mean data 'folder'"):
        open_dataset("samples", root=tmp_path)
    with pytest.raises(UserError, match="no annotations"):
        open_dataset("samples", ignore_classes=["sky"])
