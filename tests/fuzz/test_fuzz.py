"""Mutated files of every kind and odd arguments of every operator: refused in a line, or taken."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.fuzz.__main__ import ALL, shares
from tests.fuzz.running import generator, run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and limits memory")


def check(inputs: int, seed: int) -> None:
    """All targets, in a process that has computed nothing yet: those it forks then may."""
    command = [sys.executable, "-m", "tests.fuzz", "--inputs", str(inputs), "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = re.findall(r"^(\w+): (\d+) inputs", done.stdout, re.MULTILINE)
    assert {name: int(count) for name, count in lines} == shares(inputs, list(ALL))


def test_some_inputs():
    check(300, seed=1)


@pytest.mark.long
def test_many_inputs():
    check(6_000, seed=0)


def test_an_input_is_a_function_of_the_seed():
    values = [[generator(s, "x", n).random() for n in (0, 1)] for s in (0, 0, 1)]
    assert values[0] == values[1] != values[2]
    assert values[0][0] != values[0][1]


def test_what_goes_wrong_is_found():
    """An exception of another kind, a crash: each by its number."""
    import os

    def prepare(folder):
        numbers = iter(range(100))

        def attempt(random):
            number = next(numbers)
            if number == 2:
                raise KeyError("x")
            if number == 4:
                os.abort()
            return "fine"

        return attempt

    report = run("x", prepare, 6, 0)
    assert "KeyError" in report.findings[2]
    assert "died" in report.findings[4]
    assert report.inputs == 6
