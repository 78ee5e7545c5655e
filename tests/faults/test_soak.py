"""The watcher of long runs sees what grows, and only that."""

from __future__ import annotations

import sys

import pytest

from tests.faults import soak


def steady(mebibytes, files) -> list[soak.Sample]:
    return [
        soak.Sample(n, m, f, 4, 1) for n, (m, f) in enumerate(zip(mebibytes, files, strict=True))
    ]


@pytest.mark.parametrize(
    ("mebibytes", "files", "grew"),
    [
        ([100, 900, 1000, 1000, 1010, 990, 1000, 1000], [9] * 8, []),
        ([100, 900, 1000, 1100, 1200, 1300, 1400, 1500], [9] * 8, ["mebibytes"]),
        ([1000] * 8, [9, 10, 11, 12, 13, 14, 15, 16], ["files"]),
    ],
)
def test_growth_is_what_comes_after_the_warm_up(mebibytes, files, grew):
    found = soak.growths(steady(mebibytes, files))
    assert [one.quantity for one in found if one.found] == grew


def test_of_a_few_samples_nothing_is_said():
    with pytest.raises(ValueError, match="at least 8, got 2"):
        soak.growths(steady([1, 1], [1, 1]))


def run(code: str, seconds: float | None = None) -> list[soak.Sample]:
    return list(soak.watched([sys.executable, "-c", code], seconds, 0.05, lambda one: None))


def test_a_command_that_leaks_memory_and_files_is_found():
    code = (
        "import time\nheld = []\n"
        "for _ in range(20): held.append((bytearray(b'x') * (16 << 20), open('/dev/null')));"
        " time.sleep(0.1)"
    )
    grew = {one.quantity for one in soak.growths(run(code)) if one.found}
    assert grew == {"mebibytes", "files"}


def test_children_count():
    code = (
        "import subprocess, sys\n"
        "subprocess.run([sys.executable, '-c', 'import time; time.sleep(1)'])"
    )
    assert max(one.processes for one in run(code)) == 2


def test_a_command_that_fails_is_told():
    with pytest.raises(RuntimeError, match="status 3: sorry"):
        run("import sys, time; time.sleep(0.2); print('sorry'); sys.exit(3)")


def test_time_is_up():
    samples = run(
        "import signal, sys, time\nsignal.signal(15, lambda *_: sys.exit(143))\ntime.sleep(60)",
        seconds=0.5,
    )
    assert samples[-1].seconds < 10
