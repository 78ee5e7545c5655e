"""Errors a user can cause, told in one line."""

from __future__ import annotations

import errno
import functools
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can mend: names the file or option, what was expected and what came."""


def command(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wrap a command's ``main`` so that mistakes end in one line and an exit code, not a traceback.

    Returns:
        A function with the signature of ``main`` that returns the exit code: 0, or 2 after a
        :class:`UserError` or a full disk, or 130 after an interrupt.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
                raise
            where = f" ({error.filename})" if error.filename else ""
            print(f"error: cannot write{where}: {error.strerror}", file=sys.stderr)
            return 2

    return wrapped
