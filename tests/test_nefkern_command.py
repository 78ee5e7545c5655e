"""``nefkern COMMAND``: every command of the package, and nothing imported to list them."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

import pytest

import nefkern
from nefkern import __main__ as front
from nefkern.runtime import commandline


@pytest.fixture(autouse=True)
def called_as_before(monkeypatch):
    monkeypatch.setattr(commandline, "PROGRAM", commandline.PROGRAM)


def has_main(name: str) -> bool:
    return hasattr(importlib.import_module(front._MODULES.get(name, f"nefkern.{name}")), "main")


def test_every_command_is_there():
    found = {m.name for m in pkgutil.iter_modules(nefkern.__path__) if not m.ispkg}
    found -= {"backends", "version", "__main__", "_C"}
    assert found | {"data"} == set(front.COMMANDS)
    assert all(map(has_main, front.COMMANDS))


def test_help_lists_them_without_torch():
    code = (
        "import sys; from nefkern.__main__ import main; main(['--help']);"
        "sys.exit(bool({'torch', 'numpy', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", code], capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, "light"
    for name, what in front.COMMANDS.items():
        assert sum(line.split()[:1] == [name] for line in done.stdout.splitlines()) == 1
        assert what in done.stdout


@pytest.mark.parametrize("name", front.COMMANDS)
def test_help_of_each_names_it_as_it_was_called(name, capsys):
    with pytest.raises(SystemExit) as end:
        front.main([name, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: nefkern {name}" in shown
    assert "python -m nefkern." not in shown


def test_the_module_says_the_same(capsys):
    done = subprocess.run(
        [sys.executable, "-m", "nefkern", "segment", "--help"], capture_output=True, text=True
    )
    assert "usage: nefkern segment" in done.stdout


def test_mistakes(capsys):
    assert front.main(["segmnt"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: segmnt: no such command; did you mean segment? nefkern --help")
    assert front.main(["segment"]) == 2
    assert "nefkern segment --help lists the options" in capsys.readouterr().err
    assert front.main(["--version"]) == 0
    assert capsys.readouterr().out == f"nefkern {nefkern.__version__}\n"


@pytest.mark.parametrize("name", front.COMMANDS)
def test_texts_of_help_fit_a_line(name):
    """One that went on into the next, by a backslash too few, is not a command to paste."""
    module = importlib.import_module(front._MODULES.get(name, f"nefkern.{name}"))
    text = getattr(module, "DESCRIPTION", "") + getattr(module, "EXAMPLES", "")
    assert max(map(len, text.splitlines()), default=0) <= 100
