"""Stage "suite": the tests of the GPU's back ends, in parallel; counted as they end."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

from bench.gpu import process
from bench.gpu.plan import Settings
from bench.gpu.worker import Skipped

TESTS = ("tests/ops", "tests/triton", "tests/cuda/test_extension.py")
REHEARSED = ("tests/ops/test_sddmm.py",)
#: A line of ``pytest -v``, with or without xdist's words before it.
OUTCOME = re.compile(
    r"(?:(?P<before>PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS) )?(?P<test>tests/\S+::.+?)"
    r"(?: (?P<after>PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b.*)?\s*$"
)
SHOWN = 20  # names of failed tests


def run(case: str, settings: Settings) -> Iterator[dict[str, Any]]:
    """Figures every few tests, then what failed."""
    if importlib.util.find_spec("pytest") is None:
        raise Skipped("pytest is not installed")
    running = process.start(
        command(settings), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        counts, failed, last = Counter(), [], []
        for number, line in enumerate(running.stdout):
            last = [*last[-30:], line]
            if found := outcome(line):
                counts[found[1].lower()] += 1
                failed += [found[0]] if found[1] in ("FAILED", "ERROR") else []
            if number % 20 == 0:
                yield {"counts": dict(counts), "failed": failed[:SHOWN]}
        code = running.wait()
    finally:
        process.end(running)
    yield {"counts": dict(counts), "failed": failed[:SHOWN]}
    if code != 0 or not counts:
        yield {"output": process.tail("".join(last))}
        raise AssertionError(f"pytest: exit code {code}, {len(failed)} failed")


def command(settings: Settings) -> list[str]:
    few = ("cpu and dense_product", REHEARSED)
    names, tests = few if settings.rehearsal else ("cuda or triton", TESTS)
    parallel = []
    if importlib.util.find_spec("xdist") and not settings.rehearsal:
        parallel = ["-n", str(min(12, os.cpu_count() or 1))]
    # One -v is taken back by the -q of the project's options.
    return [sys.executable, "-m", "pytest", *tests, "-k", names, "-vv", "--tb=short", "-rN",
            "-p", "no:cacheprovider", *parallel]  # fmt: skip


def outcome(line: str) -> tuple[str, str] | None:
    """Test and outcome, of a line of ``pytest -v``."""
    found = OUTCOME.search(line.rstrip())
    if found is None:
        return None
    result = found["before"] or found["after"]
    return (found["test"], result) if result else None
