"""A C++ program of its own uses ``nefkern::kernels``: no PyTorch, no Python (examples/cpp)."""

from __future__ import annotations

import shutil
import subprocess

import pytest
import torch

from tests.cuda import launchers, resources

pytestmark = pytest.mark.long

if missing := next((f"no {name}" for name in ("cmake", "g++") if not shutil.which(name)), None):
    pytest.skip(missing, allow_module_level=True)


@pytest.fixture(scope="module")
def built():
    """The program, and what cmake said."""
    folder, said = launchers.build_example()
    return folder / "kappa", said


def test_it_is_configured_with_cuda_where_nvcc_is(built):
    _, said = built
    has_cuda = resources.nvcc() is not None
    assert ("nefkern: CUDA kernels by nvcc" in said) == has_cuda
    assert ("nefkern: without CUDA kernels" in said) != has_cuda


def test_it_runs(built):
    program, _ = built
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kappa 1 of a ring is 1" in done.stdout
    assert "GPU: " in done.stdout


def test_it_finds_the_installed_library(built, tmp_path):
    program, _ = built
    example = launchers.ROOT / "examples" / "cpp"
    for command in (
        ["cmake", "--install", program.parent, "--prefix", tmp_path / "installed"],
        ["cmake", "-S", example, "-B", tmp_path / "build", "-DUSE_INSTALLED=ON",
         f"-DCMAKE_PREFIX_PATH={tmp_path / 'installed'}"],
        ["cmake", "--build", tmp_path / "build"],
        [tmp_path / "build" / "kappa"],
    ):  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "kappa 1 of a ring is 1" in done.stdout
    assert ("without CUDA" in done.stdout) == (resources.nvcc() is None)


def test_it_needs_neither_pytorch_nor_python(built):
    program, _ = built
    needed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    assert "libc.so" in needed
    assert not any(name in needed for name in ("torch", "python", "cudart"))


@pytest.mark.parametrize(
    ("gpu", "architecture"),
    [
        (None, "8.0+PTX"), ((7, 5), "8.0+PTX"), ((8, 6), "8.6"), ((9, 0), "9.0a"), ((12, 0), "12.0")
    ],
)  # fmt: skip
def test_it_is_built_for_the_gpu_that_will_run_it(monkeypatch, gpu, architecture):
    """And without one so that any can compile it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: gpu)
    assert launchers.architecture() == architecture
