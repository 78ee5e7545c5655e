"""CUDA kernels run on the processor: builds the emulated programs and calls them.

A program (``<name>.cpp`` beside this file) includes kernels of ``csrc/cuda`` as they stand and is
built twice: ``checked`` with AddressSanitizer and UndefinedBehaviorSanitizer, ``races`` with the
race check. A call runs a case of it in forward, reverse and random thread order. A third variant,
``counts``, is for costs.py.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "emulator"
VARIANTS = {
    "checked": [
        "-fsanitize=address,undefined", "-fsanitize=bounds-strict", "-fno-sanitize-recover=all",
        "-fno-omit-frame-pointer",
    ],
    "races": ["-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"],
}  # fmt: skip
# Accesses as the sources have them: of whole vectors, one after the other.
COUNTS = [
    *("-fsanitize=thread", "-fsanitize-coverage=trace-pc"),
    *("--param=tsan-instrument-func-entry-exit=0", "-fno-tree-sra", "-fno-tree-vectorize"),
]
# Kernels whose instructions are most of all loops of constant length: unrolled as nvcc does.
UNROLLED = {"spmm": ["-O3", "-mfma", "--param=max-completely-peeled-insns=1000"]}
COMMON = [
    *("-std=c++20", "-O1", "-g1", "-no-pie", "-fno-strict-aliasing", "-DNEFKERN_EMULATED"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-tsan", "-Wno-psabi"),
    *(f"-I{ROOT / 'csrc'}", f"-I{HERE}", "-x", "c++"),
]


#: Numbers that a test module's calls have in common.
usual: dict[str, float] = {}


class Failed(AssertionError):
    """The emulator or a sanitizer reported what is in the message."""


@functools.cache
def _compiler() -> str:
    found = shutil.which("g++")
    if not found:
        pytest.skip("no g++")
    return found


@functools.cache
def _sources() -> bytes:
    """Everything that a program is made of, and by which compiler."""
    files = sorted([*HERE.glob("*.h"), *HERE.glob("*.cpp"), *(ROOT / "csrc" / "cuda").glob("*")])
    version = subprocess.run([_compiler(), "--version"], capture_output=True, check=True).stdout
    return version + b"".join(path.name.encode() + path.read_bytes() for path in files)


def _compile(source: Path, target: Path, *flags: str, first: list[str]) -> subprocess.Popen:
    """``first`` come before the common flags, ``flags`` after."""
    return subprocess.Popen(
        [_compiler(), *first, *COMMON, *flags, str(source), "-x", "none", "-o", str(target)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def _finish(compilation: subprocess.Popen) -> None:
    output, _ = compilation.communicate()
    assert compilation.returncode == 0, f"{' '.join(compilation.args)}\n{output}"


@dataclass(frozen=True)
class Planted:
    """A defect in a source of ``csrc/cuda``: ``old``, which is there once, made ``new``."""

    source: str
    old: str
    new: str

    def write(self, folder: Path) -> None:
        text = (ROOT / "csrc" / "cuda" / self.source).read_text("utf-8")
        assert text.count(self.old) == 1, f"{self.source} has {text.count(self.old)} {self.old!r}"
        (folder / "cuda").mkdir(parents=True, exist_ok=True)
        (folder / "cuda" / self.source).write_text(text.replace(self.old, self.new), "utf-8")


@functools.cache
def build(
    name: str, variants: tuple[str, ...] = tuple(VARIANTS), planted: Planted | None = None
) -> dict[str, Path]:
    """The program ``name`` in each variant, built unless it is there already."""
    key = hashlib.sha256(
        _sources() + repr((VARIANTS, COUNTS, UNROLLED, COMMON, planted)).encode()
    ).hexdigest()[:16]
    folder = BUILD / key
    programs = {variant: folder / f"{name}-{variant}" for variant in variants}
    if all(program.exists() for program in programs.values()):
        return programs
    folder.mkdir(parents=True, exist_ok=True)
    found_first = []
    if planted:
        planted.write(folder / "planted")
        found_first.append(f"-I{folder / 'planted'}")
    # Into files of this process's own: another one may be building the same.
    parts = {path: path.with_name(f"{path.name}.{os.getpid()}") for path in programs.values()}
    source = HERE / f"{name}.cpp"
    checked = None
    if "checked" in variants:
        checked = _compile(
            source, parts[programs["checked"]], *VARIANTS["checked"], first=found_first
        )
    if "races" in variants:
        _build_with_hooks(source, parts[programs["races"]], "race_check", found_first, "races")
    if "counts" in variants:
        _build_with_hooks(source, parts[programs["counts"]], "cost_counter", found_first, "counts")
    if checked:
        _finish(checked)
    for program, part in parts.items():
        part.replace(program)
    return programs


def _build_with_hooks(
    source: Path, target: Path, hooks_of: str, flags: list[str], variant: str
) -> None:
    """Linked without -fsanitize=thread: the hooks stand in for its library."""
    hooks, kernels = (target.with_name(f"{target.name}.{part}.o") for part in ("hooks", "kernels"))
    compiled = _compile(HERE / f"{hooks_of}.cpp", hooks, "-c", "-O2", first=[])
    counts = [*COUNTS, *UNROLLED.get(source.stem, [])]
    later = counts if variant == "counts" else VARIANTS["races"]
    _finish(_compile(source, kernels, *later, "-c", first=flags))
    _finish(compiled)
    link = [_compiler(), "-no-pie", str(kernels), str(hooks), "-o", str(target)]
    subprocess.run(link, check=True)
    for rest in (hooks, kernels):
        rest.unlink()


def run(
    program: str,
    case: str,
    folder: Path,
    *,
    inputs: Mapping[str, np.ndarray | None],
    outputs: Mapping[str, type],
    variants: tuple[str, ...] = tuple(VARIANTS),
    planted: Planted | None = None,
    **numbers: float | str,
) -> dict[str, np.ndarray]:
    """Run a case of an emulated program in every thread order, in every variant.

    Args:
        program: the name of a ``.cpp`` beside this file.
        case: one of its cases.
        folder: an existing folder for the arrays' files.
        inputs: arrays by name; None leaves one out.
        outputs: the dtype of every array that comes back.
        variants: which to run.
        planted: a defect to build the program with.
        numbers: further arguments; ``order="forward"`` (reverse, random) runs only that order.

    Returns:
        The outputs, one-dimensional; the same in all orders and variants, bit for bit.

    Raises:
        Failed: with the report of the emulator, of the race check or of a sanitizer.
    """
    for stale in (*folder.glob("*.in"), *folder.glob("*.out")):
        stale.unlink()
    for name, array in inputs.items():
        if array is not None:
            (folder / f"{name}.in").write_bytes(np.ascontiguousarray(array).tobytes())
    arguments = [f"{name}={value}" for name, value in numbers.items()]
    results = []
    for variant in variants:
        executable = build(program, variants, planted)[variant]
        done = subprocess.run(
            [executable, case, str(folder), *arguments],
            capture_output=True, text=True, timeout=300, env={**os.environ, **_ENVIRONMENT},
        )  # fmt: skip
        if done.returncode:
            raise Failed(f"{program} {case}, {variant}: {_with_lines(done.stderr, executable)}")
        results.append(
            {name: np.fromfile(folder / f"{name}.out", kind) for name, kind in outputs.items()}
        )
    for other in results[1:]:
        for name, array in results[0].items():
            same = array.tobytes() == other[name].tobytes()
            assert same, f"{program} {case}: {name} differs between {' and '.join(variants)}"
    return results[0]


_ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "print_stacktrace=0",
}


def _with_lines(report: str, executable: Path) -> str:
    """The report with the source line of a "code at 0x..." after it."""
    found = re.search(r"code at (0x[0-9a-f]+)", report)
    if not found or not shutil.which("addr2line"):
        return report
    # The address is the one that the call of the hook returns to.
    address = hex(int(found[1], 16) - 1)
    line = subprocess.run(
        ["addr2line", "-e", str(executable), address], capture_output=True, text=True
    ).stdout
    return f"{report.rstrip()} ({line.strip()})"
