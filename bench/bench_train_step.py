"""What a training step costs on given features: κ and the objective, and the step of ψ as a whole.

The opponent is the method as one writes it down in dense PyTorch: the whole matrix of similarities,
its top k, N x N adjacencies, autograd through the dense objective.
"""

from __future__ import annotations

import torch

from bench.bench_linear_attention import einsum_attention
from bench.bench_neuralef_loss import dense_objective, step
from bench.graph_inputs import ALPHA, DENSE_ROWS, psi_rows
from bench.harness import Work, on_reference
from bench.train_step import Step, dense_graph, make_batch
from nefkern.images.graph import GraphConfig, kappa
from nefkern.ops import neuralef_loss
from nefkern.spectral.objective import scaled_beta


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


def test_train_step(race, size):
    it = Step(size)
    n, channels = it.features.shape

    def dense():
        return it.dense(einsum_attention, dense_objective)

    contestants = {
        "nefkern": it.ours,
        "nefkern, bfloat16 autocast": lambda: it.ours(amp=True),
    }
    if n <= DENSE_ROWS:
        contestants["dense PyTorch"] = dense
        torch.testing.assert_close(it.ours(), dense(), rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(it.ours(amp=True), dense(), rtol=2e-2, atol=1e-5)
    weights = sum(p.numel() for p in it.psi.parameters())
    # Each weight meets each row three times: forward, and for both gradients.
    work = Work(28.0 * weights, {"float32": 6.0 * weights * n})
    sizes = {
        "N": n, "C": channels, "k": it.config.neighbours, "K": it.psi.config.num_eigenfunctions,
        "weights": weights,
    }  # fmt: skip
    race("training step of psi", contestants, sizes=sizes, work=work, rounds=3)
