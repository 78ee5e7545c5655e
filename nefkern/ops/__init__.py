"""The public operators, registered with the PyTorch dispatcher as ``torch.ops.nefkern``."""

from __future__ import annotations

from nefkern.ops.add import add
from nefkern.ops.csr import CSRGraph
from nefkern.ops.kappa import kappa
from nefkern.ops.knn import knn
from nefkern.ops.linear_attention import linear_attention
from nefkern.ops.neuralef_loss import neuralef_loss
from nefkern.ops.normalized_adjacency import normalized_adjacency
from nefkern.ops.quadratic_form import quadratic_form
from nefkern.ops.spmm import spmm

__all__ = [
    "CSRGraph",
    "add",
    "kappa",
    "knn",
    "linear_attention",
    "neuralef_loss",
    "normalized_adjacency",
    "quadratic_form",
    "spmm",
]
