"""Errors a user can cause, told in one line."""

from __future__ import annotations

import argparse
import errno
import functools
import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """Something the user can mend: names the file or option, what was expected and what came."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with a mistake on the command line told as any other: by a :class:`UserError`."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help lists the options")


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an error's message, or its class's name where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:limit]


#: Characters of a message; a name in it may have any number.
_LONGEST = 2000

#: Names of files and classes may hold what moves a terminal's cursor, or renames its window.
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}
_CONTROL |= {code: f"\\u{code:04x}" for code in (0x2028, 0x2029)}


def visible(text: str) -> str:
    """``text`` on one line, its control characters as escapes, as far as anyone would read."""
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
    return text.translate(_CONTROL)


#: What is wrong with the disk or the path, not with the program.
_DISK = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOENT, errno.EIO, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG),
    errno.ELOOP,
)


def _is_out_of_memory(error: Exception) -> bool:
    """As far as that can be told without PyTorch, which ``--help`` does not wait for."""
    said = str(error).lower()
    texts = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(text in said for text in texts)


def command(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wrap a command's ``main`` so that mistakes end in one line and an exit code, not a traceback.

    Returns:
        A function with the signature of ``main`` that returns the exit code: 0, or 2 after a
        :class:`UserError`, a full disk or a name that no file of the locale can have, or 130 after
        an interrupt.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> int:
        for stream in (sys.stdout, sys.stderr):
            # ψ, κ and names of files are no reason to fail where the terminal cannot show them.
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        try:
            code = main(*args, **kwargs) or 0
            sys.stdout.flush()  # here, where a reader that is gone is noticed in time
            return code
        except UserError as error:
            print(f"error: {visible(str(error))}", file=sys.stderr)
            return 2
        except KeyboardInterrupt as interrupt:
            print(f"interrupted{f': {interrupt}' if interrupt.args else ''}", file=sys.stderr)
            return 130
        except BrokenPipeError:  # whoever read the output has seen enough, as head does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            told = visible(first_line(error))
            print(f"error: out of memory, less is needed at once ({told})", file=sys.stderr)
            return 2
        except UnicodeEncodeError as error:
            encoding = sys.getfilesystemencoding()
            if "utf-8" in (encoding, error.encoding):
                raise
            told = (
                f"{error.object}: no file of this locale, whose names are {encoding}, can have it"
            )
            print(f"error: {visible(told)}; set LC_ALL=C.UTF-8", file=sys.stderr)
            return 2
        except OSError as error:
            if error.errno not in _DISK:
                raise
            where = f" {error.filename}" if error.filename else ""
            line = f"error: cannot read or write{where}: {error.strerror}"
            print(visible(line), file=sys.stderr)
            return 2

    return wrapped
