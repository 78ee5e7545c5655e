"""When the extension (setup.py) and its CUDA kernels (csrc/cuda/toolkit.cmake) are built, and the
one line that says why not."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "csrc" / "cuda" / "toolkit.cmake"
if not shutil.which("cmake"):
    pytest.skip("no cmake", allow_module_level=True)


@pytest.fixture
def decide(tmp_path):
    """decide(nvcc, torch_cuda, **options): cmake's exit status and what it says, without GPUs."""

    def run(nvcc: str, torch_cuda: str | None, arch_list: str | None = None, **options: str):
        compiler = tmp_path / "nvcc"
        compiler.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {nvcc}, V{nvcc}'\n")
        compiler.chmod(0o755)
        version = "None" if torch_cuda is None else repr(torch_cuda)
        (tmp_path / "version.py").write_text(f"cuda: Optional[str] = {version}\n")
        environment = {k: v for k, v in os.environ.items() if k != "TORCH_CUDA_ARCH_LIST"}
        if arch_list is not None:
            environment["TORCH_CUDA_ARCH_LIST"] = arch_list
        options = {
            "NEFKERN_NVCC": str(compiler), "NEFKERN_TORCH_DIR": str(tmp_path),
            "NEFKERN_NVIDIA_SMI": "false", **options,
        }  # fmt: skip
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


@pytest.fixture
def architectures(tmp_path):
    """architectures(...): what is built for, where nvcc 13.0 knows sm_80 to sm_120."""

    def find(environment=None, remembered=None, gpus=None, nvcc="13.0") -> str:
        def program(name: str, says: str | None) -> Path:
            path = tmp_path / name
            text = "exit 9" if says is None else f"printf '{says}'"
            path.write_text(f"#!/bin/sh\n{text}\n")
            path.chmod(0o755)
            return path

        script = tmp_path / "show.cmake"
        # NEFKERN_CUDA=0: the macro is there, and no compiler is asked for.
        script.write_text(
            f"""include("{SCRIPT}")
            set(NEFKERN_NVCC_VERSION {nvcc})
            nefkern_cuda_architectures(found)
            message("architectures: ${{found}}")
            """
        )
        knows = "".join(f"sm_{arch}\\n" for arch in (80, 86, 89, 90, 100, 120))
        defined = {
            "NEFKERN_CUDA": "0",
            "NEFKERN_NVCC": program("nvcc", knows),
            "NEFKERN_NVIDIA_SMI": program("nvidia-smi", gpus),
            **({"TORCH_CUDA_ARCH_LIST": remembered} if remembered is not None else {}),
        }
        kept = {k: v for k, v in os.environ.items() if k != "TORCH_CUDA_ARCH_LIST"}
        asked = {} if environment is None else {"TORCH_CUDA_ARCH_LIST": environment}
        done = subprocess.run(
            ["cmake", *(f"-D{k}={v}" for k, v in defined.items()), "-P", script],
            cwd=tmp_path, env={**kept, **asked}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stderr.rpartition("architectures: ")[2].rstrip("\n")

    return find


ALL = "80-real;86-real;89-real;90a-real;100-real;100-virtual"


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (None, ALL),
        ("", ALL),
        ("8.0", "80-real"),
        ("7.5 8.0,9.0a;10.0+PTX", "80-real;90a-real;100-real;100-virtual"),
        ("Ampere;Hopper", "80-real;86-real;86-virtual;90-real;90-virtual"),
        ("Ampere+Tegra Ada", "87-real;89-real;89-virtual"),
    ],
)
def test_architectures_are_named_as_in_pytorch(architectures, asked, expected):
    assert architectures(asked) == expected


def test_an_older_nvcc_knows_no_blackwell(architectures):
    assert architectures(nvcc="12.4") == "80-real;86-real;89-real;90a-real;90-real;90-virtual"


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        ("9.0\\n9.0\\n", "90a-real"),
        ("8.6\\n7.5\\n12.0\\n", "86-real;120-real"),
        ("7.5\\n", ALL),  # nothing to build for here: for elsewhere
        ("10.3\\n", ALL),  # newer than nvcc: compiled from PTX
        ("No devices were found\\n", ALL),
        (None, ALL),
    ],
)
def test_by_default_they_are_those_of_the_gpus_here(architectures, gpus, expected):
    assert architectures(gpus=gpus) == expected


def test_what_is_asked_for_goes_before_the_gpus_here_and_what_is_remembered(architectures):
    assert architectures("8.0", gpus="9.0\\n") == "80-real"
    assert architectures(None, "8.9", gpus="9.0\\n") == "89-real"
    assert architectures("8.0", "8.9") == "80-real"
    assert architectures(None, "", gpus="9.0\\n") == "90a-real"  # setup.py: nothing is asked for


def test_the_list_of_architectures_outlives_the_environment_it_came_from(tmp_path):
    """A second run of cmake in the same folder, from a shell without the variable."""
    (tmp_path / "CMakeLists.txt").write_text(
        f"""cmake_minimum_required(VERSION 3.22)
        project(remembers NONE)
        set(NEFKERN_CUDA 0)
        include("{SCRIPT}")
        nefkern_cuda_architectures(found)
        message(STATUS "architectures: ${{found}}")
        """
    )
    without = {k: v for k, v in os.environ.items() if k != "TORCH_CUDA_ARCH_LIST"}
    for environment in ({**without, "TORCH_CUDA_ARCH_LIST": "9.0a;8.0+PTX"}, without):
        done = subprocess.run(
            ["cmake", "-S", tmp_path, "-B", tmp_path / "build"],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert "architectures: 90a-real;80-real;80-virtual\n" in done.stdout


@pytest.fixture
def build_extension(tmp_path):
    """build_extension(**environment): setup.py's build with a cmake that writes its calls, says
    ``CMAKE_SAYS`` and ends with ``CMAKE_FAILS``."""
    cmake = tmp_path / "bin" / "cmake"
    cmake.parent.mkdir()
    cmake.write_text(
        f'#!/bin/sh\necho "$@" >> "{tmp_path}/calls"\n'
        'printf "%b" "$CMAKE_SAYS"\nexit ${CMAKE_FAILS:-0}\n'
    )
    (cmake.parent / "ninja").write_text("#!/bin/sh\n")
    for program in cmake.parent.iterdir():
        program.chmod(0o755)

    def run(**environment: str) -> tuple[subprocess.CompletedProcess, str]:
        folders = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
        path = f"{cmake.parent}{os.pathsep}{os.environ['PATH']}"
        kept = {k: v for k, v in os.environ.items() if not k.startswith("NEFKERN_")}
        done = subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", *folders],
            cwd=ROOT, env={**kept, "PATH": path, **environment}, capture_output=True, text=True,
        )  # fmt: skip
        calls = tmp_path / "calls"
        return done, calls.read_text("utf-8") if calls.exists() else ""

    return run


@pytest.fixture
def recorded(tmp_path):
    """recorded(): the reason that the built package gives for having no extension, or None."""

    def read() -> str | None:
        path = tmp_path / "lib" / "nefkern" / "_build.json"
        return json.loads(path.read_text("utf-8"))["reason"] if path.exists() else None

    return read


@pytest.fixture
def setup_py(monkeypatch):
    """The functions of setup.py."""
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.setattr(setuptools, "setup", lambda **metadata: None)
    return SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py")))


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


GCC = (
    "[1/2] Building CXX object a.o\\nFAILED: a.o\\nc++ -Werror -c a.cpp\\nfrom b.h:\\n"
    f"{ROOT}/csrc/a.cpp:3:2: error: no such thing\\n{ROOT}/csrc/a.cpp:9:1: error: another\\n"
    "ninja: build stopped: subcommand failed.\\n"
)


def test_a_failing_build_leaves_its_first_error_in_the_package(build_extension, recorded):
    done, _ = build_extension(CMAKE_FAILS="1", CMAKE_SAYS=GCC)
    assert (
        recorded() == f"against PyTorch {torch.__version__}: csrc/a.cpp:3:2: error: no such thing"
    )
    assert recorded() in done.stderr
    assert "error: another" in done.stdout  # for pip install -v
    build_extension()
    assert recorded() is None


def test_a_failing_build_leaves_no_earlier_module(build_extension, tmp_path):
    module = tmp_path / "lib" / "nefkern" / "_C.abi3.so"
    module.parent.mkdir(parents=True)
    module.touch()
    build_extension()
    assert module.exists()
    build_extension(CMAKE_FAILS="1")
    assert not module.exists()


def test_a_build_leaves_no_module_that_would_be_found_before_it(build_extension, tmp_path):
    earlier = tmp_path / "lib" / "nefkern" / "_C.cpython-311-x86_64-linux-gnu.so"
    earlier.parent.mkdir(parents=True)
    earlier.touch()
    build_extension()
    assert not earlier.exists()


@pytest.mark.parametrize("lost", ["cmake", "ninja"])
def test_a_tool_that_is_missing_is_named(setup_py, monkeypatch, tmp_path, lost):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / name))
    with pytest.raises(setup_py.BuildError, match=f"no {lost} found; pip install cmake ninja"):
        setup_py.tool(lost)


def test_a_tool_of_the_environment_need_not_be_on_the_path(setup_py, monkeypatch, tmp_path):
    """``/some/venv/bin/pip install --no-build-isolation``."""
    monkeypatch.setenv("PATH", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / name))
    program = tmp_path / "scripts" / "cmake"
    program.parent.mkdir()
    program.touch(0o755)
    assert setup_py.tool("cmake") == str(program)


def test_without_a_compiler_that_is_the_reason(build_extension, recorded, tmp_path):
    done, calls = build_extension(PATH=str(tmp_path / "bin"), CXX="")
    assert done.returncode == 0, done.stderr
    assert recorded() == "no C++ compiler found (CXX, c++, g++, clang++)"
    assert not calls


def test_without_the_extension_by_choice_that_is_the_reason(tmp_path, recorded):
    earlier = tmp_path / "lib" / "nefkern" / "_C.cpython-311-x86_64-linux-gnu.so"
    earlier.parent.mkdir(parents=True)
    earlier.touch()
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-base", tmp_path / "base",
         "--build-lib", tmp_path / "lib"],
        cwd=ROOT, env={**os.environ, "NEFKERN_NATIVE": "0"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert recorded() == "NEFKERN_NATIVE=0"
    assert not earlier.exists()


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("a\nk.cu(7): error: identifier\n", "k.cu(7): error: identifier"),
        ("k.cu(7): error #20: identifier\n", "k.cu(7): error #20: identifier"),
        ("ptxas error   : too much data\n", "ptxas error   : too much data"),
        ("k.s:7: Error: no such instruction\n", "k.s:7: Error: no such instruction"),
        ("c++: fatal error: Killed signal\n", "c++: fatal error: Killed signal"),
        ("/bin/sh: 1: ccache: not found\nninja: stopped\n", "/bin/sh: 1: ccache: not found"),
        ("/usr/bin/ld: a.o: undefined reference to `f'\n", "ld: a.o: undefined reference to `f'"),
        ("/usr/bin/ld: cannot find -ltorch\nx: error: ld\n", "ld: cannot find -ltorch"),
        (
            "/p/python: No module named somewhere\nCMake Error at CMakeLists.txt:9 (execute):\n",
            "python: No module named somewhere",
        ),
        (
            "--\nCMake Error at a.cmake:3 (message):\n  nefkern: no nvcc\n  found\n\n\n-- rest\n",
            "a.cmake:3 (message): nefkern: no nvcc found",
        ),
        (
            "CMake Error at a.cmake:3 (message):\n  no nvcc\nCall Stack (most recent call first):\n"
            "  CMakeLists.txt:80 (include)\n",
            "(message): no nvcc",
        ),
        ("-- one\nSegmentation fault\n\n", "Segmentation fault"),
        ("", "no output"),
    ],
)
def test_the_first_error_of_a_build(setup_py, output, reason):
    assert setup_py.first_error(output).endswith(reason)


@pytest.mark.parametrize(
    ("version", "usable"),
    [("2.9.1", False), ("2.10.0+cu128", True), ("3.0.0a0+git1", True), ("1.13.1", False)],
)
def test_a_torch_that_is_too_old_is_none(setup_py, monkeypatch, tmp_path, version, usable):
    folder = tmp_path / "torch"
    (folder / "include").mkdir(parents=True)
    (folder / "version.py").write_text(f"from typing import Optional\n__version__ = '{version}'\n")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"platlib": str(tmp_path)})
    assert setup_py.torch_version(folder) == version
    assert setup_py.torch_folder() == (folder if usable else None)
