"""What kernels ask of a GPU: the counting is right, and no kernel has become dearer."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest

from tests.emulator import costs, graphs, other_costs

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


def wide() -> graphs.Lists:
    return graphs.photographs(1, 20, 60)


def short() -> graphs.Lists:
    return graphs.photographs(1, 10, 40)


KAPPA = costs.assembled(short, pixels=True)
GRADIENT = costs.differentiated(short)
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
    # An entry is a row of x of 1,024 bytes, 32 sectors, from which a warp with a row of its own
    # takes 8 wavefronts besides.
    "spmm": (costs.sparse(wide, 256, rows=64), "spmm_shared_rows",
             {"first_level": 11.5, "sectors_read": 7.5, "issued": 135}),
    "spmm bfloat16": (costs.sparse(wide, 256, dtype="bfloat16", rows=64), "spmm_shared_rows",
                      {"first_level": 8.5, "sectors_read": 5, "issued": 145}),
    "spmm gathered": (costs.sparse(lambda: graphs.scattered(400, 60), 64, rows=64), "spmm_rows",
                      {"first_level": 4.2, "sectors_read": 9.5, "issued": 47}),
    # A listed neighbour; rows are short, so that what a row costs weighs, as the look for hubs.
    "kappa, counted": (KAPPA, "count_names",
                       {"sectors_read": 0.25, "sectors_written": 1.25, "issued": 1.4}),
    "kappa, named": (KAPPA, "write_names",
                     {"sectors_read": 0.85, "sectors_written": 2, "issued": 1.9}),
    "kappa, merged": (KAPPA, "merge_rows",
                      {"first_level": 10, "sectors_read": 2.3, "issued": 85}),
    "kappa, filled": (KAPPA, "fill_both_merged",
                      {"first_level": 1.1, "sectors_read": 1.7, "issued": 5.5}),
    "normalized_adjacency, merged": (costs.assembled(short, pixels=False), "merge_rows",
                                     {"first_level": 13, "sectors_read": 2.7, "issued": 115}),
    # Of more nodes than a bitmap has bits; the sort itself comes on top.
    "kappa, sorted": (costs.assembled(short, pixels=True, merged_nodes=0), "fill_both",
                      {"first_level": 2.5, "sectors_read": 5.5, "issued": 13}),
    # An entry of both graphs.
    "add, counted": (costs.summed(short), "count_union", {"sectors_read": 0.95, "issued": 5.1}),
    "add, filled": (costs.summed(short), "fill_union", {"sectors_read": 1.3, "issued": 7.1}),
    # A listed neighbour. PyTorch's formula, below, reads and writes 35 sectors for it.
    "gradient, listed": (GRADIENT, "list_places",
                         {"sectors_read": 2.7, "sectors_written": 2.3, "issued": 9.5}),
    "gradient, joined": (GRADIENT, "join_places",
                         {"sectors_read": 14.5, "sectors_written": 0.7, "issued": 9.5}),
    "gradient, scales": (GRADIENT, "find_scales", {"sectors_read": 1.2, "issued": 26}),
    "gradient, pulls": (GRADIENT, "find_pulls", {"sectors_read": 2, "issued": 26}),
    "gradient, written": (GRADIENT, "write_gradients",
                          {"sectors_read": 2.9, "sectors_written": 0.15, "issued": 2.9}),
    "sddmm": (costs.CASES["sddmm of photographs (Triton)"], "sddmm",
              {"sectors_read": 36, "sectors_written": 0.2}),
    "gradient of kappa's weights": (costs.CASES["gradient of kappa's weights (PyTorch)"],
                                    "kappa_backward", {"sectors_read": 24, "sectors_written": 15}),
}  # fmt: skip


@functools.cache
def _run(case):
    return case.run()


@pytest.mark.parametrize("name", BOUNDS)
def test_no_kernel_asks_for_more(name):
    case, kernel, bounds = BOUNDS[name]
    if name in ("sddmm", "gradient of kappa's weights"):
        pytest.importorskip("triton")
    cost = _run(case)[kernel]
    for quantity, bound in bounds.items():
        counted = getattr(cost, quantity)
        assert bound / 2 < counted <= bound, (quantity, counted)


def test_the_model_has_as_many_operations_as_there_are():
    pytest.importorskip("triton")
    from bench.roofline.training_step import BACKWARD_LAUNCHES

    assert other_costs.run()["kappa_backward"]["launches"] == BACKWARD_LAUNCHES


def test_the_row_of_a_hub_is_the_dearest_and_linear_in_its_names():
    """A clock of the first-level cache for a name, but for what every row costs."""
    few, many = (
        costs.assembled(
            lambda n=n: graphs.half_a_hub(n), pixels=True, long_names=n // 2
        ).run()["merge_rows"].longest_block
        for n in (300, 600)
    )  # fmt: skip
    assert 150 < many - few < 150 * 12


def test_made_up_photographs_share_what_real_ones_do():
    """Different columns in 8 and 32 rows of κ beside each other: 30% and 16% of the entries in 16
    photographs of VOC2012 with DINOv2's features."""
    offsets, columns, _ = graphs.adjacency(graphs.photographs(2, 30, 128))
    assert 0.25 < graphs.sharing(offsets, columns, 8) < 0.35
    assert 0.12 < graphs.sharing(offsets, columns, 32) < 0.2


def test_the_command(capsys, monkeypatch):
    monkeypatch.setitem(costs.CASES, "small", costs.neighbours(1, 8, 3, 2))
    costs.main(["--json", "--case", "small"])
    found = json.loads(capsys.readouterr().out)
    assert set(found["small"]["direct_rows"]) == set(costs.Cost.__dataclass_fields__)
    costs.main(["--case", "small"])
    assert "small: direct_rows" in capsys.readouterr().out
