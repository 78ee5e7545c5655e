"""Files written in one step: a kill or a full disk leaves the old one or the new, not half."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from nefkern.runtime.errors import UserError


def make_folder(root: Path, folder: Path) -> None:
    """Make ``folder``, which is ``root`` or below it.

    Raises:
        UserError: a link on the way leads out of ``root``, as in a run folder of unknown origin.
    """
    if not folder.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{folder}: a link leads out of {root}; remove it")
    folder.mkdir(parents=True, exist_ok=True)


#: Bytes of a name that leave room, of the 255 that file systems have, for what is put behind it.
_LONGEST_NAME = 200


def shortened(name: str) -> str:
    """The name of a file as far as there is room for more behind it."""
    whole = os.fsencode(name)
    if len(whole) <= _LONGEST_NAME:
        return name
    return whole[:_LONGEST_NAME].decode(sys.getfilesystemencoding(), errors="ignore")


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError of the block name ``path`` if it names no file, as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def replace_file(path: Path, content: bytes | str) -> None:
    """Write ``content`` (text as UTF-8) beside ``path``, then move it there.

    Names of files that are not UTF-8 are in text as lone surrogates; they are written as escapes,
    which in JSON stand for the same.

    Raises:
        OSError: it cannot be written; names ``path``, and the old file is as it was. Content is
            made in memory first and written here, because the writers of torch and safetensors
            report a full disk by errors of their own.
    """
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    # Another process that writes the same file (a shared feature cache) has a part of its own;
    # its number would not tell it from one on another machine.
    part = path.with_name(f".{shortened(path.name)}.{uuid.uuid4().hex[:12]}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:  # a full disk names no file, others the part
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with contextlib.suppress(OSError):  # a disk that can only be read says so here once more
            part.unlink()


def remove_parts(folder: Path, pattern: str = ".*.part", *, older: float = 0.0) -> None:
    """Remove what killed processes left of :func:`replace_file` in ``folder``.

    Args:
        pattern: of their paths below it; what a link there leads to outside stays.
        older: seconds that a part must have lain there: where living processes write as well.
    """
    inside = folder.resolve()
    for part in folder.glob(pattern):
        with contextlib.suppress(OSError):  # its process has just moved it, or it isn't ours
            old = not older or time.time() - part.stat().st_mtime > older
            if old and part.parent.resolve().is_relative_to(inside):
                part.unlink()
