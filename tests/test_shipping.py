"""What other tools read: the citation, the mark of a typed package, the script."""

from __future__ import annotations

from pathlib import Path

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
