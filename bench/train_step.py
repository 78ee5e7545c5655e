"""A training step on given features, ours and as one writes it down in dense PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.bench_knn import clustered
from bench.graph_inputs import ALPHA, SIZES, dense_kappa
from bench.harness import DEVICE
from nefkern.images.graph import GraphConfig, kappa, pixel_positions
from nefkern.spectral import eigenfunction
from nefkern.spectral.eigenfunction import Eigenfunction, EigenfunctionConfig
from nefkern.spectral.objective import objective, scaled_beta

GRIDS = {128: (8, 16), 900: (30, 30)}


def make_batch(size):
    """F [N, C], images [B, 3, h, w] with one pixel a patch, the grid, k, K."""
    count, patches, channels, k, outputs = SIZES[size]
    grid = GRIDS[patches]
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(count, 3, *grid, generator=generator).to(DEVICE)
    return clustered(count * patches, channels), images, grid, k, outputs


def dense_graph(features, images, grid, config):
    """kappa of the paper's section 3.3 as an N x N matrix."""
    n, per_image = len(features), grid[0] * grid[1]
    unit = F.normalize(features)
    similarity = unit @ unit.T
    similarity.fill_diagonal_(-math.inf)
    values, neighbours = similarity.topk(config.neighbours)
    del similarity
    first = torch.arange(n, device=features.device) // per_image * per_image
    near = []
    for k, weight in config.pixel_graphs:
        points = pixel_positions(images, grid, weight).view(len(images), per_image, 5)
        distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
        distance.diagonal(dim1=1, dim2=2).fill_(math.inf)
        near.append(distance.topk(k, largest=False).indices.flatten(0, 1) + first[:, None])
    return dense_kappa(neighbours, values, torch.cat(near, dim=1))


class Step:
    """ψ forward, kappa, objective, backward, Adam: what training repeats, without the backbone."""

    def __init__(self, size: str) -> None:
        self.features, self.images, self.grid, k, outputs = make_batch(size)
        n, channels = self.features.shape
        self.maps = clustered(n, 3 * channels).view(len(self.images), -1, 3 * channels)
        self.config = GraphConfig(neighbours=k, alpha=ALPHA)
        self.beta = scaled_beta(outputs)
        torch.manual_seed(0)
        config = EigenfunctionConfig(num_eigenfunctions=outputs)
        self.psi = Eigenfunction(3 * channels, config).to(DEVICE)
        # A learning rate of 0: every call computes the same.
        self.fused = torch.optim.Adam(self.psi.parameters(), lr=0.0, fused=True)
        self.plain = torch.optim.Adam(self.psi.parameters(), lr=0.0)

    def outputs(self, amp: bool) -> Tensor:
        torch.manual_seed(1)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=amp):
            logits = self.psi(self.maps, self.grid)
        return self.psi.quantize(logits, 1.0).flatten(0, 1)

    def ours(self, *, amp: bool = False) -> Tensor:
        graph = kappa(self.features, self.images, self.grid, self.config)
        return finish(objective(self.outputs(amp), graph, beta=self.beta).loss, self.fused)

    def dense(self, attention: Callable, loss_of: Callable) -> Tensor:
        """With a dense kappa, ``attention`` in ψ, and ``loss_of(U, kappa, beta)``."""
        graph = dense_graph(self.features, self.images, self.grid, self.config)
        own = eigenfunction.linear_attention
        eigenfunction.linear_attention = attention
        try:
            u = self.outputs(False)
        finally:
            eigenfunction.linear_attention = own
        return finish(loss_of(u / u.norm(dim=0).clamp_min(1), graph, self.beta), self.plain)


def finish(loss: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """Backward and the optimiser's step."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()
