"""The operators' formulas written out densely in float64: what every kernel is held against."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def scores(x: Tensor, others: Tensor, metric: str) -> Tensor:
    """[N, M]: the higher, the nearer."""
    x, others = x.double(), others.double()
    if metric == "cosine":
        x, others = F.normalize(x), F.normalize(others)
    if metric == "euclidean":
        return -torch.cdist(x, others, compute_mode="donot_use_mm_for_euclid_dist")
    return x @ others.T


def own_segment(matrix: Tensor, patches: int) -> Tensor:
    """Scores of rows of other images, and of a row with itself, made worst."""
    image = torch.arange(len(matrix), device=matrix.device) // patches
    return matrix.masked_fill_(image[:, None] != image, -math.inf)


def adjacency(indices: Tensor, values: Tensor | None, symmetrize: str) -> Tensor:
    """D^(-1/2) A D^(-1/2) of lists without duplicates; differentiable in the values."""
    n = len(indices)
    values = torch.ones(indices.shape, device=indices.device) if values is None else values
    zeros = torch.zeros(n, n, dtype=torch.float64, device=indices.device)
    a = zeros.scatter(1, indices.long(), values.double().clamp(min=0))
    a = (a + a.T) / 2 if symmetrize == "mean" else torch.maximum(a, a.T)
    degree = a.sum(1)
    scale = torch.where(degree > 0, degree.rsqrt(), 0.0)
    return scale[:, None] * a * scale


def kappa(indices: Tensor, values: Tensor, near: Tensor, alpha: float) -> Tensor:
    """Eq 4."""
    return adjacency(indices, values, "mean") + alpha * adjacency(near, None, "union")


def similarities(features: Tensor, indices: Tensor) -> Tensor:
    """[N, k]: cosine of every row with the rows it lists."""
    unit = F.normalize(features.double())
    return (unit @ unit.T).gather(1, indices.long())


def objective(u: Tensor, matrix: Tensor, beta: float, t: float) -> tuple[Tensor, Tensor]:
    """Eqs 5-7: the loss, whose gradient is that of the stopped R, and R."""
    y, count = matrix @ u, u.shape[1]
    r = u.detach().T @ y
    loss = -t / count * (u * y).sum() + beta * t**2 / count * r.triu(1).square().sum()
    return loss, r.detach()


def attention(q: Tensor, k: Tensor, v: Tensor, feature_map: str, mask: Tensor | None) -> Tensor:
    """The N x N attention matrix written out."""
    q, k, v = q.double(), k.double(), v.double()
    valid = torch.ones_like(k[:, :1, :, 0], dtype=torch.bool) if mask is None else mask[:, None]
    if feature_map == "elu":
        matrix = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT) * valid[:, :, None]
        return (matrix / (matrix.sum(-1, keepdim=True) + 1e-6)) @ v
    k = k.masked_fill(~valid[..., None], -1e300).softmax(-2) * valid[..., None]
    return (q.softmax(-1) / math.sqrt(q.shape[-1]) @ k.mT) @ v
