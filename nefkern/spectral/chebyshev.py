"""Chebyshev-filtered subspace iteration: leading eigenpairs of a graph by sparse products alone.

A block of random vectors goes through p(κ), where p is a scaled Chebyshev polynomial: at most 1 on
the unwanted part [a, c] of the spectrum, growing fastest of all polynomials of its degree above c.
It is orthonormalised, rotated to Ritz vectors (Rayleigh-Ritz), and filtered again where residuals
are above the tolerance. Eigenvalues that lie close together, as those of a data set's κ do, cost a
Krylov method thousands of orthogonalisations; here only a few, of whole blocks.

Zhou, Saad, Tiago, Chelikowsky, "Self-consistent-field calculations using Chebyshev-filtered
subspace iteration", J. Comput. Phys. 219, 2006 (the iteration, the scaled recurrence); Zhou, Li,
"Bounding the spectrum of large Hermitian matrices", Linear Algebra Appl. 435, 2011 (the lower end);
Winkelmann, Springer, Di Napoli, "ChASE", ACM TOMS 45, 2019 (a degree for every column); Lin, Saad,
Yang, "Approximating spectral densities of large matrices", SIAM Review 58, 2016 (the first cut).
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nefkern.ops import CSRGraph, spmm
from nefkern.runtime.precision import exact_products

log = logging.getLogger(__name__)

_PROBES, _LANCZOS_STEPS = 16, 16
_MOST_DEGREES = 40  # beyond, Rayleigh-Ritz between filters costs less than 10%
_BLOCK_ROWS = 8192  # rows that are multiplied by a small matrix, or widened, at a time
_SAFETY = 0.2  # of the goal is aimed at: another round costs more than a few degrees
_PANEL = {"cpu": 64}  # columns filtered together: what is gathered from stays in the cache


@dataclass(frozen=True)
class SpectrumEstimate:
    """What a few Lanczos steps tell about the spectrum of a graph of N nodes.

    Attributes:
        low, high: bounds of the spectrum, safe in practice: Ritz values and their residuals.
        norm: ‖κ‖, the largest magnitude of a Ritz value: not overestimated.
        nodes, masses: ``[·]`` float64, a quadrature of the spectral density, descending; masses
            add up to N.
    """

    low: float
    high: float
    norm: float
    nodes: Tensor
    masses: Tensor

    def above(self, count: int) -> float:
        """A point that about ``count`` eigenvalues lie above; well below the upper end."""
        place = int((self.masses.cumsum(0) < count).sum())
        point = self.nodes[min(place, len(self.nodes) - 1)].item()
        return min(point, self.low + 0.95 * (self.high - self.low))


def estimate_spectrum(
    graph: CSRGraph, dtype: torch.dtype, generator: torch.Generator
) -> SpectrumEstimate:
    """Lanczos from several random vectors side by side: one product a step for all of them."""
    q = _random(graph, min(_PROBES, graph.num_nodes), dtype, generator)
    q /= q.norm(dim=0)
    before, beta = torch.zeros_like(q), torch.zeros_like(q[0])
    diagonal, off = [], []
    for _ in range(min(_LANCZOS_STEPS, graph.num_nodes)):
        w = spmm(graph, q) - beta * before
        alpha = (w * q).sum(0)
        w -= alpha * q
        beta = w.norm(dim=0)
        diagonal.append(alpha)
        off.append(beta)
        before, q = q, w / beta.clamp_min(torch.finfo(dtype).tiny)
    alphas, betas = (torch.stack(rows, 1).double().cpu() for rows in (diagonal, off))
    inner = betas[:, :-1]
    ritz, s = torch.linalg.eigh(
        torch.diag_embed(alphas) + torch.diag_embed(inner, 1) + torch.diag_embed(inner, -1)
    )
    error = betas[:, -1:] * s[:, -1].abs()
    nodes, order = ritz.flatten().sort(descending=True)
    masses = s[:, 0].square().flatten()[order] * (graph.num_nodes / len(ritz))
    low, high = (ritz - error).min().item(), (ritz + error).max().item()
    return SpectrumEstimate(low, high, ritz.abs().max().item(), nodes, masses)


@dataclass
class _Ritz:
    """The block, θ descending, residual norms; the last two float64 on the CPU."""

    vectors: Tensor
    values: Tensor
    residuals: Tensor


def leading_by_filter(
    graph: CSRGraph,
    count: int,
    *,
    tol: float,
    dtype: torch.dtype,
    seed: int,
    max_rounds: int,
    on_round: Callable[[float], object] = lambda residual: None,
) -> tuple[Tensor, Tensor, Tensor, float]:
    """The iteration behind :func:`nefkern.spectral.eigenpairs.leading_eigenpairs`.

    It runs on the graph's device.

    Args:
        graph: symmetric, finite, not zero, of moderate scale; N nodes.
        count: m, below N.
        tol: residual norms to reach, relative to ‖κ‖.
        dtype: float32 or float64, of the vectors.
        seed: of the random block.
        max_rounds: filters at most.
        on_round: called after each with the largest residual, relative to ‖κ‖.

    Returns:
        θ ``[m]``, V ``[N, m]``, residual norms ``[m]``, and the estimate of ‖κ‖; θ and residuals in
        float64 on the CPU.
    """
    with _exact_products(graph.device):
        generator = torch.Generator().manual_seed(seed)
        spectrum = estimate_spectrum(graph, dtype, generator)
        width = min(graph.num_nodes, count + max(16, count // 3))
        cut, low = spectrum.above(width), spectrum.low
        goal = tol * spectrum.norm
        start = _random(graph, width, dtype, generator)
        ritz = _Ritz(start, torch.full((width,), spectrum.high), torch.full((width,), math.inf))
        for number in range(1, max_rounds + 1):
            block = _Filter(graph, low, cut, spectrum.norm).apply(ritz, count, goal)
            ritz = _rayleigh_ritz(graph, _orthonormalized(block))
            worst = ritz.residuals[:count].max().item()
            log.debug("round %d: residuals up to %.1e", number, worst)
            on_round(worst / spectrum.norm)
            if bool((ritz.residuals[:count] <= goal).all()):
                break
            low = min(low, (ritz.values - ritz.residuals).min().item())
            cut = _next_cut(ritz, count, cut, spectrum.norm)
    vectors = ritz.vectors[:, :count].contiguous()
    return ritz.values[:count], vectors, ritz.residuals[:count], spectrum.norm


def _next_cut(ritz: _Ritz, count: int, cut: float, norm: float) -> float:
    """The smallest Ritz value, but for columns that the first filters lost, which are far below.

    Of an eigenvalue with more copies than the block has columns that is one more copy, and a filter
    would have nothing to part: then a point between it and whatever the residuals consist of.
    """
    values, residual = ritz.values, ritz.residuals[:count].median().item()
    guard, last = values[(count + len(values)) // 2].item(), values[count - 1].item()
    cut = max(values[-1].item(), min(cut, guard))
    return cut if last - cut > residual else last - math.sqrt(residual * norm)


@dataclass(frozen=True)
class _Filter:
    """Scaled Chebyshev polynomials of κ that damp [low, cut]."""

    graph: CSRGraph
    low: float
    cut: float
    norm: float

    @property
    def centre(self) -> float:
        return (self.cut + self.low) / 2

    @property
    def half_width(self) -> float:
        return max((self.cut - self.low) / 2, 1e-3 * self.norm)

    def apply(self, ritz: _Ritz, count: int, goal: float) -> Tensor:
        """The block, overwritten, with every column filtered as far as it needs, in panels of like
        degrees.

        Leading columns that have converged stay as they are (and in the basis).
        """
        block, width = ritz.vectors, ritz.vectors.shape[1]
        degrees = self._degrees(ritz, count, goal)
        converged = int((ritz.residuals[:count] <= goal).long().cumprod(0).sum())
        panel = _PANEL.get(block.device.type, width)
        for begin in range(converged, width, panel):
            columns = slice(begin, min(begin + panel, width))
            top = ritz.values[begin].item()
            degree = int(degrees[columns].max())
            block[:, columns] = self._polynomial(block[:, columns].contiguous(), degree, top)
        return block

    def _degrees(self, ritz: _Ritz, count: int, goal: float) -> Tensor:
        """What takes each residual below the goal; guard columns go with the last wanted ones.

        A component along an eigenvector at θ grows by exp(rate(θ)) a degree. No more than rounding
        can bear: of what leading directions have not outgrown, 0.4 of the digits remain. Columns
        hold the less of a direction, the better a column before them has found it.
        """
        eps = torch.finfo(ritz.vectors.dtype).eps
        t = ((ritz.values.double() - self.centre) / self.half_width).clamp_min(1 + 1e-9)
        rate = torch.acosh(t)
        relative = (ritz.residuals / self.norm).clamp(10 * eps, 1)
        headroom = ((-0.6 * math.log(eps) - relative.log()) / rate).min().item()
        need = (relative * self.norm / (_SAFETY * goal)).clamp_min(1).log() / rate
        need[count:] = need[:count].max()
        return need.ceil().clamp(2, max(2, min(_MOST_DEGREES, headroom)))

    def _polynomial(self, x: Tensor, degree: int, top: float) -> Tensor:
        """p(κ) x, |p| about 1 at ``top``: no overflow whatever the degree."""
        centre, half = self.centre, self.half_width
        first = scale = half / max(top - centre, half)
        before, x = x, (spmm(self.graph, x) - centre * x).mul_(scale / half)
        for _ in range(degree - 1):
            following = 1 / (2 / first - scale)
            y = spmm(self.graph, x).sub_(x, alpha=centre).mul_(2 * following / half)
            before, x = x, y.sub_(before, alpha=scale * following)
            scale = following
        return x


def _rayleigh_ritz(graph: CSRGraph, basis: Tensor) -> _Ritz:
    """Ritz pairs of an orthonormal basis, which is overwritten."""
    image = spmm(graph, basis)
    values, rotation = torch.linalg.eigh(_symmetric(basis.T @ image).double())
    values, rotation = values.flip(0), rotation.flip(1).to(basis.dtype)
    _rotate(basis, rotation)
    squares = torch.zeros_like(values)
    scale = values.to(basis.dtype)
    for rows, image_rows in zip(basis.split(_BLOCK_ROWS), image.split(_BLOCK_ROWS), strict=True):
        squares += (image_rows @ rotation).sub_(rows * scale).square_().sum(0)
    return _Ritz(basis, values.cpu(), squares.sqrt().cpu())


def _orthonormalized(block: Tensor) -> Tensor:
    """Q of the block, which is overwritten: by Cholesky of its Gram matrix, again until that was
    the identity before; by Householder reflections where Cholesky fails."""
    identity = torch.eye(block.shape[1], dtype=torch.float64, device=block.device)
    for _ in range(4):
        gram = _gram(block)
        scale = gram.diagonal().clamp_min(torch.finfo(torch.float64).tiny).rsqrt()
        gram = scale[:, None] * gram * scale
        factor, failed = torch.linalg.cholesky_ex(gram)
        if failed:
            break
        inverse = torch.linalg.solve_triangular(factor.T, identity, upper=True)
        _rotate(block, (scale[:, None] * inverse).to(block.dtype))
        if (gram - identity).abs().max() < 1e-2:
            return block
    return torch.linalg.qr(block)[0]


def _rotate(block: Tensor, matrix: Tensor) -> None:
    """block ← block · matrix, square, in place."""
    for rows in block.split(_BLOCK_ROWS):
        rows.copy_(rows @ matrix)


def _gram(block: Tensor) -> Tensor:
    """XᵀX in float64, in blocks of rows of a fixed size."""
    total = torch.zeros((block.shape[1],) * 2, dtype=torch.float64, device=block.device)
    for rows in block.split(_BLOCK_ROWS):
        wide = rows.double()
        total.addmm_(wide.T, wide)
    return _symmetric(total)


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2


def _random(graph: CSRGraph, width: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """The same numbers on every device: the generator is the CPU's."""
    return torch.randn(graph.num_nodes, width, generator=generator).to(graph.device, dtype)


@contextlib.contextmanager
def _exact_products(device: torch.device) -> Iterator[None]:
    """Matrix products in the precision of their operands, whatever the caller has switched on."""
    with exact_products(), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield
