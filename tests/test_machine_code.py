"""Counts of machine code, on a listing of a few lines."""

from __future__ import annotations

import pytest

from bench import machine_code
from bench.machine_code import of_listing

LISTING = """
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_0:
        /*0010*/                   LDS.64 R8, [R9] ;
.L_x_1:
        /*0020*/                   HMMA.16816.F32.BF16 R12, R4, R8, R12 ;
        /*0030*/              @P1  BRA `(.L_x_1) ;
        /*0040*/              @!P0 BRA `(.L_x_0) ;
        /*0050*/                   NOP ;
        /*0060*/                   SHFL.BFLY PT, R1, R2, 0x1, 0x1f ;
        /*0070*/                   STG.E [R2], R5 ;
        /*0080*/                   EXIT ;
"""


def test_loops_count_as_often_as_they_run():
    found = of_listing(LISTING, (3, 5))
    assert found.issued == 1 + 3 * (1 + 5 * 2 + 1) + 3
    assert found.shared == 3 * 2 + 1  # 64 bits a lane are two wavefronts
    assert found.global_bytes == 32 * 16 + 32 * 4
    assert found.flops == {"BF16": 3 * 5 * 2 * 16 * 8 * 16}
    assert (found * 2).flops == {"BF16": 2 * found.flops["BF16"]}


def test_a_product_of_four_warps_is_a_quarter_for_each():
    found = of_listing("/*0000*/ HGMMA.64x32x16.F32 R24, R4, gdesc[UR8], R24 ;", ())
    assert found.flops == {"F16": 2 * 64 * 32 * 16 / 4}
    assert found.shared == 32 * 16 * 2 / 128 / 4


def test_the_interpreter_is_refused(monkeypatch, capsys):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert machine_code.main([]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err
