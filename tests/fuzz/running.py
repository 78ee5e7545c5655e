"""Inputs one after another in a process of its own, so that a crash or a hang is a finding too."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import random
import resource
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

#: Seconds that an input may take; a busy machine has slow moments.
PATIENCE = 120
#: Bytes that a process may take beside what it began with.
_MEMORY = 3 << 30

Attempt = Callable[[random.Random], str]
"""Tries an input; returns what came of it in a word, and raises what should not have."""


@dataclass
class Report:
    """What came of many inputs.

    Attributes:
        outcomes: how often each.
        findings: by the number of the input, what was wrong.
    """

    outcomes: dict[str, int] = field(default_factory=dict)
    findings: dict[int, str] = field(default_factory=dict)

    @property
    def inputs(self) -> int:
        return sum(self.outcomes.values()) + len(self.findings)


def generator(seed: int, target: str, number: int) -> random.Random:
    """Of an input, whichever others are tried."""
    return random.Random(f"{seed} {target} {number}")


def run(
    name: str, prepare: Callable[[Path], Attempt], count: int, seed: int, most_findings: int = 10
) -> Report:
    """Try ``count`` inputs of the target ``name``.

    Args:
        prepare: makes a target's valid things in a folder; returns what tries a mutated one.
    """
    report, first = Report(), 0
    while first < count and len(report.findings) < most_findings:
        first = _some(name, prepare, range(first, count), seed, report, most_findings)
    return report


def _some(
    name: str,
    prepare: Callable[[Path], Attempt],
    numbers: range,
    seed: int,
    report: Report,
    most: int,
) -> int:
    """As many as go well, and the one that does not; returns the number of the next."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="nefkern-fuzz-") as folder:
        worker = context.Process(
            target=_work, args=(name, prepare, Path(folder), numbers, seed, there)
        )
        worker.start()
        there.close()
        number, ended = numbers.start, False
        while len(report.findings) < most and here.poll(PATIENCE):
            try:
                kind, number, text = here.recv()
            except EOFError:
                ended = True
                break
            if kind == "done":
                report.outcomes[text] = report.outcomes.get(text, 0) + 1
            elif kind == "found":
                report.findings[number] = text
        if not ended:
            os.kill(worker.pid, signal.SIGKILL)
        worker.join()
        if len(report.findings) < most and (not ended or worker.exitcode):
            what = f"died with exit code {worker.exitcode}" if ended else f"hung for {PATIENCE} s"
            report.findings.setdefault(number, f"the process {what}")
            return number + 1
    return numbers.stop


def _work(name, prepare, folder, numbers, seed, pipe) -> None:
    import torch

    torch.set_num_threads(1)
    faulthandler.disable()  # pytest's; a crash is told by its number
    os.chdir(folder)
    os.environ["NEFKERN_MAX_PIXELS"] = "4000000"
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    try:
        attempt = prepare(folder)
    except BaseException:
        pipe.send(("found", numbers.start, traceback.format_exc()))
        os._exit(1)
    _limit_memory()
    for number in numbers:
        pipe.send(("begun", number, ""))
        try:
            outcome = attempt(generator(seed, name, number))
        except BaseException:
            pipe.send(("found", number, traceback.format_exc()))
        else:
            pipe.send(("done", number, outcome))
    os._exit(0)


def _limit_memory() -> None:
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + _MEMORY, now + _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def timed(function: Callable[[], Report]) -> tuple[Report, float]:
    """A report, and the seconds it took."""
    started = time.perf_counter()
    return function(), time.perf_counter() - started
