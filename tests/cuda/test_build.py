"""When the CUDA kernels are built, and the one line that says why not (csrc/cuda/toolkit.cmake)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "csrc" / "cuda" / "toolkit.cmake"
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
            cwd=tmp_path, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        return done.returncode, " ".join((done.stdout + done.stderr).split())

    return run


@pytest.mark.parametrize(
    ("nvcc", "torch_cuda", "options", "reason"),
    [
        ("13.0", "12.8", {}, "nvcc is of CUDA 13.0, PyTorch of CUDA 12.8"),
        ("13.0", None, {}, "is a CPU build"),
        (
            "12.9",
            "13.0",
            {},
            "nvcc is of CUDA 12.9, PyTorch of CUDA 13.0: install a CUDA toolkit 13",
        ),
        ("13.0", "13.0", "no nvcc", "no nvcc found (CUDA_HOME, PATH, /usr/local/cuda)"),
        ("11.8", "11.8", {}, "nvcc 11.8 is older than 12.0"),
        ("13.0", "13.0", {"NEFKERN_CUDA": "0"}, "NEFKERN_CUDA=0"),
        ("13.0", "13.0", {"NEFKERN_SANITIZE": "address"}, "sanitizers"),
        ("13.0", "13.0", {"arch_list": "7.0 7.5"}, "names nothing from 8.0 on"),
        ("13.0", "13.0", {"arch_list": "Turing"}, "names nothing from 8.0 on"),
    ],
)
def test_without_cuda_it_says_why(decide, tmp_path, nvcc, torch_cuda, options, reason):
    if options == "no nvcc":  # a search that finds nothing, whatever this machine has
        options = {
            "NEFKERN_NVCC": "NEFKERN_NVCC-NOTFOUND", "CMAKE_FIND_ROOT_PATH": str(tmp_path),
            "CMAKE_FIND_ROOT_PATH_MODE_PROGRAM": "ONLY",
        }  # fmt: skip
    status, said = decide(nvcc, torch_cuda, **options)
    assert status == 0, said
    assert f"without CUDA kernels: {reason}" in said or reason in said
    assert said.count("without CUDA kernels") == 1


def test_a_compiler_that_tells_no_version_is_none(decide):
    status, said = decide("", "13.0")
    assert status == 0, said
    assert "without CUDA kernels: no nvcc found" in said


@pytest.mark.parametrize("wanted", ["require", "1"])
def test_what_is_asked_for_and_cannot_be_built_is_an_error(decide, wanted):
    status, said = decide("13.0", "12.8", NEFKERN_CUDA=wanted)
    assert status != 0
    assert "CUDA kernels cannot be built: nvcc is of CUDA 13.0, PyTorch of CUDA 12.8" in said
    assert "CMake Error" in said


def test_an_arch_list_that_makes_no_sense_is_an_error(decide):
    status, said = decide("13.0", "13.0", arch_list="9.0;hopper")
    assert status != 0
    assert "expected entries such as 9.0a or 10.0+PTX, got hopper" in said


@pytest.mark.parametrize(
    ("asked", "architectures"),
    [
        (None, "80-real;86-real;89-real;90a-real;100-real;100-virtual"),
        ("8.0", "80-real"),
        ("7.5 8.0,9.0a;10.0+PTX", "80-real;90a-real;100-real;100-virtual"),
        ("Ampere;Hopper", "80-real;86-real;86-virtual;90-real;90-virtual"),
        ("Ampere+Tegra Ada", "87-real;89-real;89-virtual"),
    ],
)
def test_architectures_are_named_as_in_pytorch(tmp_path, asked, architectures):
    script = tmp_path / "show.cmake"
    # NEFKERN_CUDA=0: the macro is there, and no compiler is asked for.
    script.write_text(
        f"""include("{SCRIPT}")
        set(NEFKERN_NVCC_VERSION 13.0)
        nefkern_cuda_architectures(found)
        message("architectures: ${{found}}")
        """
    )
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_CUDA_ARCH_LIST"}
    if asked:
        environment["TORCH_CUDA_ARCH_LIST"] = asked
    done = subprocess.run(
        ["cmake", "-DNEFKERN_CUDA=0", "-P", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"architectures: {architectures}\n" in done.stderr


@pytest.fixture
def build_extension(tmp_path):
    """build_extension(**environment): setup.py's build with a cmake that only writes its calls."""
    cmake = tmp_path / "bin" / "cmake"
    cmake.parent.mkdir()
    cmake.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nexit ${{CMAKE_FAILS:-0}}\n')
    cmake.chmod(0o755)

    def run(**environment: str) -> tuple[subprocess.CompletedProcess, str]:
        folders = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
        path = f"{cmake.parent}{os.pathsep}{os.environ['PATH']}"
        kept = {k: v for k, v in os.environ.items() if not k.startswith("NEFKERN_")}
        done = subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", *folders],
            cwd=ROOT, env={**kept, "PATH": path, **environment}, capture_output=True, text=True,
        )  # fmt: skip
        return done, (tmp_path / "calls").read_text()

    return run


def test_the_build_tells_its_time(build_extension):
    done, _ = build_extension()
    assert done.returncode == 0, done.stderr
    assert re.search(r"^nefkern: extension built in \d+ s$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("asked", "passed"), [(None, "auto"), ("0", "0"), ("1", "require"), ("require", "require")]
)
def test_what_is_asked_for_reaches_cmake(build_extension, asked, passed):
    _, calls = build_extension(**({"NEFKERN_CUDA": asked} if asked else {}))
    assert f"-DNEFKERN_CUDA={passed} " in calls.replace("\n", " ")


def test_a_failing_build_is_an_error_where_it_is_required(build_extension):
    done, _ = build_extension(CMAKE_FAILS="1")
    assert done.returncode == 0
    assert "nefkern: extension not built" in done.stderr
    done, _ = build_extension(CMAKE_FAILS="1", NEFKERN_NATIVE="require")
    assert done.returncode != 0
