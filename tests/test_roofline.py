"""The estimates of docs/gpu.md: their arithmetic, and that the page holds what the script says."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

pytest.importorskip("triton")
from bench.roofline import __main__ as command
from bench.roofline import counts, model, sizes, training_step
from bench.roofline.__main__ import written
from bench.roofline.model import Kernel
from bench.roofline.resources import condensed
from bench.roofline.tables import estimates
from nefkern.runtime.errors import UserError
from nefkern.spectral.eigenfunction import Eigenfunction, EigenfunctionConfig
from nefkern.triton import linear_attention as attention
from nefkern.triton import rates
from nefkern.triton.rates import A100, B200, GPUS, H100, H200, RTX_3090, RTX_4090, Gpu, rates_of
from nefkern.triton.resources import LIMITS, Resources

#: 100 flop/s in half precision, 10 in float32; 10 bytes/s from memory, 100 from a cache of 50.
#: Its 4 multiprocessors start 4 instructions each in a clock of 5 Hz.
SLOW = Gpu("slow", "sm_80", 100.0, 50.0, 10.0, 5.0, 10.0, 100.0, 50.0, 4, 5.0)


def test_floor_is_the_longer_of_arithmetic_and_memory():
    kernel = Kernel("ψ", "x", "stream", {"half": 200.0, "float32": 10.0}, moved=20.0)
    assert kernel.floor(SLOW) == pytest.approx(3.0)  # 2 s and 1 s, one after the other
    assert dataclasses.replace(kernel, moved=50.0).floor(SLOW) == pytest.approx(5.0)


def test_expected_is_the_slowest_of_three_and_the_launches():
    kernel = Kernel("ψ", "x", "library product", {"half": 65.0}, launches=2)
    assert kernel.expected(SLOW) == pytest.approx(1.0 + 2 * model.LAUNCH)
    moved = dataclasses.replace(kernel, moved=16.0)
    assert moved.expected(SLOW) == pytest.approx(2.0 + 2 * model.LAUNCH)
    cached = dataclasses.replace(moved, cached=180.0, resident=50.0)
    assert cached.expected(SLOW) == pytest.approx(3.0 + 2 * model.LAUNCH)
    # Half of it no longer fits: 90 bytes more come from memory.
    missed = dataclasses.replace(cached, resident=100.0)
    assert missed.expected(SLOW) == pytest.approx((16 + 90) / 8 + 2 * model.LAUNCH)


def test_shared_memory_and_issue_slots_may_be_the_slowest():
    kernel = Kernel("κ", "x", "selection", shared=160.0, issued=240.0)
    launch = model.LAUNCH
    assert kernel.expected(SLOW) == pytest.approx(160 / 20 / model.SHARED + launch)
    assert kernel.limit(SLOW) == "shared"
    issued = dataclasses.replace(kernel, issued=1600.0)
    assert issued.expected(SLOW) == pytest.approx(1600 / 80 / model.ISSUE + launch)
    assert issued.limit(SLOW) == "issue"
    assert issued.least(SLOW) == pytest.approx(20 * model.UNROLLED + model.SHORT_LAUNCH)
    assert dataclasses.replace(kernel, issued=0.0).least(SLOW) == pytest.approx(8.0)


def test_counts_are_those_of_the_emulator(monkeypatch):
    cost = {"shared_wavefronts": 10.0, "shuffles": 1.0, "issued": 5.0}
    monkeypatch.setattr(counts, "counts", lambda: {"a case": {"a_kernel": cost}})
    assert counts.counted("a case", "a_kernel", 2) == {"shared": 22.0, "issued": 10.0}


def test_at_the_least_a_first_level_cache_keeps_what_a_block_has_read(monkeypatch):
    cost = {"shared_wavefronts": 1.0, "shuffles": 1.0, "lines": 2.0, "issued": 5.0,
            "sectors_read": 3.0, "sectors_once": 1.0, "sectors_written": 2.0}  # fmt: skip
    monkeypatch.setattr(counts, "counts", lambda: {"a case": {"a_kernel": cost}})
    found = counts.counted_whole("a case", "a_kernel", 2)
    assert found == {"shared": 8.0, "issued": 10.0, "cached": 320.0, "cached_once": 192.0}
    kernel = Kernel("κ", "x", "gather", cached=300.0, cached_once=180.0, resident=100.0)
    # Half of either misses a cache of 50 bytes: memory is slower than the cache.
    assert kernel.least(SLOW) == pytest.approx(90 / 10 + model.SHORT_LAUNCH)
    assert kernel.expected(SLOW) == pytest.approx(150 / 8 + model.LAUNCH)


@pytest.mark.parametrize("amp", [False, True])
def test_no_kernel_is_expected_below_its_floor(amp):
    for kernel in training_step.step(amp):
        for gpu in GPUS:
            assert kernel.expected(gpu) > kernel.least(gpu) > kernel.floor(gpu), kernel.name


@pytest.mark.parametrize("amp", [False, True])
def test_attention_is_at_most_three_times_its_floor(amp):
    kernel = training_step.attention(amp)
    for gpu in GPUS:
        assert kernel.expected(gpu) <= 3 * kernel.floor(gpu), gpu.name


def test_code_is_of_the_architecture_it_is_asked_for():
    kernel = Kernel("ψ", "x", "stream", shared=1.0, issued=240.0, code={"sm_80": (2.0, 4800.0)})
    on_it, other = SLOW, dataclasses.replace(SLOW, arch="sm_90")
    assert kernel.expected(on_it) == pytest.approx(60 / model.ISSUE + model.LAUNCH)
    assert kernel.least(on_it) == pytest.approx(60 * model.UNROLLED + model.SHORT_LAUNCH)
    assert kernel.expected(other) == pytest.approx(3 / model.ISSUE + model.LAUNCH)


def test_the_attention_that_was_counted_is_the_one_that_ships():
    """Its tiles by the architecture; counted anew by python -m bench.machine_code."""
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        pytest.skip("the tiles that were counted are those of later Tritons")
    counted = json.loads(counts.ATTENTION.read_text("utf-8"))
    assert set(counted) == set(LIMITS)
    for arch, by_dtype in counted.items():
        for dtype, kernels in by_dtype.items():
            title = f" softmax {dtype} D = {sizes.HEAD_DIM}, multiples of 16"
            tiles = {
                kernel.kernel.__name__: kernel.constexprs["BT"]
                for kernel in attention.shipped()
                if title in kernel.name and arch in kernel.architectures
            }
            assert {name: its["tokens"] for name, its in kernels.items()} == tiles
            assert not any(its["spilled"] for its in kernels.values())


def test_psi_is_counted_as_it_is_built():
    with torch.device("meta"):
        psi = Eigenfunction(sizes.WIDTH, EigenfunctionConfig(orthogonal=False))
    assert training_step.psi_parameters() == sum(p.numel() for p in psi.parameters())
    products = sum(m.weight.numel() for m in psi.modules() if isinstance(m, torch.nn.Linear))
    assert training_step.psi_flops() == 2 * sizes.N * products
    assert psi.blocks[0].attention.heads == sizes.HEADS


def test_the_backbone_is_counted_as_timm_builds_it():
    timm = pytest.importorskip("timm")
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        vit = timm.create_model("vit_small_patch16_384", img_size=480, num_classes=0)
        for block in vit.blocks:
            block.attn.fused_attn = False
        with FlopCounterMode(display=False) as counter:
            vit(torch.empty(sizes.B, 3, 480, 480))
    assert training_step.backbone_flops() == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_rates_have_the_architectures_that_kernels_are_compiled_for():
    assert {gpu.arch for gpu in GPUS} <= set(LIMITS)
    assert rates_of(torch.device("cpu")) is A100


@pytest.mark.parametrize(
    ("name", "capability", "gpu"),
    [
        ("NVIDIA H200", (9, 0), H200),
        ("NVIDIA H100 80GB HBM3", (9, 0), H100),
        ("NVIDIA GH200 480GB", (9, 0), H100),
        ("NVIDIA A100-SXM4-40GB", (8, 0), A100),
        ("NVIDIA GeForce RTX 3090 Ti", (8, 6), RTX_3090),
        ("NVIDIA RTX A6000", (8, 6), RTX_3090),
        ("NVIDIA B200", (10, 0), B200),
        ("NVIDIA GeForce RTX 4090", (8, 9), RTX_4090),
        ("Tesla T4", (7, 5), A100),
    ],
)
def test_a_gpu_is_known_by_its_name_else_by_its_capability(monkeypatch, name, capability, gpu):
    monkeypatch.setattr(rates.torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(rates.torch.cuda, "get_device_capability", lambda device: capability)
    assert rates_of(torch.device("cuda")) is gpu


def row(name, arch="sm_80", **changes):
    usual = Resources(name, arch, 32, 0, 2048, 0.5, "HMMA", True)
    return dataclasses.replace(usual, **changes)


def test_condensed_keeps_the_worst_of_each_kernel():
    found = [
        row("knn score 128 x 128, 8 warps", registers=100, occupancy=0.25),
        row("knn score 64 x 128, 4 warps", shared=4096, spilled=8),
        row("knn score 64 x 128, 4 warps", "sm_90", instruction="HGMMA"),
        row("knn select", instruction="", product=False),
        row("spmm float32, 16 x 256", instruction="", product=False),
        row("spmm bfloat16, 16 x 256", instruction="", product=False, registers=40),
    ]
    assert condensed(found).splitlines()[2:] == [
        "| knn score | sm_80 | 2 | 100 | 4.0 KiB | 25% | 8 B | HMMA |",
        "| knn score | sm_90 | 1 | 32 | 2.0 KiB | 50% | 0 B | HGMMA |",
        "| knn select | sm_80 | 1 | 32 | 2.0 KiB | 50% | 0 B |  |",
        "| spmm | sm_80 | 2 | 40 | 2.0 KiB | 50% | 0 B |  |",
    ]
    assert "**none**" in condensed([row("knn score", instruction="")])


def test_the_page_is_what_the_script_writes():
    page = command.PAGE.read_text("utf-8")
    assert written(page, "estimates", estimates()) == page
    changed = written(page, "resources", "a table")
    assert "a table" in changed
    assert written(changed, "estimates", estimates()) == changed


def test_a_page_without_markers_is_refused():
    with pytest.raises(UserError, match=r"gpu\.md: expected the lines <!-- estimates"):
        written("no markers", "estimates", "table")


def test_the_resources_are_refused_in_the_interpreter(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert command.main(["--resources"]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err
