"""``python -m bench.exactness``: how far the operators are from the paper's formulas in float64.

κ, the objective, its gradient and both attention maps are computed densely in float64, straight
from the formulas, and compared with every backend that runs here. The figure is the largest
difference over the largest entry.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.bench_knn import clustered
from bench.graph_inputs import psi_rows
from bench.harness import DEVICE
from nefkern import backends
from nefkern.images.graph import GraphConfig, kappa, pixel_positions
from nefkern.ops import linear_attention, neuralef_loss
from nefkern.runtime.errors import ArgumentParser, command
from nefkern.spectral.objective import scaled_beta

IMAGES, GRID, CHANNELS, NEIGHBOURS, OUTPUTS = 3, (10, 12), 48, 20, 24
T, ALPHA = 0.01, 0.3


def dense_kappa(features: Tensor, images: Tensor) -> Tensor:
    """κ by eqs 2-4: [N, N] float64."""
    unit = F.normalize(features.double())
    similarity = (unit @ unit.T).fill_diagonal_(-math.inf)
    a = _nearest(similarity, NEIGHBOURS) * similarity.clamp(min=0)
    per_image = GRID[0] * GRID[1]
    image = torch.arange(len(features), device=DEVICE) // per_image
    b = torch.zeros_like(a)
    for near, weight in GraphConfig().pixel_graphs:
        points = pixel_positions(images, GRID, weight).double()
        closeness = -(points[:, None] - points).norm(dim=2)
        closeness[image[:, None] != image] = -math.inf
        b = torch.maximum(b, _nearest(closeness.fill_diagonal_(-math.inf), near))
    return _normalized((a + a.T) / 2) + ALPHA * _normalized(torch.maximum(b, b.T))


def _nearest(score: Tensor, k: int) -> Tensor:
    return torch.zeros_like(score).scatter_(1, score.topk(k).indices, 1.0)


def _normalized(a: Tensor) -> Tensor:
    scale = torch.where(a.sum(1) > 0, a.sum(1).rsqrt(), 0.0)
    return scale[:, None] * a * scale


def dense_objective(u: Tensor, matrix: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Eqs 5-7: loss, R and dL/dU."""
    u = u.double().requires_grad_()
    y = matrix @ u
    r_hat = u.detach().T @ y
    loss = -T / OUTPUTS * (u * y).sum() + beta * T**2 / OUTPUTS * r_hat.triu(1).square().sum()
    (gradient,) = torch.autograd.grad(loss, u)
    return loss.detach(), r_hat.detach(), gradient


def dense_attention(q: Tensor, k: Tensor, v: Tensor, feature_map: str) -> Tensor:
    """The [N, N] attention matrix written out."""
    if feature_map == "softmax":
        return (q.softmax(-1) / math.sqrt(q.shape[-1]) @ k.softmax(-2).mT) @ v
    weights = (F.elu(q) + 1) @ (F.elu(k) + 1).mT
    return weights / weights.sum(-1, keepdim=True) @ v


def graph_differences() -> Iterator[tuple[str, float]]:
    """κ, loss, R and gradient on the backend in force."""
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(IMAGES, 3, *GRID, generator=generator).to(DEVICE)
    features = clustered(IMAGES * GRID[0] * GRID[1], CHANNELS)
    graph = kappa(features, images, GRID, GraphConfig(NEIGHBOURS, ALPHA))
    exact = dense_kappa(features, images)
    yield "κ", difference(graph.to_dense(), exact)
    psi, beta = psi_rows(len(features), OUTPUTS).requires_grad_(), scaled_beta(OUTPUTS)
    loss, r = neuralef_loss(psi, graph, beta, T)
    (gradient,) = torch.autograd.grad(loss, psi)
    found = (loss.detach(), r, gradient)
    names = ("loss", "R", "gradient of the loss")
    for name, a, b in zip(names, found, dense_objective(psi.detach(), exact, beta), strict=True):
        yield name, difference(a, b)


def attention_differences(feature_map: str) -> Iterator[tuple[str, float]]:
    """Output and gradients of the attention on the backend in force."""
    generator = torch.Generator().manual_seed(4)
    q, k, v, grad = (
        torch.randn(2, 2, 70, 64, generator=generator).to(DEVICE) for _ in range(4)
    )  # fmt: skip

    def both(function: Callable, *tensors: Tensor) -> list[Tensor]:
        tensors = [t.detach().requires_grad_() for t in tensors]
        out = function(*tensors)
        return [out.detach(), *torch.autograd.grad(out, tensors, grad.to(out.dtype))]

    found = both(lambda *x: linear_attention(*x, feature_map=feature_map), q, k, v)
    exact = both(
        lambda *x: dense_attention(*x, feature_map), q.double(), k.double(), v.double()
    )  # fmt: skip
    yield f"attention, {feature_map}", difference(found[0], exact[0])
    worst = max(difference(a, b) for a, b in zip(found[1:], exact[1:], strict=True))
    yield f"its gradients, {feature_map}", worst


def difference(found: Tensor, exact: Tensor) -> float:
    """The largest difference over the largest entry."""
    return ((found.double() - exact).abs().max() / exact.abs().max()).item()


def differences() -> Iterator[tuple[str, float]]:
    yield from graph_differences()
    for feature_map in ("elu", "softmax"):
        yield from attention_differences(feature_map)


@command
def main(arguments: list[str] | None = None) -> None:
    ArgumentParser(
        prog="python -m bench.exactness", description=__doc__.partition("\n\n")[2]
    ).parse_args(arguments)
    names = [name for name, reason in backends.available().items() if reason is None]
    if DEVICE.type == "cuda":
        names = [name for name in names if name != "cpu"]
    print(f"{'float32 against float64':28}" + "".join(f"{name:>12}" for name in names))
    columns = []
    for name in names:
        with backends.backend(name):
            columns.append(dict(differences()))
    for row in columns[0]:
        print(f"{row:28}" + "".join(f"{column[row]:12.1e}" for column in columns))


if __name__ == "__main__":
    sys.exit(main())
