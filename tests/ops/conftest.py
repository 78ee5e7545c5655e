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
