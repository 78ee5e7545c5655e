"""Ctrl-C and polite kills, noted until the work reaches a place where it can stop."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from nefkern.runtime import distributed

#: A second signal this soon after the first is the same one, come another way.
_ECHO_SECONDS = 5.0


class Interrupts:
    """Whether SIGINT or SIGTERM has come.

    Attributes:
        received: set by the first signal; the loop ends or leaves its step and stops.
    """

    def __init__(self) -> None:
        self.received = False

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Within this block the first signal is noted only; a second one ends the work at once."""
        owner, first = os.getpid(), 0.0

        def note(number: int, frame: Any) -> None:
            if os.getpid() != owner:  # a loading process; it ends with its owner
                return
            nonlocal first
            now = time.monotonic()
            # torchrun passes on what the terminal or the scheduler may have sent here as well.
            if self.received and (distributed.ranks() == 1 or now > first + _ECHO_SECONDS):
                raise KeyboardInterrupt
            if not self.received:
                first = now
            self.received = True
            if distributed.is_main():
                tqdm.write("stopping; once more to stop at once", file=sys.stderr)

        before = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not in the main thread
                before[number] = signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
