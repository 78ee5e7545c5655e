"""What kernels ask of a GPU: the counting is right, and no kernel has become dearer."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.emulator import costs

pytestmark = pytest.mark.long


@pytest.fixture(scope="module", params=[1, 2, 8, 31, 32])
def known(request):
    found = costs.counted(
        "self_test", "costs", {"x": np.zeros(32 * 32, np.float32)}, {"stride": request.param}
    )
    return request.param, found["costs"], found["wide_costs"]


def test_bank_conflicts_and_sectors(known):
    stride, counts, _ = known
    conflict = np.gcd(stride, 32)
    assert counts["shared_wavefronts"] == conflict + 1  # the store; a word that all lanes read
    assert counts["shared_instructions"] == 2
    assert counts["sectors_read"] == min(4 * stride, 32)
    assert counts["sectors_written"] == 4
    assert counts["global_instructions"] == 2
    assert (counts["shuffles"], counts["barriers"], counts["mma"]) == (1, 1, 0)
    assert counts["issued"] >= 6


def test_wide_accesses_atomics_and_blocks(known):
    *_, counts = known
    assert counts["blocks"] == 2
    assert counts["shared_wavefronts"] == 2 * (4 + 32)  # quarter warps; one after the other
    assert counts["sectors_read"] == counts["sectors_read_once"] == 2 * 16
    assert counts["sectors_touched"] == 16 + 1
    assert counts["global_instructions"] == 2 * 2


# ---- upper bounds: of a row, and what a kernel needed when it was written, a little more ----

BOUNDS = {
    # Before: 11,238 wavefronts, and more than 27,000 instructions.
    "pixels": (costs.neighbours(8, 900, 5, 10), "direct_rows",
               {"shared": 140, "issued": 7000, "sectors_once": 250}),
    # 14,400 candidates take 14,400 / 32 * 2 to be staged. Before: 13,248.
    "select 10": (costs.neighbours(4, 3600, 17, 10), "select_rows",
                  {"shared": 420, "issued": 14_000}),
    # Before: 45,359 at 14,400 candidates.
    "select 256": (costs.neighbours(4, 3600, 17, 256), "select_rows",
                   {"shared": 3500, "issued": 42_000}),
    # Before, sorted in shared memory: 211,391 at 14,400 candidates.
    "select 2,048": (costs.neighbours(2, 3600, 17, 2048), "select_rows",
                     {"shared": 7000, "issued": 88_000}),
    # Four rows' candidates are joined. Before, a row's of its own.
    "re-rank": (costs.neighbours(8, 512, 64, 64, method=2, metric=0, sample_share=4,
                                 alike=costs.PHOTOGRAPHS), "rerank_rows",
                {"shared": 620, "sectors_read": 370, "issued": 6300}),
}  # fmt: skip


@pytest.mark.parametrize("name", BOUNDS)
def test_no_kernel_asks_for_more(name):
    case, kernel, bounds = BOUNDS[name]
    cost = case.run()[kernel]
    for quantity, bound in bounds.items():
        counted = getattr(cost, quantity)
        assert bound / 2 < counted <= bound, (quantity, counted)


def test_the_command(capsys, monkeypatch):
    monkeypatch.setitem(costs.CASES, "small", costs.neighbours(1, 8, 3, 2))
    costs.main(["--json", "--case", "small"])
    found = json.loads(capsys.readouterr().out)
    assert set(found["small"]["direct_rows"]) == set(costs.Cost.__dataclass_fields__)
    costs.main(["--case", "small"])
    assert "small: direct_rows" in capsys.readouterr().out
