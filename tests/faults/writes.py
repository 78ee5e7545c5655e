"""Disks that are full or cannot be written, from the n-th file on that a command writes."""

from __future__ import annotations

import errno
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

from tests.faults.processes import Ended, Forked

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGING = ("os.mkdir", "os.rename", "os.link", "os.truncate")

#: What happens: no byte can be added to any file; or no file can be opened for it.
KINDS = ("full", "read-only")


class _Disk:
    """Counts what is written below a folder, and fails from the n-th on.

    An audit hook sees every file that Python opens, whoever opens it. A disk that is full is the
    limit on a file's size, 0 from then on: the write itself fails, by the kernel's own word.
    """

    def __init__(self, folder: Path, kind: str, first: int) -> None:
        self.folder, self.kind, self.first, self.count = str(folder), kind, first, 0
        self._within = False

    def __call__(self, event: str, arguments: tuple) -> None:
        if self._within:
            return
        self._within = True
        try:
            if self._writes(event, arguments):
                self.count += 1
                if self.count >= self.first:
                    self._fail(arguments[0])
        finally:
            self._within = False

    def _writes(self, event: str, arguments: tuple) -> bool:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & _WRITING:
                return False
        elif event in _CHANGING:
            path = arguments[0]
        else:
            return False
        if not isinstance(path, (str, bytes, os.PathLike)):
            return False
        return os.path.abspath(os.fsdecode(path)).startswith(self.folder)

    def _fail(self, path: object) -> None:
        if self.kind == "read-only":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


def writes(main: Callable[[], int], folder: Path) -> tuple[int, Ended]:
    """How many writes below ``folder`` a command makes, and how it ends."""

    def counted() -> int:
        disk = _Disk(folder, "", sys.maxsize)
        sys.addaudithook(disk)
        code = main()
        print(f"\nwrites {disk.count}", file=sys.stderr)
        return code

    ended = Forked(counted).wait(600)
    assert ended is not None
    return int(ended.last.removeprefix("writes ")), ended


def failing(main: Callable[[], int], folder: Path, kind: str, first: int) -> Ended:
    """How a command ends where the ``first``-th write below ``folder`` and all after it fail."""

    def run() -> int:
        sys.addaudithook(_Disk(folder, kind, first))
        return main()

    ended = Forked(run).wait(600)
    assert ended is not None
    return ended
