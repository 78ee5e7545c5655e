"""Builds the extension through CMake, against the torch that will run it; metadata: pyproject.toml.

The build links to PyTorch's stable ABI and Python's limited API, so any torch from 2.10 on and any
Python from 3.10 on will do, with one wheel. The torch already
installed beside this package is taken first: an isolated build then needs no second copy of it.
Where the extension cannot be built the package installs all the same, and runs on its PyTorch
reference. pip shows nothing of a build that succeeds, so the reason goes into the package
(``_build.json``): ``python -m nefkern.info`` tells it, and so does the first call that is slower
for it.

Environment:
    NEFKERN_NATIVE=0         leave the extension out
    NEFKERN_NATIVE=require   fail where it cannot be built; pip then shows all that the build said
    NEFKERN_CUDA=0           leave the CUDA kernels out; they are built where nvcc is, and torch a
                             build for the same CUDA
    NEFKERN_CUDA=require     fail where they cannot be built
    NEFKERN_LABEL            local version of a variant's wheel, such as cu130
    TORCH_CUDA_ARCH_LIST     what to build them for, such as "8.0;9.0a;10.0+PTX"; by default the
                             GPUs of this machine, and where there are none, all from 8.0 on
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.egg_info import egg_info
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
WANTED = os.environ.get("NEFKERN_NATIVE", "1")
CUDA = {"1": "require"}.get(asked := os.environ.get("NEFKERN_CUDA", "auto"), asked)
OLDEST_TORCH = (2, 10)
#: Whether one build serves all versions of Python: one without a global lock has no such API.
LIMITED = not sysconfig.get_config_var("Py_GIL_DISABLED")
#: Of the source archive, beside the package.
SOURCES = (
    *("CMakeLists.txt", "Makefile", "*.md", "CITATION.cff", "mkdocs.yml", "Dockerfile", ".ci/*"),
    *("csrc/**/*", "tests/**/*", "bench/**/*", "docs/**/*", "examples/**/*"),
)
LEFT_OUT = {"__pycache__", "gallery", "results", "runs", "build"}
#: In the package: why it has no extension. Read by nefkern/backends.py.
RECORD = "_build.json"


class BuildError(RuntimeError):
    """Why the extension cannot be built, in one line."""


def torch_folder() -> Path | None:
    """The torch of the build's environment, else of the environment that is installed into; one
    that is too old counts as none."""
    found = []
    spec = importlib.util.find_spec("torch")
    if spec and spec.submodule_search_locations:
        found.append(Path(spec.submodule_search_locations[0]))
    # pip's isolated build hides the environment's packages, but not where they are.
    found.append(Path(sysconfig.get_paths()["platlib"]) / "torch")
    return next((folder for folder in found if is_new_enough(torch_version(folder))), None)


def torch_version(folder: Path) -> str:
    """Of the torch in a folder, such as "2.11.0+cu130"; "" where there is none with headers."""
    try:
        text = (folder / "version.py").read_text("utf-8")
    except OSError:
        return ""
    match = re.search(r"^__version__.*?['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return match[1] if match and (folder / "include").is_dir() else ""


def is_new_enough(version: str) -> bool:
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return numbers is not None and tuple(map(int, numbers.groups())) >= OLDEST_TORCH


def compiler() -> str | None:
    """A C++ compiler, or None."""
    named = os.environ.get("CXX", "").split()[:1]
    return next(
        (found for c in (*named, "c++", "g++", "clang++") if (found := shutil.which(c))), None
    )


def tool(name: str) -> str:
    """A program that pip installs; also from the environment's own folder, which need not be on
    PATH where pip was called by its path and told not to isolate the build."""
    found = shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))
    if not found:
        raise BuildError(f"no {name} found; pip install cmake ninja brings what is needed")
    return found


#: How compilers, assemblers, linkers, shells and Python begin to complain.
COMPLAINT = re.compile(
    r"\berror\s*(#\d+)?: |: undefined reference|cannot find -l|: not found$|: No module named",
    re.IGNORECASE,
)


def first_error(output: str) -> str:
    """The line of a build's output that says what is wrong: the first error, else the last line."""
    lines = output.splitlines()
    for i, line in enumerate(lines):
        if line.startswith("CMake Error"):
            return shortened(" ".join([line, *indented(lines[i + 1 :])]))
        if COMPLAINT.search(line):
            return shortened(line)
    return shortened(next((line for line in reversed(lines) if line.strip()), "no output"))


def indented(lines: list[str]) -> list[str]:
    """The paragraph that CMake's errors are written as, below their place."""
    text = itertools.dropwhile(lambda line: not line.strip(), lines)
    return [line.strip() for line in itertools.takewhile(lambda line: line.startswith("  "), text)]


def shortened(line: str, limit: int = 400) -> str:
    """Without the folder of the sources."""
    return line.strip().replace(f"{ROOT}{os.sep}", "")[:limit]


def run(command: list[str]) -> None:
    """Run a step of the build and show its output; BuildError with its first error."""
    said = []
    environment = {**os.environ, "LC_ALL": "C"}  # errors in the words that are looked for
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, encoding="utf-8", errors="replace",
    ) as process:  # fmt: skip
        for line in process.stdout:
            said.append(line)
            print(line.encode("ascii", "replace").decode(), end="", flush=True)
    if process.returncode:
        raise BuildError(first_error("".join(said)))


def record(reason: str | None, *packages: Path) -> None:
    """Write why there is no extension into folders of the package; None: there is one."""
    for package in packages:
        if reason is None:
            (package / RECORD).unlink(missing_ok=True)
        else:
            package.mkdir(parents=True, exist_ok=True)
            (package / RECORD).write_text(json.dumps({"reason": reason}) + "\n")


def forget_module(built: Path, but: str = "") -> None:
    """An earlier build's module must not be packed beside newer sources, nor, if it is for one
    Python alone, be found before one for all."""
    for module in (built / "nefkern").glob("_C.*"):
        if module.name != but:
            module.unlink()


class CMakeBuild(build_ext):
    """Let CMake build ``nefkern._C``; say in one line why where it can't."""

    def run(self) -> None:
        # Editable: built elsewhere and copied here.
        packages = [Path(self.build_lib) / "nefkern", *([ROOT / "nefkern"] if self.inplace else [])]
        try:
            super().run()
        except (BuildError, OSError) as error:
            if WANTED == "require":
                raise
            self.extensions = []
            forget_module(Path(self.build_lib))
            record(str(error), *packages)
            print(
                f"nefkern: extension not built ({error}); the PyTorch reference will run",
                file=sys.stderr,
            )
        else:
            record(None, *packages)
            for package in packages:
                forget_module(package.parent, but=Path(self.get_ext_filename("nefkern._C")).name)

    def build_extension(self, ext: Extension) -> None:
        if not compiler():
            raise BuildError("no C++ compiler found (CXX, c++, g++, clang++)")
        torch = torch_folder()
        if torch is None:
            raise BuildError("no PyTorch found that is 2.10 or newer")
        cmake, ninja = tool("cmake"), tool("ninja")
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        started = time.monotonic()
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DNEFKERN_TORCH_DIR={torch}",
            f"-DNEFKERN_OUTPUT={output}",
            f"-DNEFKERN_CUDA={CUDA}",
            # Also empty: the folder may remember another build's.
            f"-DTORCH_CUDA_ARCH_LIST={os.environ.get('TORCH_CUDA_ARCH_LIST', '')}",
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]  # fmt: skip
        try:
            run(configure)
            run([cmake, "--build", str(build)])
        except BuildError as error:
            raise BuildError(f"against PyTorch {torch_version(torch)}: {error}") from None
        print(f"nefkern: extension built in {time.monotonic() - started:.0f} s")


class LeaveOut(build_py):
    """Without the extension by choice, which the package remembers too."""

    def run(self) -> None:
        super().run()
        forget_module(Path(self.build_lib))
        folder = ROOT if self.editable_mode else Path(self.build_lib)
        record(f"NEFKERN_NATIVE={WANTED}", folder / "nefkern")


class SourceArchive(sdist):
    """With all that builds and tests the package; setuptools knows of Python modules only."""

    def make_distribution(self) -> None:
        found = (path for pattern in SOURCES for path in ROOT.glob(pattern) if path.is_file())
        relative = (path.relative_to(ROOT) for path in found)
        self.filelist.extend(sorted(str(p) for p in relative if not LEFT_OUT & set(p.parts)))
        self.filelist.remove_duplicates()
        super().make_distribution()


class Labelled(egg_info):
    """Adds a variant's label to the version. An option of setup() would not do: a source archive
    has a setup.cfg, in which setuptools wrote an empty tag, and that is read over it."""

    def finalize_options(self) -> None:
        if label := os.environ.get("NEFKERN_LABEL"):
            self.tag_build = f"+{label}"
        super().finalize_options()


need_torch = WANTED != "0" and compiler() and torch_folder() is None
setup(
    ext_modules=[]
    if WANTED == "0"
    else [Extension("nefkern._C", sources=[], optional=True, py_limited_api=LIMITED)],
    cmdclass={"sdist": SourceArchive, "egg_info": Labelled}
    | ({"build_py": LeaveOut} if WANTED == "0" else {"build_ext": CMakeBuild}),
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if LIMITED else {},
    setup_requires=["torch>=2.10"] if need_torch else [],
)
