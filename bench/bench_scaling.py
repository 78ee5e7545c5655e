"""Growth with N: knn against the bare matrix product, κ and the objective against dense PyTorch.

The bare product is computed in blocks of rows into one buffer, so that it needs no N x N memory
either. Time by N² and memory by N should stay flat.
"""

from __future__ import annotations

import torch

from bench.bench_knn import assert_right, clustered, work_of
from bench.bench_neuralef_loss import dense_objective, step
from bench.bench_train_step import work_of_graph
from bench.graph_inputs import ALPHA, DENSE_ROWS, psi_rows
from bench.harness import DEVICE
from bench.train_step import dense_graph
from nefkern.images.graph import GraphConfig, kappa
from nefkern.ops import knn, neuralef_loss
from nefkern.spectral.objective import scaled_beta

ROWS = {
    "small": (225, 900),
    "paper": (3600, 7200, 14400, 28800),
    "large": (3600, 7200, 14400, 28800, 57600, 115200),
}
GRID = (30, 30)
BLOCK = 3600


def pytest_generate_tests(metafunc):
    if "rows" in metafunc.fixturenames:
        metafunc.parametrize("rows", ROWS[metafunc.config.getoption("--benchmark-size")])


def blocked_product(unit, buffer):
    for block in unit.split(len(buffer)):
        torch.mm(block, unit.T, out=buffer[: len(block)])


def rounds_of(rows):
    return {"rounds": 5} if rows <= 14400 else {"rounds": 3 if rows <= 28800 else 1}


def test_knn(race, rows, size):
    channels, k = (64, 16) if size == "small" else (384, 256)
    x = clustered(rows, channels)
    assert_right(x, k, "cosine")
    unit = torch.nn.functional.normalize(x)
    buffer = torch.empty(min(BLOCK, rows), rows, device=DEVICE)
    contestants = {
        "nefkern": lambda: knn(x, k),
        "torch.mm alone": lambda: blocked_product(unit, buffer),
    }
    sizes = {"N": rows, "C": channels, "k": k}
    work = work_of(rows, channels, k)
    race(f"scaling, knn, N = {rows}", contestants, sizes=sizes, work=work, **rounds_of(rows))


def test_graph_and_objective(race, rows, size):
    channels, k, outputs = (64, 16, 32) if size == "small" else (384, 256, 256)
    grid = (15, 15) if rows < 900 else GRID
    count = rows // (grid[0] * grid[1])
    features, psi = clustered(rows, channels), psi_rows(rows, outputs).requires_grad_()
    images = torch.rand(count, 3, *grid, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    config = GraphConfig(neighbours=k, alpha=ALPHA)
    beta = scaled_beta(outputs)

    def ours():
        return step(neuralef_loss, psi, kappa(features, images, grid, config), beta)

    def dense():
        return step(dense_objective, psi, dense_graph(features, images, grid, config), beta)

    contestants = {"nefkern": ours}
    if rows <= DENSE_ROWS:
        contestants["dense PyTorch"] = dense
        torch.testing.assert_close(ours()[0], dense()[0], rtol=1e-5, atol=1e-8)
    nnz = kappa(features, images, grid, config).nnz
    race(
        f"scaling, graph and objective, N = {rows}",
        contestants,
        sizes={"N": rows, "C": channels, "k": k, "K": outputs, "nnz": nnz},
        work=work_of_graph(rows, channels, k, outputs, nnz),
        **rounds_of(rows),
    )
