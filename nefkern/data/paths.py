"""A million paths in one piece of memory."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar, overload

import numpy as np

T = TypeVar("T")


class Listed(Sequence[T]):
    """A sequence that makes its items when asked for them, and compares like a list of them."""

    @abstractmethod
    def at(self, index: int) -> T:
        """Item ``index``, 0 to ``len(self)`` - 1."""

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self.at(i) for i in range(len(self))[index]]
        return self.at(range(len(self))[index])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None

    def __repr__(self) -> str:
        return repr(list(self))


class Paths(Listed[Path]):
    """An immutable list of paths, kept as one array of bytes.

    Python's objects carry a count of their users, which changes whenever one is looked at. A list
    of a million paths that worker processes share after a fork is therefore copied to each of them
    page by page, several hundred megabytes a process. An array is not, and takes a fifth of the
    memory.

    Args:
        paths: in any number.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        text = bytearray()
        ends = [0]
        for path in paths:
            text += os.fsencode(path)
            ends.append(len(text))
        self._text = np.frombuffer(bytes(text), np.uint8)
        self._ends = np.array(ends)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def at(self, index: int) -> Path:
        return Path(self.text(index))

    def text(self, index: int) -> str:
        """Path ``index`` as text, several times faster."""
        return os.fsdecode(self._text[self._ends[index] : self._ends[index + 1]].tobytes())


class Names(Listed[str]):
    """Names of files, each another: without suffix and folder; with the suffix where two files then
    have the same, and a number where they still do."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        stems = [self._stem(index) for index in range(len(paths))]
        seen: set[str] = set()
        repeated: set[str] = set()
        for stem in stems:
            (repeated if stem in seen else seen).add(stem)
        self._whole = np.array([stem in repeated for stem in stems], bool)
        self._number = np.zeros(len(paths), np.int32)
        if repeated:
            self._number[:] = list(numbers_apart(map(self._base, range(len(paths))), set()))

    def __len__(self) -> int:
        return len(self._paths)

    def at(self, index: int) -> str:
        return numbered(self._base(index), self._number[index])

    def _base(self, index: int) -> str:
        name = os.path.basename(self._paths.text(index))
        return name if self._whole[index] else self._stem(index)

    def _stem(self, index: int) -> str:
        return os.path.splitext(os.path.basename(self._paths.text(index)))[0]


def numbered(name: str, number: int) -> str:
    """The name with a number behind it; 0 is none."""
    return f"{name}-{number}" if number else name


def numbers_apart(names: Iterable[str], taken: set[str]) -> Iterator[int]:
    """The number that :func:`numbered` puts behind each name so that none comes twice.

    Args:
        names: in any number; the time is linear in it.
        taken: names given before; the new ones are added.
    """
    last: Counter[str] = Counter()  # the last number given to a name
    for name in names:
        number = 0
        while numbered(name, number) in taken:
            number = last[name] = last[name] + 1 if last[name] else 2
        taken.add(numbered(name, number))
        yield number
