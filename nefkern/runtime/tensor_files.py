"""Tensors in safetensors files that tell whether they still are what was written.

The format finds a file that was cut short, not one in which a disk or a copy changed some bits. So
its metadata hold the SHA-256 of the whole file, with zeros in the place of that hash.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from nefkern.runtime.errors import first_line

_HASH = "sha256"
_NO_HASH = "0" * 64
_ANY_HASH = re.compile(rb'"[0-9a-f]{64}"')
_BLOCK = 1 << 22
_MOST_HEADER = 100_000_000  # bytes; the format's own limit


class DamagedFile(Exception):
    """A file of tensors that is not what was written; says what is wrong with it."""


def packed(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """A file of tensors from any device; the same content gives the same bytes."""
    on_host = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    content = _in_one_order(save(on_host, {**(metadata or {}), _HASH: _NO_HASH}))
    return content.replace(_NO_HASH.encode(), hashlib.sha256(content).hexdigest().encode(), 1)


def _in_one_order(content: bytes) -> bytes:
    """The same file with its metadata sorted: their order is random in what ``save`` makes."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return content[:8] + text.ljust(size) + content[8 + size :]


def unpacked(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file that is whole; one without a hash, of an earlier version or
    another's, is taken as it is.

    Raises:
        DamagedFile: it is not as it was written.
        FileNotFoundError: there is none.
    """
    check(path)
    with _told(), safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata() or {})
    metadata.pop(_HASH, None)
    return tensors, metadata


def metadata_of(path: Path) -> dict[str, str]:
    """The metadata of a file, of which nothing else is read.

    Raises:
        DamagedFile: as far as the header shows it.
    """
    with _told(), safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def check(path: Path) -> None:
    """Raise DamagedFile if a file has a hash and is not what that is of."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > _MOST_HEADER:
            raise DamagedFile(f"a header of {size} bytes")
        header = file.read(size)
        known = _known_hash(header)
        if known is None:
            if _ANY_HASH.search(header):
                raise DamagedFile("its checksum has another name")
            return
        found = hashlib.sha256(size.to_bytes(8, "little"))
        found.update(header.replace(known.encode(), _NO_HASH.encode(), 1))
        while block := file.read(_BLOCK):
            found.update(block)
    if found.hexdigest() != known:
        raise DamagedFile("its content is not what its checksum is of")


def _known_hash(header: bytes) -> str | None:
    try:
        known: Any = json.loads(header)["__metadata__"][_HASH]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None  # what reads the tensors says what is wrong
    return known if isinstance(known, str) else None


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Whatever the format's reader raises as a :class:`DamagedFile`: it has several classes, and
    PyTorch's for what a header should not say."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise DamagedFile(first_line(error)) from None
