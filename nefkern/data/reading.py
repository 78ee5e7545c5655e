"""Images read one ahead, and those that cannot be read passed over."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from torch import Tensor

from nefkern.data.loader import Views

T = TypeVar("T")

Key = tuple[int, int]
"""Epoch and index of a view."""

log = logging.getLogger(__name__)


def usable(
    views: Views, keys: Sequence[Key], done: Callable[[], object]
) -> Iterator[tuple[Key, Tensor]]:
    """Views of their own images, not of another in place of an unreadable one: those are reported,
    once each.

    Args:
        views: the data set's.
        keys: (epoch, index) of those to read, in this order.
        done: called after each, usable or not.

    Yields:
        The key, and the image uint8 ``[3, crop, crop]``.
    """
    told: set[str] = set()
    for key, future in zip(keys, read_ahead(lambda key: views.view(*key), keys), strict=True):
        view = future.result()
        if not view.problems:
            yield key, view.image
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
