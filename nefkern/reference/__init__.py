"""The pure-PyTorch twin of every operator: written for reading, any device, float64 included."""

from __future__ import annotations

from nefkern.reference.add import add
from nefkern.reference.kappa import kappa
from nefkern.reference.knn import knn
from nefkern.reference.neuralef_loss import neuralef_loss
from nefkern.reference.normalized_adjacency import normalized_adjacency
from nefkern.reference.quadratic_form import quadratic_form
from nefkern.reference.sddmm import sddmm
from nefkern.reference.spmm import spmm

__all__ = [
    "add",
    "kappa",
    "knn",
    "neuralef_loss",
    "normalized_adjacency",
    "quadratic_form",
    "sddmm",
    "spmm",
]
