"""Training finds the eigenfunctions of graphs whose spectrum is known, in their order.

Continuous eigenfunctions, the project's κ and objective, Adam. Write w = β t: in units where the
trace has weight 1 it is the weight of the penalty. With u_1 ... u_{j-1} at eigenvectors, u_j climbs
the Rayleigh quotient of

    κ − w Σ_{i<j} κ u_i u_iᵀ κ,    where λ_i has become λ_i − w λ_i²,

and finds v_j if that lies under λ_j for all i < j: w above (λ_i − λ_j) / λ_i². With w above 1/λ_K
every one of the first K is pushed below 0, so that the K leading eigenvalues need only be positive;
the negative ones of κ, which is not positive semidefinite, are out of reach at any w.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

from nefkern.ops import CSRGraph, knn, normalized_adjacency, quadratic_form
from nefkern.spectral.eigenfunction import Eigenfunction, EigenfunctionConfig, cosine_schedule
from nefkern.spectral.eigenpairs import leading_eigenpairs
from nefkern.spectral.objective import BETA_AT_256, l2_batch_norm, objective

T = 0.01
WIDTH = 64


# ---- graphs ----


def blocks() -> CSRGraph:
    """A stochastic block model of four blocks in two pairs; eigenvalues 1, 0.85, 0.64, 0.42, 0.2:
    one for the pairs, one for the blocks of each, then noise."""
    sizes = torch.tensor([70, 60, 50, 40])
    rates = torch.tensor(
        [[0.55, 0.22, 0.03, 0.03], [0.22, 0.55, 0.03, 0.03],
         [0.03, 0.03, 0.60, 0.10], [0.03, 0.03, 0.10, 0.60]]
    )  # fmt: skip
    block = torch.arange(4).repeat_interleave(sizes)
    drawn = torch.rand(220, 220, generator=torch.Generator().manual_seed(0))
    edges = (drawn < rates[block][:, block]).triu(1)
    edges |= edges.T.clone()
    lists = torch.where(edges, torch.arange(220), -1)
    return normalized_adjacency(lists, num_nodes=220, symmetrize="union")


def circle() -> tuple[CSRGraph, Tensor]:
    """48 points on a circle, each joined to four on either side: a circulant matrix."""
    turn = torch.arange(48) * (2 * math.pi / 48)
    points = torch.stack([turn.cos(), turn.sin()], dim=1)
    return neighbour_graph(points, 8), points


def circle_eigenvalue(j: int) -> float:
    """Of cos(jθ) and of sin(jθ)."""
    return sum(math.cos(2 * math.pi * j * m / 48) for m in range(1, 5)) / 4


def moons() -> tuple[CSRGraph, Tensor]:
    """Two interleaved half circles of 50 noisy points each, alternating."""
    generator = torch.Generator().manual_seed(0)
    turn = math.pi * torch.rand(100, generator=generator)
    upper = torch.stack([turn.cos(), turn.sin()], dim=1)
    lower = torch.stack([1 - turn.cos(), 0.5 - turn.sin()], dim=1)
    which = torch.arange(100) % 2 == 0
    points = torch.where(which[:, None], lower, upper)
    points += 0.1 * torch.randn(100, 2, generator=generator)
    return neighbour_graph(points, 24), points


def neighbour_graph(points: Tensor, k: int) -> CSRGraph:
    _, neighbours = knn(points, k, metric="euclidean")
    return normalized_adjacency(neighbours, num_nodes=len(points), symmetrize="union")


# ---- training ----


def train(
    graph: CSRGraph,
    outputs: Callable[[], Tensor],
    parameters: Iterable[nn.Parameter],
    *,
    weight: float,
    steps: int,
    lr: float,
) -> Tensor:
    """Minimise the objective with penalty weight w; returns U, float64 ``[N, K]``."""
    optimizer = torch.optim.Adam(parameters, lr=lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = cosine_schedule(step / steps, lr, lr / 100)
        optimizer.zero_grad()
        objective(outputs(), graph, beta=weight / T, t=T).loss.backward()
        optimizer.step()
    with torch.no_grad():
        return l2_batch_norm(outputs())[0].double()


def train_table(graph: CSRGraph, count: int, weight: float, seed: int, steps: int = 600) -> Tensor:
    """The most general function: a free value for every node."""
    start = torch.randn(graph.num_nodes, count, generator=torch.Generator().manual_seed(seed))
    table = nn.Parameter(start)
    return train(graph, lambda: table, [table], weight=weight, steps=steps, lr=0.05)


def train_psi(graph: CSRGraph, points: Tensor, images: int, count: int, seed: int) -> Tensor:
    """ψ itself, unquantised, on random Fourier features of the points, ``[images, n, 64]``."""
    generator = torch.Generator().manual_seed(0)
    frequencies = 2 * torch.randn(2, WIDTH, generator=generator)
    phases = 2 * math.pi * torch.rand(WIDTH, generator=generator)
    tokens = (points @ frequencies + phases).cos().unflatten(0, (images, -1)) * math.sqrt(2)
    config = EigenfunctionConfig(count, heads=2, head_dim=32, mlp_hidden=96, quantize=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        psi = Eigenfunction(WIDTH, config)

    def outputs() -> Tensor:
        return psi.quantize(psi(tokens, (1, tokens.shape[1])), temperature=1.0).flatten(0, 1)

    values = leading_eigenpairs(graph, count, tol=0).values
    weight = 1.5 / values[-1].item()
    return train(graph, outputs, psi.parameters(), weight=weight, steps=700, lr=3e-3)


# ---- comparison ----


def overlaps(found: Tensor, graph: CSRGraph, eigenspaces: list[list[int]]) -> list[float]:
    """The smallest cosine between the found columns and the eigenvectors of each eigenspace: of
    the principal angles, so |cosine| where it has one dimension."""
    exact = leading_eigenpairs(graph, found.shape[1], tol=0).vectors
    return [
        torch.linalg.svdvals(torch.linalg.qr(found[:, at])[0].T @ exact[:, at]).min().item()
        for at in eigenspaces
    ]


def check(found: Tensor, graph: CSRGraph, eigenspaces: list[list[int]]) -> None:
    """Cosines of at least 0.99, in the eigenvectors' order, and eigenvalues on R's diagonal."""
    cosines = overlaps(found, graph, eigenspaces)
    print("cosines:", " ".join(f"{c:.5f}" for c in cosines))
    assert min(cosines) >= 0.99
    values = leading_eigenpairs(graph, found.shape[1], tol=0).values
    quotients = quadratic_form(found.float(), graph).diagonal().double()
    torch.testing.assert_close(quotients, values, atol=0.01, rtol=0)


def test_blocks_one_by_one():
    graph = blocks()
    values = leading_eigenpairs(graph, 5, tol=0).values
    assert values.diff().abs().min() > 0.1, "far apart, or the order would not show"
    assert torch.linalg.eigvalsh(graph.to_dense())[0] < -0.2, "κ is indefinite"
    found = train_table(graph, 4, weight=2 / values[3].item(), seed=0)
    check(found, graph, [[0], [1], [2], [3]])


def test_psi_finds_the_circles_harmonics():
    """Constant, then cosine and sine of once and twice the angle: pairs of equal eigenvalues, of
    which only the plane is determined. The circle reaches ψ as four images of a quarter each."""
    graph, points = circle()
    values = leading_eigenpairs(graph, 5, tol=0).values
    expected = [circle_eigenvalue(j) for j in (0, 1, 1, 2, 2)]
    assert values.tolist() == pytest.approx(expected, abs=1e-6)
    found = train_psi(graph, points, images=4, count=5, seed=0)
    check(found, graph, [[0], [1, 2], [3, 4]])


def test_psi_finds_the_moons_eigenfunctions():
    graph, points = moons()
    found = train_psi(graph, points, images=2, count=3, seed=0)
    check(found, graph, [[0], [1], [2]])


@pytest.mark.parametrize(("factor", "second"), [(0.5, 0), (3.0, 1)])
def test_the_second_is_found_from_the_predicted_weight_on(factor, second):
    """Below w = (λ_1 − λ_2) / λ_1² the second column is v_1 once more; above, it is v_2."""
    graph = blocks()
    values, exact, _ = leading_eigenpairs(graph, 2, tol=0)
    weight = factor * ((values[0] - values[1]) / values[0] ** 2).item()
    found = train_table(graph, 2, weight=weight, seed=0, steps=1000)
    assert (found[:, 0] @ exact[:, 0]).abs() >= 0.99
    assert (found[:, 1] @ exact[:, second]).abs() >= 0.99


def test_the_papers_weight_lets_columns_be_alike():
    """β t = 0.0008: without the noise of quantisation all of a few columns become v_1."""
    graph = blocks()
    found = train_table(graph, 4, weight=BETA_AT_256 * T, seed=0, steps=1500)
    exact = leading_eigenpairs(graph, 1, tol=0).vectors
    assert (exact.T @ found).abs().min() >= 0.99
