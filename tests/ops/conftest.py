"""What the operators' tests share: the backends, poisoned memory."""

from __future__ import annotations

import pytest
import torch

from nefkern import backends

TESTED = ("reference", "cpu", "triton", "cuda")


@pytest.fixture(params=TESTED)
def backend(request):
    """Each backend in turn, forced; skipped with its own reason where it cannot run."""
    if reason := backends.why_not(request.param):
        pytest.skip(reason)
    with backends.backend(request.param):
        yield request.param


@pytest.fixture
def poisoned_memory():
    """torch.empty gives NaN (floats) and the largest value (integers): nothing stays unwritten."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


#: Tests whose case in Triton's interpreter takes seconds, all of it a proof of breadth.
LONG_WHEN_INTERPRETED = {
    "test_products_by_both_ways", "test_properties_of_triton", "test_k_of_a_thousand_and_more",
    "test_both_ways_over_all_magnitudes", "test_any_graphs", "test_any_lists",
    "test_any_strides_and_gradient",
}  # fmt: skip


def pytest_collection_modifyitems(items):
    """Of a test's cases in Triton's interpreter the first is enough while one waits: a program of
    it takes half a millisecond. The others are long."""
    if not backends.interpreting():
        return
    seen = set()
    for item in items:
        if not hasattr(item, "callspec") or item.path.parent.name not in ("ops", "images"):
            continue
        given = item.callspec.params
        if "triton" not in (given.get("backend"), given.get("name")):
            continue
        test = (item.path, item.originalname)
        if test in seen or item.originalname in LONG_WHEN_INTERPRETED:
            item.add_marker(pytest.mark.long)
        seen.add(test)
