"""Every score of an evaluation with its interval, on other images than its matching was learnt on,
and the differences between methods: JSON-ready."""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nefkern.evaluation.resampling import (
    SCORES,
    SEED,
    Part,
    cross_matched,
    differs,
    figures,
    from_confusions,
    halves,
    interval,
    part,
    resamples,
)
from nefkern.segmentation.evaluation import Matched
from nefkern.segmentation.image_counts import ImageCounts
from nefkern.segmentation.tables import column

SAME, CROSS = "same", "cross"
"""Images that a matching is scored on: those that it was learnt on, or the other half."""


class Key(NamedTuple):
    """One score of an evaluation."""

    method: str
    stage: str
    matching: str
    images: str

    @property
    def column(self) -> str:
        """The method, and what drew its edges."""
        return column(self.method, self.stage)


class Estimate(NamedTuple):
    """A pair of scores on the images as they are ``[2]``, and on resamples of them ``[2, B]``."""

    value: Tensor
    resampled: Tensor

    def as_dict(self) -> dict[str, Any]:
        """Both scores by name, and their intervals."""
        return {
            **dict(zip(SCORES, map(_number, self.value.tolist()), strict=True)),
            "interval": self.intervals(),
        }

    def intervals(self) -> dict[str, Any]:
        """The interval of each score by name."""
        return dict(zip(SCORES, map(interval, self.resampled), strict=True))

    def minus(self, other: Estimate) -> dict[str, Any]:
        """The difference of each score by name, resample by resample."""
        value, resampled = self.value - other.value, self.resampled - other.resampled
        between = [interval(row) for row in resampled]
        return {
            name: {"difference": _number(v), "interval": i, "differs": differs(i)}
            for name, v, i in zip(SCORES, value.tolist(), between, strict=True)
        }


@dataclass
class Honesty:
    """What an evaluation says about its own scores.

    Args:
        annotated: int64 ``[I]``, annotated pixels of each image.
        bootstrap: B, resamples of the images; 0: no intervals.
        splits: how often the images are halved; 0: no scores on other images.

    Attributes:
        estimates: every score that was asked for.
        weights: float64 ``[B, I]``, how often each image counts in each resample.
    """

    annotated: Tensor
    bootstrap: int
    splits: int
    estimates: dict[Key, Estimate] = field(default_factory=dict)

    def __post_init__(self) -> None:
        images = len(self.annotated)
        self.masks = halves(self.annotated, self.splits)
        self._all = torch.ones(1, images, dtype=torch.float64)
        # One image has no other to be replaced by: no resample would tell anything.
        self.weights = resamples(images, self.bootstrap if images > 1 else 0)

    def settings(self) -> dict[str, int]:
        """How it was found."""
        return {"bootstrap": len(self.weights), "splits": len(self.masks) // 2, "seed": SEED}

    def add(
        self,
        method: str,
        stage: str,
        counts: ImageCounts,
        matched: Matched,
        find: Callable[[Tensor], dict[str, Tensor]],
    ) -> dict[str, Any]:
        """Score clusters; returns what is said of them beside their figures.

        Args:
            method, stage: whose they are.
            counts: image by image.
            matched: over all images.
            find: the matchings of counts ``[K, C]``, by name.
        """
        same = {name: [part(counts, a)] for name, a in matched.assignments.items()}
        cross = cross_matched(counts, find, self.masks)
        return self._told(method, stage, same, cross)

    def add_confusions(
        self, method: str, stage: str, confusions: dict[str, ImageCounts]
    ) -> dict[str, Any]:
        """Score classes by matching, as they are refined after it."""
        same = {name: [from_confusions(found)] for name, found in confusions.items()}
        return self._told(method, stage, same, {})

    def _told(
        self, method: str, stage: str, same: dict[str, list[Part]], cross: dict[str, list[Part]]
    ) -> dict[str, Any]:
        told: dict[str, Any] = {}
        for images, by_matching in ((SAME, same), (CROSS, cross)):
            for matching, parts in by_matching.items():
                key = Key(method, stage, matching, images)
                self.estimates[key] = self._estimate(parts)
        if len(self.weights):
            told["intervals"] = {
                m: self.estimates[Key(method, stage, m, SAME)].intervals() for m in same
            }
        if cross:
            told["cross"] = {
                m: self.estimates[Key(method, stage, m, CROSS)].as_dict() for m in cross
            }
        return told

    def _estimate(self, parts: Sequence[Part]) -> Estimate:
        return Estimate(figures(parts, self._all)[:, 0], figures(parts, self.weights))

    def differences(self) -> list[dict[str, Any]]:
        """Of every two methods under every matching, the second less the first."""
        return list(differences(self.estimates)) if len(self.weights) else []

    def packed(self) -> bytes:
        """The resampled scores as an npz file, for intervals over several runs; empty without."""
        if not len(self.weights):
            return b""
        arrays = {"|".join(key): e.resampled.float().numpy() for key, e in self.estimates.items()}
        buffer = io.BytesIO()
        images = np.array(fingerprint(self.annotated))
        np.savez_compressed(buffer, images=images, **arrays)
        return buffer.getvalue()


def differences(estimates: dict[Key, Estimate]) -> Iterator[dict[str, Any]]:
    """Of every two columns under every matching, the second less the first; a method with classes
    of its own is held against every matching of the others."""
    columns: dict[str, dict[tuple[str, str], Estimate]] = {}
    for key, estimate in estimates.items():
        columns.setdefault(key.column, {})[key.matching, key.images] = estimate
    for (first, a), (second, b) in itertools.combinations(columns.items(), 2):
        for matching, images in dict.fromkeys([*a, *b]):
            pair = [c.get((matching, images), c.get(("own", images))) for c in (a, b)]
            if any(estimate is None for estimate in pair):
                continue
            names = {"first": first, "second": second, "matching": matching, "images": images}
            yield names | pair[1].minus(pair[0])


def fingerprint(annotated: Tensor) -> str:
    """What tells a list of annotated images from another."""
    return hashlib.sha256(annotated.numpy().tobytes()).hexdigest()[:16]


def unpacked(content: bytes) -> tuple[str, dict[Key, Tensor]]:
    """The fingerprint and the resampled scores ``[2, B]`` of :meth:`Honesty.packed`.

    Raises:
        ValueError: not such a file.
    """
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        images = str(arrays.pop("images"))
        return images, {
            Key(*name.split("|")): torch.from_numpy(a).double() for name, a in arrays.items()
        }
    except Exception as error:  # NumPy has no exception of its own for a damaged file
        raise ValueError(f"not resampled scores ({error})") from error


def _number(value: float) -> float | None:
    return value if value == value else None
