"""YAML and JSON that anyone may have written: plain data, or one error, whatever the text is.

The parsers themselves raise a dozen kinds of errors (a number of 5,000 digits, a date that is none,
lists within lists within lists), and a few lines of YAML can stand for more data than any memory
holds: an entry that names another ten times over, again and again ("billion laughs").
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

#: Characters of a file that is read: a thousand times what a configuration has.
_MOST_TEXT = 1 << 22
#: Entries that a YAML file may stand for.
_MOST_ENTRIES = 1 << 18


def read_text(path: str | Path) -> str:
    """The text of a file, UTF-8 with or without a byte order mark.

    Raises:
        ValueError: too long, or not UTF-8.
        OSError: it cannot be read.
    """
    with open(path, encoding="utf-8-sig") as file:
        text = file.read(_MOST_TEXT + 1)
    if len(text) > _MOST_TEXT:
        raise ValueError(f"expected at most {_MOST_TEXT} characters")
    return text


def parse_yaml(text: str) -> Any:
    """What YAML says, as plain data. A key that comes twice is an error, not a silent choice.

    Raises:
        ValueError: not YAML, or YAML of more entries than memory should hold; in one line.
    """
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, {})
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError("entries within entries, too deep") from None
    except Exception as error:  # of numbers, dates, keys, escapes: each has its own class
        raise ValueError(" ".join(str(error).split())[:200] or type(error).__name__) from None


def _check(node: yaml.Node, sizes: dict[int, int]) -> int:
    """How many entries a node stands for, aliases followed."""
    key = id(node)
    if key in sizes:
        if not sizes[key]:
            raise ValueError("an entry that contains itself")
        return sizes[key]
    sizes[key] = 0
    inside: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        inside = node.value
    elif isinstance(node, yaml.MappingNode):
        _check_keys(node)
        inside = [part for pair in node.value for part in pair]
    size = 1 + sum(_check(part, sizes) for part in inside)
    if size > _MOST_ENTRIES:
        raise ValueError(f"stands for more than {_MOST_ENTRIES} entries")
    sizes[key] = size
    return size


def _check_keys(node: yaml.MappingNode) -> None:
    seen: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        if key.value in seen:
            raise ValueError(f"line {key.start_mark.line + 1}: {key.value[:50]} comes twice")
        seen.add(key.value)


def parse_json(text: str | bytes) -> Any:
    """What JSON says.

    Raises:
        ValueError: not JSON.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("entries within entries, too deep") from None
