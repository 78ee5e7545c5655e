"""The pure-PyTorch twin of every operator: written for reading, any device, float64 included."""

from __future__ import annotations

from nefkern.reference.add import add, add_backward
from nefkern.reference.kappa import kappa
from nefkern.reference.knn import knn
from nefkern.reference.neuralef_loss import neuralef_loss
from nefkern.reference.normalized_adjacency import (
    normalized_adjacency,
    normalized_adjacency_backward,
)
from nefkern.reference.quadratic_form import quadratic_form
from nefkern.reference.sddmm import sddmm
from nefkern.reference.spmm import spmm

__all__ = [
    "add",
    "add_backward",
    "kappa",
    "knn",
    "neuralef_loss",
    "normalized_adjacency",
    "normalized_adjacency_backward",
    "quadratic_form",
    "sddmm",
    "spmm",
]
