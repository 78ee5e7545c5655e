"""What the documentation's site needs beside MkDocs: links out of the folder, roles of docstrings.

MkDocs calls ``on_page_markdown``; the API reference loads :class:`Roles`.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import griffe

ROOT = Path(__file__).parents[1]
log = logging.getLogger("mkdocs.hooks.nefkern")

#: Set where the gallery's pictures, which take minutes, are left out.
NO_GALLERY = "NEFKERN_DOCS_NO_GALLERY"

_OUTSIDE = re.compile(r"\[([^\]]+)\]\((\.\./[^)#]+)(#[^)]*)?\)")
_GALLERY = re.compile(r"!\[([^\]]*)\]\(gallery/[^)]+\)")
_ROLE = re.compile(r":(?:func|class|mod|meth|attr|data|exc):`(~?)([^`]+)`")


def on_page_markdown(markdown: str, page, **_) -> str:
    """Files of the repository outside the site are named, not linked; each must be there."""

    def named(match: re.Match) -> str:
        text, path = match[1], match[2]
        if not (ROOT / "docs" / Path(page.file.src_uri).parent / path).exists():
            log.warning("%s: no such file: %s", page.file.src_uri, path)
        return text if "`" in text else f"`{text}`"

    if os.environ.get(NO_GALLERY):
        markdown = _GALLERY.sub(r"*\1*", markdown)
    return _OUTSIDE.sub(named, markdown)


class Roles(griffe.Extension):
    """Sphinx's roles in docstrings as cross references, where the site has what they name."""

    def on_instance(self, *, obj: griffe.Object, **_) -> None:
        """Of everything that was read."""
        if obj.docstring:
            obj.docstring.value = _ROLE.sub(lambda m: _reference(obj, m), obj.docstring.value)


def _reference(obj: griffe.Object, match: re.Match) -> str:
    short, name = match[1], match[2]
    shown = name.rpartition(".")[2] if short else name
    return f'<autoref optional identifier="{_path(obj, name)}">`{shown}`</autoref>'


def _path(obj: griffe.Object, name: str) -> str:
    """The full name of what a docstring's text means."""
    if name.startswith("nefkern."):
        return name
    scope: griffe.Object | None = obj
    first, _, rest = name.partition(".")
    while scope is not None:
        if first in scope.members:
            return ".".join(filter(None, (scope.path, first, rest)))
        scope = scope.parent
    return name
