"""One process to a folder: a second one that would write there is sent away."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import weakref
from pathlib import Path
from typing import ClassVar

try:
    import fcntl
except ModuleNotFoundError:  # Windows: nothing is locked
    fcntl = None

from nefkern.runtime.errors import UserError

NAME = ".lock"

_HELD = (errno.EACCES, errno.EAGAIN)
#: File systems that know no locks: as if there were none.
_UNKNOWN = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


class FolderLock:
    """A folder that belongs to this process until all who hold the lock let go of it.

    It is a POSIX record lock on a file: over NFS too, gone with a killed process, and not held by
    its loading processes, which may outlive it for some seconds.
    """

    _mutex = threading.Lock()
    _held: ClassVar[weakref.WeakValueDictionary[str, FolderLock]] = weakref.WeakValueDictionary()

    def __init__(self, path: Path, descriptor: int) -> None:
        self._file, self._owner = os.fstat(descriptor), os.getpid()
        self._release = weakref.finalize(self, _release, path, descriptor, self._owner)

    @classmethod
    def of(cls, folder: Path, flag: str) -> FolderLock | None:
        """The lock of an existing folder; None where files cannot be locked.

        Args:
            folder: to be written to by this process alone.
            flag: the option that names it, for the error.

        Raises:
            UserError: another process has it.
        """
        if fcntl is None:
            return None
        path = folder.resolve() / NAME
        with cls._mutex:
            held = cls._held.get(str(path))
            # Closing the file a second time would release this process's lock.
            if held is not None and held._is_held(path):
                return held
            descriptor = _locked(path, f"{flag} {folder}")
            if descriptor is None:
                return None
            lock = cls._held[str(path)] = cls(path, descriptor)
            return lock

    def _is_held(self, path: Path) -> bool:
        """Whether it is this process's, not its parent's, and of the file that is there."""
        ours = self._release.alive and self._owner == os.getpid()
        return ours and _is_file(self._file, path)


def _locked(path: Path, what: str) -> int | None:
    """A descriptor of the locked file, or None where nothing can be locked."""
    while True:
        # A link in its place could lead to any file.
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(path, flags, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            who = _who(descriptor)
            os.close(descriptor)
            if error.errno in _UNKNOWN:
                return None
            if error.errno not in _HELD:
                raise OSError(error.errno, error.strerror, str(path)) from None
            raise UserError(
                f"{what}: is in use by another process{who}; wait until it has ended, or take "
                "another folder"
            ) from None
        if _is_file(os.fstat(descriptor), path):  # else its last owner removed it meanwhile
            with contextlib.suppress(OSError):  # a full disk: who holds it is not told
                os.truncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()} on {socket.gethostname()}\n".encode())
            return descriptor
        os.close(descriptor)


def _who(descriptor: int) -> str:
    with contextlib.suppress(OSError):
        text = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
        return f" ({text})" if text.isprintable() and text else ""
    return ""


def _is_file(stat: os.stat_result, path: Path) -> bool:
    try:
        return os.path.samestat(stat, os.stat(path))
    except OSError:
        return False


def _release(path: Path, descriptor: int, owner: int) -> None:
    if os.getpid() != owner:  # a fork has the file, not the lock
        return
    with contextlib.suppress(OSError):
        path.unlink()  # before it is closed: after that it may be another's
    with contextlib.suppress(OSError):
        os.close(descriptor)
