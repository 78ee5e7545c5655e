"""From counts over a data set to figures: every matching, scored."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nefkern.segmentation.matching import hungarian, majority_vote, matched_confusion
from nefkern.segmentation.metrics import scores

MATCHINGS = {
    "iou": "majority by IoU",
    "count": "majority by count",
    "hungarian": "Hungarian by count",
    "hungarian-iou": "Hungarian by IoU",
    "own": "its own classes",
}


@dataclass(frozen=True)
class Matched:
    """The matchings that apply to one clustering, and how each comes out.

    Attributes:
        clusters_used: clusters that win an annotated pixel somewhere.
        assignments: by the names in :data:`MATCHINGS`, int64 ``[K]``: class of each cluster,
            −1 unmatched.
        confusions: by the same names, int64 ``[C, C]``, rows predicted, columns annotated.
        no_hungarian: why there is no Hungarian matching, if there is none.
    """

    clusters_used: int
    assignments: dict[str, Tensor]
    confusions: dict[str, Tensor]
    no_hungarian: str | None = None

    @property
    def shown(self) -> str:
        """The matching of pictures: by IoU, or none where classes were learned."""
        return shown(self.assignments)

    def rescored(self, confusions: dict[str, Tensor]) -> Matched:
        """The same matchings with other confusion matrices, as counted after refinement."""
        return Matched(self.clusters_used, self.assignments, confusions, self.no_hungarian)

    def as_dict(self, classes: Sequence[str]) -> dict[str, Any]:
        """JSON-ready: scores as fractions, None where a class doesn't occur."""
        result: dict[str, Any] = {
            "clusters_used": self.clusters_used,
            "matchings": {name: self._figures(name, classes) for name in self.assignments},
        }
        if self.no_hungarian:
            result["no_hungarian"] = self.no_hungarian
        return result

    def _figures(self, name: str, classes: Sequence[str]) -> dict[str, Any]:
        found, assignment = scores(self.confusions[name]), self.assignments[name]
        return {
            "accuracy": _number(found.accuracy),
            "mean_iou": _number(found.mean_iou),
            "mean_class_accuracy": _number(found.mean_class_accuracy),
            "classes_matched": len(assignment[assignment >= 0].unique()),
            "iou": dict(zip(classes, map(_number, found.iou.tolist()), strict=True)),
            "class_accuracy": dict(
                zip(classes, map(_number, found.class_accuracy.tolist()), strict=True)
            ),
            "assignment": assignment.tolist(),
        }


def shown(matchings: Container[str], matching: str = "iou") -> str:
    """``matching``, or "own" of a method that has classes of its own and needs none."""
    return matching if matching in matchings else "own"


def unmatched(counts: Tensor) -> Matched:
    """The scores of classes: counts int64 ``[C, C]`` are their confusion matrix as they are."""
    used = int((counts.sum(1) > 0).sum())
    return Matched(used, {"own": torch.arange(len(counts))}, {"own": counts})


def matchings(counts: Tensor) -> tuple[dict[str, Tensor], str | None]:
    """Every matching that applies to counts int64 ``[K, C]`` of clusters against classes, by the
    names in :data:`MATCHINGS`; and why there is no Hungarian one, if there is none."""
    assignments = {by: majority_vote(counts, by) for by in ("iou", "count")}
    try:
        assignments |= {"hungarian": hungarian(counts), "hungarian-iou": hungarian(counts, "iou")}
    except ValueError as error:
        return assignments, str(error)
    return assignments, None


def match(counts: Tensor) -> Matched:
    """:func:`matchings`, scored on the same counts."""
    assignments, no_hungarian = matchings(counts)
    confusions = {name: matched_confusion(counts, a) for name, a in assignments.items()}
    used = int((counts.sum(1) > 0).sum())
    return Matched(used, assignments, confusions, no_hungarian)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
