"""What other tools read: the citation, the mark of a typed package, the script."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import yaml

from nefkern.version import __version__

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text("utf-8")


def test_the_citation():
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert found["version"] == __version__
    assert found["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(found)
    assert "Neural Eigenfunctions" in found["preferred-citation"]["title"]


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "nefkern" / "py.typed").exists()
    assert "py.typed" in PROJECT


def test_the_script_is_the_command():
    assert '[project.scripts]\nnefkern = "nefkern.__main__:main"' in PROJECT


def versions():
    """.ci/versions.py as a module."""
    spec = importlib.util.spec_from_file_location("versions", ROOT / ".ci" / "versions.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(sys.version_info < (3, 11), reason="no tomllib")
def test_every_dependency_has_a_lower_bound_to_test():
    import tomllib

    bounds = versions().lower_bounds(PROJECT)
    for requirement in tomllib.loads(PROJECT)["project"]["dependencies"]:
        assert requirement.replace(">=", "==") in bounds
    assert "onnx==1.17" in bounds  # of an extra
    assert "setuptools" not in " ".join(bounds)  # that builds are isolated from


def test_a_python_that_is_not_here_is_told(tmp_path):
    assert versions().tried("2.1:newest", tmp_path, []) == "skipped: no python2.1 here"
