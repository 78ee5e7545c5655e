"""The public operators, registered with the PyTorch dispatcher as ``torch.ops.nefkern``."""

from __future__ import annotations

from nefkern.ops.add import add
from nefkern.ops.csr import CSRGraph
from nefkern.ops.feature_kappa import feature_kappa, neighbour_similarities
from nefkern.ops.kappa import kappa
from nefkern.ops.knn import knn
from nefkern.ops.linear_attention import linear_attention
from nefkern.ops.neuralef_loss import neuralef_loss
from nefkern.ops.normalized_adjacency import normalized_adjacency
from nefkern.ops.quadratic_form import quadratic_form
from nefkern.ops.sddmm import sddmm
from nefkern.ops.spmm import spmm

__all__ = [
    "CSRGraph",
    "add",
    "feature_kappa",
    "kappa",
    "knn",
    "linear_attention",
    "neighbour_similarities",
    "neuralef_loss",
    "normalized_adjacency",
    "quadratic_form",
    "sddmm",
    "spmm",
]
