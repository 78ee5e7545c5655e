"""The direction of imports: the contracts in pyproject.toml."""

from __future__ import annotations

from pathlib import Path

import pytest


def test_lower_never_imports_upper(monkeypatch, capsys):
    linter = pytest.importorskip("importlinter.cli")
    monkeypatch.chdir(Path(__file__).parents[1])
    status = linter.lint_imports(cache_dir=None)
    assert status == 0, capsys.readouterr().out
