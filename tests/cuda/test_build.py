"""When the CUDA kernels are built, and the one line that says why not (csrc/cuda/toolkit.cmake)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "csrc" / "cuda" / "toolkit.cmake"
if not shutil.which("cmake"):
    pytest.skip("no cmake", allow_module_level=True)


@pytest.fixture
def decide(tmp_path):
    """decide(nvcc, torch_cuda, **options): cmake's exit status and what it says."""

    def run(nvcc: str, torch_cuda: str | None, arch_list: str | None = None, **options: str):
        compiler = tmp_path / "nvcc"
        compiler.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {nvcc}, V{nvcc}'\n")
        compiler.chmod(0o755)
        version = "None" if torch_cuda is None else repr(torch_cuda)
        (tmp_path / "version.py").write_text(f"cuda: Optional[str] = {version}\n")
        environment = {k: v for k, v in os.environ.items() if k != "TORCH_CUDA_ARCH_LIST"}
        if arch_list is not None:
            environment["TORCH_CUDA_ARCH_LIST"] = arch_list
        options = {"NEFKERN_NVCC": str(compiler), "NEFKERN_TORCH_DIR": str(tmp_path), **options}
        done = subprocess.run(
            ["cmake", *(f"-D{k}={v}" for k, v in options.items()), "-P", str(SCRIPT)],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        return done.returncode, " ".join((done.stdout + done.stderr).split())

    return run


@pytest.mark.parametrize(
    ("nvcc", "torch_cuda", "options", "reason"),
    [
        ("13.0", "12.8", {}, "nvcc is of CUDA 13.0, PyTorch of CUDA 12.8"),
        ("13.0", None, {}, "is a CPU build"),
        ("11.8", "11.8", {}, "nvcc 11.8 is older than 12.0"),
        ("13.0", "13.0", {"NEFKERN_CUDA": "0"}, "NEFKERN_CUDA=0"),
        ("13.0", "13.0", {"NEFKERN_SANITIZE": "address"}, "sanitizers"),
        ("13.0", "13.0", {"arch_list": "7.0 7.5"}, "names nothing from 8.0 on"),
    ],
)
def test_without_cuda_it_says_why(decide, nvcc, torch_cuda, options, reason):
    status, said = decide(nvcc, torch_cuda, **options)
    assert status == 0, said
    assert f"without CUDA kernels: {reason}" in said or reason in said
    assert said.count("without CUDA kernels") == 1


@pytest.mark.parametrize("wanted", ["require", "1"])
def test_what_is_asked_for_and_cannot_be_built_is_an_error(decide, wanted):
    status, said = decide("13.0", "12.8", NEFKERN_CUDA=wanted)
    assert status != 0
    assert "CUDA kernels cannot be built: nvcc is of CUDA 13.0, PyTorch of CUDA 12.8" in said


def test_an_arch_list_that_makes_no_sense_is_an_error(decide):
    status, said = decide("13.0", "13.0", arch_list="9.0;hopper")
    assert status != 0
    assert "expected entries such as 9.0a or 10.0+PTX, got hopper" in said
