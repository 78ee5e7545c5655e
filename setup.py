"""Builds the extension through CMake, against the torch that will run it; metadata: pyproject.toml.

The build links to PyTorch's stable ABI, so any torch from 2.10 on will do, and the one already
installed beside this package is taken first: an isolated build then needs no second copy of it.
Without a compiler the package installs all the same, and runs on its PyTorch reference.

Environment:
    NEFKERN_NATIVE=0         leave the extension out
    NEFKERN_NATIVE=require   fail where it cannot be built
    NEFKERN_CUDA=0           leave the CUDA kernels out; they are built where nvcc is, and torch a
                             build for the same CUDA
    NEFKERN_CUDA=require     fail where they cannot be built
    TORCH_CUDA_ARCH_LIST     what to build them for, such as "8.0;9.0a;10.0+PTX"
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
WANTED = os.environ.get("NEFKERN_NATIVE", "1")
CUDA = {"1": "require"}.get(asked := os.environ.get("NEFKERN_CUDA", "auto"), asked)


def torch_folder() -> Path | None:
    """The torch of the build's environment, else of the environment that is installed into."""
    spec = importlib.util.find_spec("torch")
    if spec and spec.submodule_search_locations:
        return Path(spec.submodule_search_locations[0])
    # pip's isolated build hides the environment's packages, but not where they are.
    beside = Path(sysconfig.get_paths()["platlib"]) / "torch"
    return beside if (beside / "include").is_dir() else None


def compiler() -> str | None:
    """A C++ compiler, or None."""
    named = os.environ.get("CXX", "").split()[:1]
    return next(
        (found for c in (*named, "c++", "g++", "clang++") if (found := shutil.which(c))), None
    )


class CMakeBuild(build_ext):
    """Let CMake build ``nefkern._C``; say in one line why where it can't."""

    def run(self) -> None:
        try:
            super().run()
        except (subprocess.CalledProcessError, FileNotFoundError, RuntimeError) as error:
            if WANTED == "require":
                raise
            self.extensions = []
            print(
                f"nefkern: extension not built ({error}); the PyTorch reference will run",
                file=sys.stderr,
            )

    def build_extension(self, ext: Extension) -> None:
        if not compiler():
            raise RuntimeError("no C++ compiler found")
        torch = torch_folder()
        if torch is None:
            raise RuntimeError("no PyTorch found")
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        started = time.monotonic()
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DNEFKERN_TORCH_DIR={torch}",
            f"-DNEFKERN_OUTPUT={output}",
            f"-DNEFKERN_VERSION={self.distribution.get_version()}",
            f"-DNEFKERN_CUDA={CUDA}",
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)
        print(f"nefkern: extension built in {time.monotonic() - started:.0f} s")


need_torch = WANTED != "0" and compiler() and torch_folder() is None
setup(
    ext_modules=[] if WANTED == "0" else [Extension("nefkern._C", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
    setup_requires=["torch>=2.10"] if need_torch else [],
)
