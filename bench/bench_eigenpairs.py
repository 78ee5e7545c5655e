"""Leading eigenpairs of a data set's κ against scipy's LOBPCG and ARPACK at equal residual."""

from __future__ import annotations

import functools
import time
from unittest import mock

import numpy as np
import torch

from bench.graph_inputs import ALPHA, kappa, lists_of
from bench.harness import DEVICE, Work, on_reference
from nefkern.ops import CSRGraph, normalized_adjacency, spmm
from nefkern.spectral import chebyshev
from nefkern.spectral.eigenpairs import leading_eigenpairs
from nefkern.spectral.nystrom import cross_weights, degrees, extend

# images, patches an image, feature channels, neighbours k, eigenpairs m
SIZES = {
    "small": (8, 256, 64, 16, 16),
    "paper": (160, 400, 384, 64, 128),  # the training set of docs/quality.md
    "large": (640, 400, 384, 64, 128),
}
TOL = 1e-3
LIMIT = 300.0  # seconds; then an opponent is stopped, and its ratio is a lower bound


def manifolds(n: int, channels: int, clusters: int = 60, dimensions: int = 4) -> torch.Tensor:
    """[n, channels] rows around a few centres, in a few directions that are each cluster's own:
    eigenvalues fall slowly, where isotropic noise would have a spectrum of noise."""
    generator = torch.Generator().manual_seed(0)
    centres = 0.5 * torch.randn(clusters, channels, generator=generator)
    directions = torch.randn(clusters, dimensions, channels, generator=generator)
    which = torch.randint(clusters, (n,), generator=generator)
    place = torch.randn(n, 1, dimensions, generator=generator)
    rows = torch.cat(
        [p @ directions[w] for p, w in zip(place.split(4096), which.split(4096), strict=True)]
    )
    return (centres[which] + rows[:, 0]).to(DEVICE)


@functools.cache
def graph_of(size: str) -> CSRGraph:
    images, patches, channels, k, _ = SIZES[size]
    return kappa(*lists_of(manifolds(images * patches, channels), images, k))


def stopped(matrix):
    """The matrix as an operator that raises TimeoutError after the limit."""
    from scipy.sparse.linalg import LinearOperator

    end = time.perf_counter() + LIMIT

    def product(x):
        if time.perf_counter() > end:
            raise TimeoutError
        return matrix @ x

    return LinearOperator(matrix.shape, matvec=product, matmat=product, dtype=matrix.dtype)


def lobpcg(matrix, count: int, tolerance: float):
    from scipy.sparse.linalg import lobpcg

    start = np.random.default_rng(0).standard_normal((matrix.shape[0], count)).astype("float32")
    try:
        return lobpcg(stopped(matrix), start, largest=True, tol=tolerance, maxiter=1000)
    except TimeoutError:
        return None


def arpack(matrix, count: int):
    from scipy.sparse.linalg import eigsh

    start = np.random.default_rng(0).standard_normal(matrix.shape[0]).astype("float32")
    try:
        return eigsh(stopped(matrix), count, which="LA", tol=TOL, v0=start)
    except TimeoutError:
        return None


def assert_right(graph: CSRGraph, values, vectors, tolerance: float):
    """Residuals in float64."""
    v = np.asarray(vectors, dtype="float64")
    residuals = np.linalg.norm(
        graph.to_scipy().astype("float64") @ v - v * np.asarray(values), axis=0
    )
    assert residuals.max() <= 1.1 * tolerance


def work_of(graph: CSRGraph, count: int) -> Work:
    """What our own iteration multiplies: the products with κ; for each Rayleigh-Ritz the Gram
    matrix, Q, H and both rotations."""
    widths, rounds = [], []
    sparse, ritz = chebyshev.spmm, chebyshev._rayleigh_ritz

    def product(graph, x):
        widths.append(x.shape[1])
        return sparse(graph, x)

    def projected(graph, basis):
        rounds.append(basis.shape[1])
        return ritz(graph, basis)

    with (
        mock.patch.object(chebyshev, "spmm", product),
        mock.patch.object(chebyshev, "_rayleigh_ritz", projected),
    ):
        leading_eigenpairs(graph, count, tol=TOL)
    n = graph.num_nodes
    flops = 2.0 * graph.nnz * sum(widths) + sum(5 * 2.0 * n * width**2 for width in rounds)
    print(f"{sum(widths)} columns of products, {len(rounds)} rounds of {rounds[0]} columns")
    return Work(8.0 * graph.nnz * len(widths) + 8.0 * n * sum(widths), {"float32": flops})


def test_leading_eigenpairs(race, size, request):
    graph, count = graph_of(size), SIZES[size][-1]
    found = leading_eigenpairs(graph, count, tol=TOL)
    tolerance = TOL * found.values[0].item()
    assert_right(graph, found.values, found.vectors.cpu(), tolerance)
    matrix = graph.to_scipy()
    contestants = {
        "nefkern": lambda: leading_eigenpairs(graph, count, tol=TOL),
        "scipy LOBPCG": lambda: lobpcg(matrix, count, tolerance),
        "scipy ARPACK": lambda: arpack(matrix, count),
    }
    rounds = request.config.getoption("--benchmark-rounds")
    if size == "small":
        assert_right(graph, *lobpcg(matrix, count, tolerance), tolerance)
        assert_right(graph, *arpack(matrix, count), tolerance)
        contestants["reference"] = on_reference(contestants["nefkern"])
    else:  # minutes a call
        rounds = 1
    sizes = {"N": graph.num_nodes, "k": SIZES[size][3], "m": count, "nnz": graph.nnz}
    work = work_of(graph, count)
    race(
        "eigenpairs, residual 1e-3",
        contestants,
        sizes=sizes,
        work=work,
        rounds=rounds,
        clock="wall",
    )


def test_extension(race, size):
    """An eighth of the rows as new ones, against the fixed-point iteration of κ's equation."""
    images, patches, channels, k, count = SIZES[size]
    rows = manifolds(images * patches, channels)
    new_images = images // 8
    new = new_images * patches
    neighbours, similarities, _ = lists_of(rows, images, k)
    weights = cross_weights(
        neighbours[:new], similarities[:new], degrees(neighbours, similarities, len(rows))
    )
    _, _, near = lists_of(rows[:new], new_images, min(k, new - 1))
    pixel = normalized_adjacency(near, num_nodes=new, symmetrize="union")
    vectors = torch.randn(len(rows), count, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    values = torch.linspace(1.3, 1.0, count).to(DEVICE)
    cross = (neighbours[:new].long(), weights)

    def fixed_point():
        gathered = torch.cat(
            [
                torch.einsum("nk,nkm->nm", weights[i : i + 1000], vectors[cross[0][i : i + 1000]])
                for i in range(0, new, 1000)
            ]
        )
        v = gathered / values
        for _ in range(30):
            v = (gathered + ALPHA * spmm(pixel, v)) / values
        return v

    def ours():
        return extend(values, vectors, cross, pixel=pixel, alpha=ALPHA)

    torch.testing.assert_close(ours(), fixed_point(), atol=1e-4, rtol=1e-4)
    sizes = {"N": len(rows), "n": new, "k": k, "m": count}
    race(
        "Nyström extension",
        {"nefkern": ours, "gather, 30 fixed-point steps": fixed_point},
        sizes=sizes,
        clock="wall",
    )
