"""Commands in processes that are forked from this one: they begin at once, and may be killed."""

from __future__ import annotations

import io
import os
import select
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Ended:
    """How a process ended: its exit code (negative: the signal), and what it said."""

    code: int
    text: str

    @property
    def last(self) -> str:
        """The last line on standard error."""
        lines = self.text.replace("\r", "\n").splitlines()
        return lines[-1] if lines else ""


class Forked:
    """``main()`` in a child of its own process group; both of its outputs are kept.

    Args:
        main: returns the exit code.
    """

    def __init__(self, main: Callable[[], int]) -> None:
        self._reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._reader)
            _become(main, writer)
        os.close(writer)
        self._said = b""

    def kill(self, number: int) -> None:
        """Send the child and those it started a signal."""
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:  # it has no group of its own yet, or is gone
            os.kill(self.pid, number)

    def wait(self, seconds: float) -> Ended | None:
        """The end, or None if it has not come in so many seconds."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            ready, _, _ = select.select([self._reader], [], [], left)
            if ready:
                part = os.read(self._reader, 1 << 16)
                if not part:
                    return self._reaped()
                self._said += part
        return None

    def _reaped(self) -> Ended:
        _, status = os.waitpid(self.pid, 0)
        os.close(self._reader)
        return Ended(os.waitstatus_to_exitcode(status), self._said.decode(errors="replace"))


def _become(main: Callable[[], int], writer: int) -> None:
    code = 99
    try:
        os.setpgid(0, 0)
        for stream in (1, 2):
            os.dup2(writer, stream)
        os.close(writer)
        import sys

        for name, number in (("stdout", 1), ("stderr", 2)):
            stream = io.FileIO(number, "w", closefd=False)
            setattr(sys, name, io.TextIOWrapper(stream, line_buffering=True, errors="replace"))
        import torch

        torch.set_num_threads(1)
        code = main()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
