"""Every Triton kernel that ships compiles, spills nothing, fits, and multiplies on tensor cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
from nefkern.triton import resources
from nefkern.triton.resources import ARCHITECTURES, LIMITS, Resources, occupancy, table

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def found() -> list[Resources]:
    """Compiled in a process of its own: this one may be interpreting."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "nefkern.triton.resources", "--json", "--arch", *ARCHITECTURES],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [Resources(**row) for row in json.loads(done.stdout)]


def test_every_module_ships(found):
    assert {r.arch for r in found} == set(ARCHITECTURES)
    assert len({(r.name, r.arch) for r in found}) == len(found), "two kernels of one name"
    operators = {"knn", "normalized_adjacency", "add", "spmm", "sddmm", "linear_attention"}
    assert {r.name.split()[0] for r in found} == operators


def test_nothing_spills(found):
    assert [r for r in found if r.spilled] == []


def test_shared_memory_fits(found):
    assert [r for r in found if r.shared > LIMITS[r.arch].shared_a_block] == []


def test_what_is_made_for_sm_80_fits_sm_86_too(found):
    """Which has less shared memory and is compiled for alike."""
    limit = LIMITS["sm_86"].shared_a_block
    assert [r for r in found if r.arch == "sm_80" and r.shared > limit] == []


def test_products_run_on_tensor_cores(found):
    assert [r for r in found if r.product and not r.instruction] == []


def test_every_block_fits(found):
    assert [r for r in found if r.occupancy <= 0] == []


def test_occupancy_is_what_the_scarcest_resource_allows():
    limits = LIMITS["sm_80"]
    assert occupancy(limits, registers=32, shared=0, threads=128) == 1
    assert occupancy(limits, registers=128, shared=0, threads=128) == 0.25
    assert occupancy(limits, registers=32, shared=80 << 10, threads=128) == 0.125
    assert occupancy(limits, registers=32, shared=0, threads=32) == 0.5  # 32 blocks


def test_table_has_a_row_for_each():
    row = Resources("knn", "sm_80", 32, 0, 2048, 0.5, "HMMA", True)
    assert table([row]).splitlines()[2:] == ["| knn | sm_80 | 32 | 0 B | 2.0 KiB | 50% | HMMA |"]


def test_the_interpreter_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resources.main([]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err
