"""The public operators."""

from __future__ import annotations

from nefkern.ops.knn import knn

__all__ = ["knn"]
