"""The lines that say how many cases of every backend ran."""

from __future__ import annotations

import pytest

from nefkern import backends

pytest_plugins = ["pytester"]

CASES = """
import pytest

@pytest.fixture(params=["reference", "triton"])
def backend(request):
    if request.param == "triton":
        pytest.skip("for a reason")

def test_fixture(backend):
    pass

@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_parameter(name):
    assert name != "cpu"

@pytest.mark.parametrize("name", ["knn"])
def test_of_no_backend(name):
    pass
"""


@pytest.fixture
def lines(pytester, monkeypatch):
    """lines(source): those of a run of these tests, where the CUDA extension isn't built."""
    monkeypatch.setattr(backends, "why_not", lambda name: "not built" if name == "cuda" else None)

    def run(source: str) -> list[str]:
        pytester.makeconftest("from tests.backend_counts import *")
        pytester.makepyfile(source)
        done = pytester.runpytest_inprocess("-p", "no:cacheprovider")
        return [line for line in done.outlines if line.startswith("backend ")]

    return run


def test_cases_are_counted_by_backend(lines):
    cuda, triton, cpu, reference = lines(CASES)
    assert cuda.startswith("backend cuda")
    assert cuda.endswith(": cannot run here: not built")
    assert triton.startswith("backend triton (")
    assert triton.endswith("): 1 skipped")
    assert cpu == "backend cpu: 1 failed"
    assert reference == "backend reference: 2 passed"


def test_no_lines_where_no_test_has_a_backend(lines):
    assert lines("def test_plain():\n    pass\n") == []
