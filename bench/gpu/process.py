"""Processes with a limit: one that hangs is ended with all that it started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: Seconds that a killed process may take to be gone; one that waits for a driver may never be.
GRACE = 5.0


@dataclass(frozen=True)
class Finished:
    """What became of a command.

    Attributes:
        code: of its exit; None: it was ended at its limit.
        output: what it wrote, to both streams.
    """

    code: int | None
    output: str


def start(
    command: Sequence[object], *, environment: Mapping[str, str] | None = None, **options
) -> subprocess.Popen:
    """Start a command in the repository's root; in a session of its own with ``start_new_session``,
    which what it starts stays in."""
    return subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
        **options,
    )


def end(process: subprocess.Popen) -> bool:
    """Kill ``process`` and all of its family; False where it does not end."""
    for member in (process.pid, *family(process.pid)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(member, signal.SIGKILL)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        return False
    return True


def family(pid: int) -> list[int]:
    """The processes that descend from ``pid``, and those of its session whose parents are gone."""
    parents, sessions = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            # pid (command) state parent group session ...; the command may hold anything
            _, parent, _, session = (
                path.read_text("utf-8", errors="replace").rpartition(")")[2].split()[:4]
            )
            parents[int(path.parent.name)] = int(parent)
            sessions[int(path.parent.name)] = int(session)
    found = {one for one, session in sessions.items() if session == pid}
    while more := {one for one, parent in parents.items() if parent in {pid, *found}} - found:
        found |= more
    return sorted(found - {pid, os.getpid()})


def run(
    command: Sequence[object], limit: float, *, environment: Mapping[str, str] | None = None
) -> Finished:
    """Run a command for at most ``limit`` seconds."""
    process = start(
        command,
        environment=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    try:
        output, _ = process.communicate(timeout=max(0.0, limit))
        return Finished(process.returncode, output)
    except subprocess.TimeoutExpired:
        return Finished(None, _rest(process))
    except BaseException:
        end(process)
        raise


def _rest(process: subprocess.Popen) -> str:
    """End an overdue process; what it has written until then."""
    end(process)
    try:
        return process.communicate(timeout=GRACE)[0] or ""
    except subprocess.TimeoutExpired:  # one that got away holds the other end
        return ""


def tail(text: str, lines: int = 30, characters: int = 4000) -> str:
    """The end of an output, for the record."""
    return "\n".join(text.strip().splitlines()[-lines:])[-characters:]
