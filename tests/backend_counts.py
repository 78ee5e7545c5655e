"""pytest hooks: after the tests, one line a backend with how many of its cases ran.

A case belongs to the backend that its parameter ``backend`` or ``name`` names. A backend that
cannot run here gets its reason instead: nothing is left out silently.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from nefkern import backends

OUTCOMES = ("passed", "failed", "error", "skipped", "xfailed", "xpassed")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    report.backend = parameters.get("backend", parameters.get("name"))
    return report


def pytest_terminal_summary(terminalreporter):
    found = Counter(
        (report.backend, outcome)
        for outcome in OUTCOMES
        for report in terminalreporter.stats.get(outcome, [])
        if getattr(report, "backend", None) in backends.BACKENDS
    )
    if found:
        for name in backends.BACKENDS:
            counts = [f"{n} {o}" for o in OUTCOMES if (n := found[name, o])]
            if reason := backends.why_not(name):
                counts.append(f"cannot run here: {reason}")
            terminalreporter.write_line(
                f"backend {_described(name)}: {', '.join(counts) or 'no tests'}"
            )


def _described(name: str) -> str:
    """The backend, and for a GPU's what its kernels ran on."""
    if name == "triton" and backends.interpreting():
        return "triton (interpreter)"
    if name in ("cuda", "triton") and torch.cuda.is_available():
        return f"{name} ({torch.cuda.get_device_name()})"
    return name
