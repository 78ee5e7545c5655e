"""Which lines of a table are told apart by the images that they were scored on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from nefkern.evaluation.honesty import CROSS, SAME, Estimate, Key
from nefkern.reproduction.running import Measured, drawn_by
from nefkern.summarize import mean_estimate


@dataclass(frozen=True, eq=False)
class Line:
    """A line of a table: one method of a row under one matching."""

    result: Measured
    method: str
    matching: str

    def name(self, other: Line) -> str:
        """What tells it from the other: row, method or both."""
        parts = [self.result.row.title] if self.result is not other.result else []
        return ", ".join([*parts, *([self.method] if self.method != other.method else [])])


class Difference(NamedTuple):
    """The second line less the first, paired over the images."""

    first: Line
    second: Line
    matching: str
    images: str
    scores: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "first": {"row": self.first.result.row.name, "method": self.first.method},
            "second": {"row": self.second.result.row.name, "method": self.second.method},
            "matching": self.matching,
            "images": self.images,
            **self.scores,
        }


def estimates(result: Measured, method: str, matching: str) -> dict[str, Estimate]:
    """A line's scores on the same images and on the other half, the mean over its seeds; empty
    unless all seeds were scored on resamples of the same images."""
    if _images(result) is None:
        return {}
    found = {}
    for images in (SAME, CROSS):
        every = [
            resampled.estimates.get(Key(method, drawn_by(evaluation), matching, images))
            for evaluation, resampled in zip(result.evaluations, result.resampled, strict=True)
        ]
        if all(estimate is not None for estimate in every):
            found[images] = mean_estimate(every)
    return found


def _images(result: Measured) -> tuple[Any, ...] | None:
    """What tells the images that every seed was scored on, and how often they were drawn; None
    where seeds differ in it, or nothing was drawn."""
    told = {
        found and (found.images, next(iter(found.estimates.values())).resampled.shape)
        for found in result.resampled
    }
    return told.pop() if len(told) == 1 else None


def differences(lines: list[Line]) -> list[Difference]:
    """Of every line less the first of its row, and less that of its method in the first row, as far
    as both were scored on the same images and matched alike."""
    found = []
    for at, second in enumerate(lines):
        before = [line for line in lines[:at] if line.matching == second.matching]
        row = [line for line in before if line.result is second.result]
        method = [line for line in before if line.method == second.method]
        for first in dict.fromkeys([*row[:1], *method[:1]]):
            if told := _difference(first, second):
                found.append(told)
    return found


def _difference(first: Line, second: Line) -> Difference | None:
    pair = [estimates(line.result, line.method, line.matching) for line in (first, second)]
    images = next((name for name in (CROSS, SAME) if all(name in its for its in pair)), None)
    if images is None or _images(first.result) != _images(second.result):
        return None
    scores = pair[1][images].minus(pair[0][images])
    return Difference(first, second, second.matching, images, scores)
