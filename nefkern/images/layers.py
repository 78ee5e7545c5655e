"""What ``--high`` and ``--input-size`` ask of a backbone, read from text."""

from __future__ import annotations

import re
from typing import NamedTuple

from nefkern.runtime.errors import UserError


class Layer(NamedTuple):
    """A map of a backbone.

    Attributes:
        kind: "final" (what the model returns, after its last norm), "block" (the output of a
            transformer's block, before any norm), "keys" (of a block's attention), "stage" (of a
            convolutional network or a pyramid), or "late" (what the backbone has for it).
        index: of the block or stage, from 0; None for "final" and "late", and for "keys" of the
            last block.
    """

    kind: str
    index: int | None = None

    def __str__(self) -> str:
        return self.kind if self.index is None else f"{self.kind}:{self.index}"


def parse_high(text: str) -> tuple[Layer, ...]:
    """Read "block:8,block:11", "keys", "keys:10", "stage:2", "late" or "final"; "auto" gives ().

    Raises:
        UserError: anything else; whether the backbone has such a layer is not known here.
    """
    if text == "auto":
        return ()
    return tuple(_layer(text, part.strip()) for part in text.split(","))


def _layer(text: str, part: str) -> Layer:
    if part in ("final", "keys", "late"):
        return Layer(part)
    found = re.fullmatch(r"(block|keys|stage):([0-9]{1,9})", part)
    if found is None:
        raise UserError(
            f"--high {text}: expected auto, or one or several, comma-separated, of final, late, "
            "keys, block:N, keys:N and stage:N, N counted from 0"
        )
    return Layer(found[1], int(found[2]))


def parse_input_size(text: str | int) -> str | int:
    """Read "auto", "crop" or "native", or a number of pixels, as text or not.

    Raises:
        UserError: anything else.
    """
    text = str(text)
    if text in ("auto", "crop", "native"):
        return text
    if not re.fullmatch("0*[1-9][0-9]{0,4}", text):
        raise UserError(f"--input-size {text}: expected auto, crop, native, or a number of pixels")
    return int(text)
