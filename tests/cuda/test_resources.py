"""Every CUDA kernel compiles without a warning, spills nothing, loads as widely as it claims."""

from __future__ import annotations

import re

import pytest

from tests.cuda import resources

pytestmark = pytest.mark.long

if resources.nvcc() is None:
    pytest.skip("no nvcc", allow_module_level=True)
if resources.cuobjdump() is None:
    pytest.skip("no cuobjdump (CUDA toolkit or the package triton)", allow_module_level=True)


@pytest.fixture(scope="module")
def found() -> list[resources.Resources]:
    return resources.examine_all()


def test_every_source_has_kernels(found):
    assert {r.source for r in found} == {path.stem for path in resources.sources()}
    assert {r.arch for r in found} == {f"sm_{arch}" for arch in resources.architectures()}


def test_the_architectures_are_those_that_are_built_for():
    toolkit = (resources.CSRC / "cuda" / "toolkit.cmake").read_text("utf-8")
    default = re.search(r'set\(wanted "(8\.0;[^"]*10\.0\+PTX)"\)', toolkit)[1]
    built = [one.replace(".", "").removesuffix("+PTX") for one in default.split(";")]
    assert list(resources.ARCHITECTURES) == built


def test_nothing_spills(found):
    assert [r for r in found if r.spilled] == []


def test_nothing_is_indexed_in_local_memory(found):
    """A stack frame is an array that did not fit registers: as slow as a spill."""
    assert [(r.kernel, r.arch, r.stack) for r in found if r.stack] == []


def test_static_shared_memory_fits(found):
    assert [r for r in found if r.shared > 48 << 10] == []


def test_spmm_loads_16_bytes(found):
    aligned = [r for r in found if re.search(r"spmm_rows.*Lb1E", r.kernel)]
    assert len(aligned) == 10 * len(resources.architectures())
    assert [(r.kernel, r.arch) for r in aligned if "LDG.E.128" not in r.code] == []
    by_element = [r for r in found if re.search(r"spmm_rows.*Lb0E", r.kernel)]
    assert by_element
    assert not any("LDG.E.128" in r.code for r in by_element)


def test_spmm_copies_16_bytes_into_shared_memory(found):
    shared = [r for r in found if "spmm_shared_rows" in r.kernel]
    assert len(shared) == 10 * len(resources.architectures())
    needed = r"LDGSTS\.E\.BYPASS\S*\.128"
    assert [(r.kernel, r.arch) for r in shared if not re.search(needed, r.code)] == []


def test_knn_estimates_on_tensor_cores(found):
    tiles = [r for r in found if "estimate_tiles" in r.kernel]
    assert len(tiles) == 2 * len(resources.architectures())
    for needed in (r"HMMA\.16816\.F32 ", r"LDSM\.16\.M88\.4", r"LDGSTS\.E\.BYPASS\S*\.128"):
        assert [(r.kernel, r.arch) for r in tiles if not re.search(needed, r.code)] == []


def test_knn_loads_16_bytes(found):
    exact = [r for r in found if re.search("exact_tile|rerank_rows|direct_rows", r.kernel)]
    assert len(exact) == 18 * len(resources.architectures())
    wide = r"LDG\.E\.128|LDGSTS\.E\.BYPASS\S*\.128"
    assert [(r.kernel, r.arch) for r in exact if not re.search(wide, r.code)] == []


def test_most_of_a_reranks_loop_are_its_products(found):
    """Sixteen channels of two candidates a lane with four rows: 128 multiply-adds of a warp."""
    for r in found:
        if (
            "rerank_rows" not in r.kernel
            or "KnnMetricE1" in r.kernel
            or "GroupILi1" not in r.kernel
        ):
            continue
        loop = shortest_loop(r.code, "FFMA", 100)
        assert sum("FFMA" in one for one in loop) == 128
        assert len(loop) <= 340, (r.arch, len(loop))


def shortest_loop(code: str, instruction: str, times: int) -> list[str]:
    """The instructions of the shortest loop that has this one at least so many times."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", code)
    places = {int(place, 16): text for place, text in lines}
    loops = []
    for place, text in places.items():
        if back := re.search(r"BRA.*?0x([0-9a-f]+)", text):
            first = int(back[1], 16)
            loop = [one for at, one in places.items() if first <= at <= place]
            if sum(instruction in one for one in loop) >= times:
                loops.append(loop)
    return min(loops, key=len)


def test_only_flags_are_written_atomically(found):
    """Results must not depend on the order of atomic additions: there are none in floats."""
    graph = [r for r in found if r.source in ("add", "kappa", "normalized_adjacency", "spmm")]
    assert [r.kernel for r in graph if re.search(r"\b(RED|ATOM)\S*\.F(16|32|64)", r.code)] == []


def test_report_is_read_right():
    report = (
        "ptxas info    : Compiling entry function '_Z1kv' for 'sm_80'\n"
        "ptxas info    : Function properties for _Z1kv\n"
        "    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers, 256 bytes smem, 8 bytes cmem[0]\n"
    )
    assert list(resources._parse(report)) == [("_Z1kv", 40, 256, 8, 16)]
