"""The operators in pure PyTorch: written for reading, float64-capable, any device."""

from __future__ import annotations

from nefkern.reference.knn import knn

__all__ = ["knn"]
