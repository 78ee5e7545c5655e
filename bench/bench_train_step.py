"""What a training step costs on given features: κ and the objective, and the step of ψ as a whole.

The opponent is the method as one writes it down in dense PyTorch: the whole matrix of similarities,
its top k, N x N adjacencies, autograd through the dense objective.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from bench.bench_knn import clustered
from bench.bench_linear_attention import einsum_attention
from bench.bench_neuralef_loss import dense_objective, step
from bench.graph_inputs import ALPHA, DENSE_ROWS, SIZES, dense_kappa, psi_rows
from bench.harness import DEVICE, Work, on_reference
from nefkern import eigenfunction
from nefkern.eigenfunction import Eigenfunction, EigenfunctionConfig
from nefkern.graph import GraphConfig, kappa, pixel_positions
from nefkern.objective import objective, scaled_beta
from nefkern.ops import neuralef_loss

GRIDS = {128: (8, 16), 900: (30, 30)}


def make_batch(size):
    """F [N, C], images [B, 3, h, w] with one pixel a patch, the grid, k, K."""
    count, patches, channels, k, outputs = SIZES[size]
    grid = GRIDS[patches]
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(count, 3, *grid, generator=generator).to(DEVICE)
    return clustered(count * patches, channels), images, grid, k, outputs


def dense_graph(features, images, grid, config):
    """kappa of METHOD's section 3.3 as an N x N matrix."""
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


def work_of_graph(n, channels, k, outputs, nnz):
    """Similarities of every pair once, the chosen in float32, kappa U, and two products by K."""
    exact = 2.0 * n * k * channels + 2.0 * nnz * outputs + 4.0 * n * outputs**2
    moved = 4.0 * n * channels + 8.0 * nnz + 12.0 * n * outputs
    return Work(moved, {"bfloat16": float(n) * n * channels, "float32": exact})


def test_graph_and_objective(race, size):
    features, images, grid, k, outputs = make_batch(size)
    n, beta = len(features), scaled_beta(outputs)
    config = GraphConfig(neighbours=k, alpha=ALPHA)
    psi = psi_rows(n, outputs).requires_grad_()

    def ours():
        return step(neuralef_loss, psi, kappa(features, images, grid, config), beta)

    def dense():
        return step(dense_objective, psi, dense_graph(features, images, grid, config), beta)

    contestants = {"nefkern": ours, "reference": on_reference(ours)}
    if n <= DENSE_ROWS:
        contestants["dense PyTorch"] = dense
        (loss, gradient), (exact, exact_gradient) = ours(), dense()
        torch.testing.assert_close(loss, exact, rtol=1e-5, atol=1e-8)
        assert (gradient - exact_gradient).norm() <= 1e-4 * exact_gradient.norm()
    nnz = kappa(features, images, grid, config).nnz
    race(
        "graph and objective",
        contestants,
        sizes={"N": n, "C": features.shape[1], "k": k, "K": outputs, "nnz": nnz},
        work=work_of_graph(n, features.shape[1], k, outputs, nnz),
    )


def test_train_step(race, size, monkeypatch):
    """ψ forward, kappa, objective, backward, Adam: what training repeats, without the backbone."""
    features, images, grid, k, outputs = make_batch(size)
    n, channels = features.shape
    maps = clustered(n, 3 * channels).view(len(images), -1, 3 * channels)
    config = GraphConfig(neighbours=k, alpha=ALPHA)
    beta = scaled_beta(outputs)
    torch.manual_seed(0)
    psi = Eigenfunction(3 * channels, channels, EigenfunctionConfig(num_eigenfunctions=outputs)).to(
        DEVICE
    )
    fused = torch.optim.Adam(psi.parameters(), lr=0.0, fused=True)  # every call does the same
    plain = torch.optim.Adam(psi.parameters(), lr=0.0)

    def outputs_of(amp):
        torch.manual_seed(1)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=amp):
            logits = psi(maps)
        return psi.quantize(logits, 1.0).flatten(0, 1)

    def finish(loss, optimizer):
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    def ours(amp=False):
        graph = kappa(features, images, grid, config)
        return finish(objective(outputs_of(amp), graph, beta=beta).loss, fused)

    def dense():
        graph = dense_graph(features, images, grid, config)
        with monkeypatch.context() as patch:
            patch.setattr(eigenfunction, "linear_attention", einsum_attention)
            u = outputs_of(False)
        return finish(dense_objective(u / u.norm(dim=0).clamp_min(1), graph, beta), plain)

    contestants = {"nefkern": ours, "nefkern, bfloat16 autocast": lambda: ours(amp=True)}
    if n <= DENSE_ROWS:
        contestants["dense PyTorch"] = dense
        torch.testing.assert_close(ours(), dense(), rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(ours(amp=True), dense(), rtol=2e-2, atol=1e-5)
    weights = sum(p.numel() for p in psi.parameters())
    # Each weight meets each row three times: forward, and for both gradients.
    work = Work(28.0 * weights, {"float32": 6.0 * weights * n})
    sizes = {"N": n, "C": channels, "k": k, "K": outputs, "weights": weights}
    race("training step of psi", contestants, sizes=sizes, work=work, rounds=3)
