"""Cases of a stage for test_gpu_check.py: fine, and wrong in every way that a case can be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.gpu.plan import Settings
from bench.gpu.worker import Skipped


def run(case: str, settings: Settings) -> Iterator[dict[str, Any]]:
    kind = case.split()[0]
    yield {"first": 1}
    if kind == "computes":
        yield {"errors": {"out": float("nan")}, "path": Path("a")}
        raise AssertionError("NaN")
    if kind == "raises":
        raise ValueError("a wrong number")
    if kind == "skips":
        raise Skipped("not here")
    if kind == "exits":
        os._exit(7)
    if kind == "segfaults":
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "floods":
        sys.stdout.write("x" * 1_000_000 + "\nthe last words\n")
        sys.stdout.flush()
        os._exit(3)
    if kind == "once":  # fails, and not again
        marker = Path(settings.out).with_suffix(".marker")
        if not marker.exists():
            marker.touch()
            raise RuntimeError("the first time")
    if kind == "hangs":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        yield {"child": child.pid}
        time.sleep(600)
    yield {"second": 2}
