"""Every kernel compiles for sizes and strides of 1 and for multiples of 16, as a call may have."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.long

pytest.importorskip("triton")


def test_integers_of_1_and_multiples_of_16():
    """In a process of its own: this one may be interpreting."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.triton.front_ends"],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["errors"] == []
    assert {"score_kernel", "_spmm_kernel", "_sddmm_kernel", "sum_keys"} <= set(found["kernels"])
    assert found["forms"] > 2 * len(found["kernels"])
