"""The direction of imports: the contracts in pyproject.toml."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def test_lower_never_imports_upper():
    """In a process of its own: the linter sets up logging for itself."""
    pytest.importorskip("importlinter")
    code = "from importlinter.cli import lint_imports_command as run; run(['--no-cache'])"
    root = Path(__file__).parents[1]
    linted = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert linted.returncode == 0, linted.stdout + linted.stderr
