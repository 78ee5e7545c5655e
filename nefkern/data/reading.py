"""Images read one ahead, and those that cannot be read passed over."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from nefkern.data.loader import View

T = TypeVar("T")

log = logging.getLogger(__name__)


def usable(views: Iterator[Future[View]], done: Callable[[], object]) -> Iterator[View]:
    """The views of their own images, not of another in place of an unreadable one: those are
    reported, once each."""
    told: set[str] = set()
    for future in views:
        view = future.result()
        if not view.problems:
            yield view
        elif view.problems[0] not in told:
            told.add(view.problems[0])
            log.warning("skipped: %s", view.problems[0])
        done()


def read_ahead(read: Callable[..., T], keys: Sequence) -> Iterator[Future[T]]:
    """``read`` of every key in order, each begun while the one before is worked on."""
    ahead: deque[Future[T]] = deque()
    with ThreadPoolExecutor(1) as pool:
        for key in keys:
            ahead.append(pool.submit(read, key))
            if len(ahead) == 2:
                yield ahead.popleft()
        yield from ahead
