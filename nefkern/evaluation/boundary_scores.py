"""The boundary F-scores of an evaluation: maps are kept packed until their classes are known."""

from __future__ import annotations

import zlib
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nefkern.evaluation.resampling import differs, interval
from nefkern.runtime import distributed
from nefkern.segmentation.boundaries import boundary_f

#: Method and stage; of classes refined after a matching, that too.
Column = tuple[str, ...]


class BoundaryScores:
    """Segments of this process's share of the images, and what their boundaries are worth.

    Segments pack to some kilobytes an image, so that thousands are kept.
    """

    def __init__(self) -> None:
        self._annotations: list[bytes] = []
        self._shapes: list[tuple[int, int]] = []
        self._maps: defaultdict[Column, list[bytes]] = defaultdict(list)
        self._found: dict[tuple[str, str, str], Tensor] = {}

    def annotate(self, annotation: Tensor) -> None:
        """Take the next image's annotation, uint8 ``[H, W]``, 255 void."""
        self._annotations.append(_packed(annotation.to(torch.int16)))
        self._shapes.append((annotation.shape[0], annotation.shape[1]))

    def keep(self, column: Column, labels: Tensor) -> None:
        """Take the next image's clusters or classes, integers ``[H, W]``."""
        self._maps[column].append(_packed(labels.to(torch.int16)))

    def score(self, name: str, stage: str, assignments: dict[str, Tensor]) -> None:
        """Score what was kept of a method and stage under each matching; in all processes.

        Args:
            assignments: by matching, the class of each cluster, int64 ``[K]``, −1 none. Classes
                refined after a matching are taken as they are.
        """
        for matching, assignment in assignments.items():
            maps = self._maps.get((name, stage, matching))
            table = None if maps else assignment.cpu().numpy()
            share = [
                self._image(packed, shape, annotation, table)
                for packed, shape, annotation in zip(
                    maps or self._maps[name, stage], self._shapes, self._annotations, strict=True
                )
            ]
            scores = torch.tensor(distributed.collected(share), dtype=torch.float64)
            self._found[name, stage, matching] = scores

    def told(self, name: str, stage: str, weights: Tensor) -> dict[str, Any]:
        """The mean over the images of every matching, with its interval; JSON-ready.

        Args:
            weights: float64 ``[B, I]``: how often each image counts in each resample; B may be 0.
        """
        found = {m: scores for (n, s, m), scores in self._found.items() if (n, s) == (name, stage)}
        return {
            matching: {
                "f": mean(scores).item(),
                "interval": {"f": interval(mean(scores, weights))},
            }
            for matching, scores in found.items()
        }

    def differences(self, weights: Tensor) -> list[dict[str, Any]]:
        """Of every column less the first under each matching, resample by resample; JSON-ready."""
        told: list[dict[str, Any]] = []
        firsts: dict[str, tuple] = {}
        for (name, stage, matching), scores in self._found.items():
            first = firsts.setdefault(matching, (name, stage, scores))
            if first[2] is scores:
                continue
            between = interval(mean(scores, weights) - mean(first[2], weights))
            told.append(
                {
                    "first": list(first[:2]),
                    "second": [name, stage],
                    "matching": matching,
                    "difference": (mean(scores) - mean(first[2])).item(),
                    "interval": between,
                    "differs": differs(between),
                }
            )
        return told

    def _image(
        self,
        packed: bytes,
        shape: tuple[int, int],
        annotation: bytes,
        table: np.ndarray | None,
    ) -> float:
        labels = _unpacked(packed, shape)
        classes = labels if table is None else table[labels]
        return boundary_f(classes, _unpacked(annotation, shape))


def mean(scores: Tensor, weights: Tensor | None = None) -> Tensor:
    """The mean over images that have a score: of ``[I]``, or under weights ``[B, I]``, ``[B]``."""
    if weights is None:
        return scores.nanmean()
    known = ~scores.isnan()
    return (weights @ scores.nan_to_num()) / (weights @ known.double())


def _packed(labels: Tensor) -> bytes:
    return zlib.compress(labels.cpu().numpy().tobytes(), 1)


def _unpacked(packed: bytes, shape: tuple[int, int]) -> np.ndarray:
    return np.frombuffer(zlib.decompress(packed), np.int16).reshape(shape)
