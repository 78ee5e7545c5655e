"""Valid things made invalid: bytes, and trees of plain data. All a function of the generator."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

#: What stands in the place of something else.
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 255, 256, 2**31, -(2**31), 2**63, 2**64, 10**30, 0.5, -0.0, 1e308,
    float("nan"), float("inf"), -float("inf"), "", " ", "x", "x" * 3000, "\x00", "\x1b[2J\x07",
    "\u2028", "\ud800", "../../../etc/passwd", "/dev/zero", "a\nb", "<script>alert(1)</script>",
    "1e999", "-1", "nan", "%s%n", "${HOME}", [], {}, [[]], [None], {"": ""}, [0] * 50, {"a": {}},
)  # fmt: skip


def mutated_bytes(random: random.Random, content: bytes) -> bytes:
    """One to three changes."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        content = random.choice(_OF_BYTES)(random, content)
    return content


def _place(random: random.Random, content: bytes) -> int:
    """Most of a format's say is in the first bytes."""
    end = len(content) if random.random() < 0.5 else min(len(content), 200)
    return random.randrange(end + 1)


def _truncate(random: random.Random, content: bytes) -> bytes:
    return content[: _place(random, content)]


def _flip(random: random.Random, content: bytes) -> bytes:
    changed = bytearray(content or b"\0")
    for _ in range(random.choice((1, 1, 2, 8))):
        changed[min(_place(random, content), len(changed) - 1)] ^= 1 << random.randrange(8)
    return bytes(changed)


def _insert(random: random.Random, content: bytes) -> bytes:
    at = _place(random, content)
    junk = (
        random.randbytes(random.choice((1, 4, 64))), b"\0" * 8, b"\xff" * 8, b"\x1b[2J", b"\r\n",
        b"9" * 5000, b"-1", b"\xef\xbb\xbf", b"[" * 5000, b"&a [*a,*a]", b"{" * 9, b"NaN",
    )  # fmt: skip
    return content[:at] + random.choice(junk) + content[at:]


def _cut(random: random.Random, content: bytes) -> bytes:
    a, b = sorted((_place(random, content), _place(random, content)))
    return content[:a] + content[b:]


def _repeat(random: random.Random, content: bytes) -> bytes:
    a, b = sorted((_place(random, content), _place(random, content)))
    return content[:b] + content[a:b] * random.choice((1, 3)) + content[b:]


def _extreme(random: random.Random, content: bytes) -> bytes:
    """A field of 1, 2, 4 or 8 bytes set to an extreme."""
    at, size = _place(random, content), random.choice((1, 2, 4, 8))
    value = random.choice((b"\0", b"\xff", b"\x7f", b"\x80"))
    return content[:at] + value * size + content[at + size :]


def _garbage(random: random.Random, content: bytes) -> bytes:
    return random.randbytes(random.choice((0, 1, 8, 300)))


_OF_BYTES: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    _truncate, _flip, _flip, _insert, _cut, _repeat, _extreme, _extreme, _garbage,
)  # fmt: skip


def mutated_tree(random: random.Random, tree: Any) -> Any:
    """A copy with one to three entries replaced, renamed, moved or missing."""
    tree = json.loads(json.dumps(tree))
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        tree = _changed(random, tree)
    return tree


def _changed(random: random.Random, tree: Any) -> Any:
    places = [p for p in _places(tree) if p]
    if not places or random.random() < 0.02:
        return copy.deepcopy(random.choice(ODD))
    *way, last = random.choice(places)
    parent = tree
    for key in way:
        parent = parent[key]
    kind = random.random()
    if kind < 0.65:
        parent[last] = copy.deepcopy(random.choice(ODD))
    elif kind < 0.75:
        parent[last] = (
            {"inside": parent[last]}
            if random.random() < 0.5
            else [parent[last], copy.deepcopy(parent[last])]
        )
    elif kind < 0.9 or not isinstance(parent, dict):
        del parent[last]
    else:
        parent[random.choice(("", "x", "../x", "\x1b[31m", "0", last * 2))] = parent.pop(last)
    return tree


def _places(tree: Any, way: tuple = ()) -> list[tuple]:
    inside: Any = ()
    if isinstance(tree, dict):
        inside = tree.items()
    elif isinstance(tree, list):
        inside = enumerate(tree)
    return [way, *(place for key, part in inside for place in _places(part, (*way, key)))]
