"""The programs that not every machine has."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from bench.gpu.plan import Settings

#: So that a checker of memory sees every allocation, and what is beyond it.
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def find(name: str) -> str | None:
    """A program on the PATH or in the CUDA toolkit's folder."""
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    path = os.pathsep.join(
        [os.environ.get("PATH", ""), *(str(Path(folder) / "bin") for folder in folders if folder)]
    )
    return shutil.which(name, path=path)


def memcheck(settings: Settings) -> tuple[Sequence[str], str]:
    """What to put before a command, and how to call it: a checker of memory, else nothing."""
    checker = None if settings.rehearsal else find("compute-sanitizer")
    if checker is None:
        return (), "alone"
    return sanitizer(checker, "memcheck"), "compute-sanitizer memcheck"


def sanitizer(checker: str, tool: str) -> list[str]:
    return [checker, "--tool", tool, "--print-limit", "5", "--error-exitcode", "9"]
