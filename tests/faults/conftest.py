"""What forks processes that train does so in a process of its own.

A test's process has perhaps computed gradients before; what is forked from it then cannot, for
autograd has threads that a fork does not copy.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

FORKING = ("test_kills.py", "test_writes.py")
_INSIDE = "NEFKERN_TESTS_CLEAN_PROCESS"
_OUTCOME = pytest.StashKey[tuple[int, str]]()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if item.path.name not in FORKING or _INSIDE in os.environ:
        return
    command = [sys.executable, "-m", "pytest", "-q", "--long", "-p", "no:xdist", item.nodeid]
    done = subprocess.run(
        command, cwd=item.config.rootpath, env={**os.environ, _INSIDE: "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    item.stash[_OUTCOME] = done.returncode, done.stdout[-8000:] + done.stderr[-4000:]
    item.fixturenames.clear()  # they are made where the test runs


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    if _OUTCOME not in pyfuncitem.stash:
        return None
    code, text = pyfuncitem.stash[_OUTCOME]
    assert code == 0, text
    return True
