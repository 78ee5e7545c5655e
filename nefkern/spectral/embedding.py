"""Spectral embedding of rows: their neighbour graph, its leading eigenvectors, and new rows.

From rows to neighbour lists, from distances to similarities, to κ = D^(-1/2) A D^(-1/2) (+ α P, a
second graph over the same rows), to its leading eigenpairs. What is kept carries these to new rows
by Nyström's extension (:mod:`nefkern.spectral.nystrom`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nefkern.ops import CSRGraph, add, checks, knn, normalized_adjacency
from nefkern.reference.csr import row_of_entry, sums_of
from nefkern.runtime.states import FLOATS, INTEGERS, check_state
from nefkern.spectral.eigenpairs import EigenPairs, leading_eigenpairs
from nefkern.spectral.neighbours import knn_blocks
from nefkern.spectral.nystrom import cross_weights, extend
from nefkern.spectral.nystrom import degrees as degrees_of

#: How similar two neighbours are, and the metric that finds neighbours.
AFFINITIES = {"cosine": "cosine", "connectivity": "euclidean", "gaussian": "euclidean"}
#: Rows that are kept for extension.
ROW_DTYPES = (torch.float32, torch.float16)
#: A pair with an eigenvalue below α times this is not extended: (λ − αP)^(-1) would amplify noise.
_LEAST_RATIO = 1.01
_GATHERED = 1 << 24  # numbers gathered at once


class NeighbourLists(NamedTuple):
    """Each row's neighbours and how similar they are.

    Attributes:
        indices: int32 ``[n, k]``, -1 where there are fewer.
        similarities: float32 ``[n, k]``, at least 0; 0 where there is no neighbour.
        widths: float32 ``[n]``, σ of the Gaussian: the distance to the last neighbour; None for
            other affinities.
    """

    indices: Tensor
    similarities: Tensor
    widths: Tensor | None


def neighbour_lists(rows: Tensor, k: int, affinity: str) -> NeighbourLists:
    """The k nearest others of every row.

    "cosine": cosine similarity, negative ones count as 0. "connectivity": 1 for the nearest by
    Euclidean distance. "gaussian": exp(−d²/(σ_i σ_j)) of the distance d, where σ is a row's
    distance to its k-th neighbour (Zelnik-Manor, Perona, "Self-tuning spectral clustering", NIPS
    2004; they take the 7th). None of them depends on the unit of the rows.

    Args:
        rows: ``[N, C]``, floating point, finite.
        k: at least 1; all others where there are fewer.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    checks.choice("affinity", affinity, tuple(AFFINITIES))
    values, indices = knn(rows, k, metric=AFFINITIES[affinity], check_finite=True)
    widths = _widths(values) if affinity == "gaussian" else None
    return NeighbourLists(indices, _similarities(affinity, values, indices, widths, widths), widths)


def adjacency(lists: NeighbourLists) -> CSRGraph:
    """D^(-1/2) A D^(-1/2) of A = (A + Aᵀ)/2, over the rows that the lists belong to."""
    return normalized_adjacency(lists.indices, lists.similarities, num_nodes=len(lists.indices))


#: Of :meth:`Embedding.state`.
_STATE = {
    "values": (FLOATS, "m"),
    "vectors": (FLOATS, "N m"),
    "residuals": (FLOATS, "m"),
    "degrees": (FLOATS, "N"),
    "[rows]": (FLOATS, "N C"),
    "[widths]": (FLOATS, "N"),
    "k": (INTEGERS, ""),
    "affinity": (INTEGERS, ""),
    "alpha": (FLOATS, ""),
}


@dataclass(frozen=True, eq=False)
class Embedding:
    """Leading eigenpairs of the graph of N rows, and what their extension needs.

    Attributes:
        values: θ, float64 ``[m]``, descending, on the CPU.
        vectors: V, ``[N, m]``, orthonormal columns.
        residuals: float64 ``[m]``, |κv − θv|, see :class:`nefkern.spectral.eigenpairs.EigenPairs`.
        degrees: float64 ``[N]``, the diagonal of D.
        rows: ``[N, C]``, float32 or float16; None: only lists can be extended.
        widths: float32 ``[N]``, σ; None unless the affinity is "gaussian".
        k: neighbours of a row.
        affinity: see :func:`neighbour_lists`.
        alpha: weight of the second graph.

    Raises:
        TypeError, ValueError: an attribute is not as described.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    degrees: Tensor
    rows: Tensor | None = None
    widths: Tensor | None = None
    k: int = 1
    affinity: str = "cosine"
    alpha: float = 0.0

    def __post_init__(self) -> None:
        checks.shape("vectors", self.vectors, "N", "m")
        n, m = self.vectors.shape
        checks.shape("values", self.values, m)
        checks.shape("residuals", self.residuals, m)
        checks.shape("degrees", self.degrees, n)
        checks.choice("affinity", self.affinity, tuple(AFFINITIES))
        if self.rows is not None:
            checks.shape("rows", self.rows, n, "C")
            checks.dtype("rows", self.rows, ROW_DTYPES)
        if self.widths is not None:
            checks.shape("widths", self.widths, n)
        if (self.widths is not None) != (self.affinity == "gaussian"):
            raise ValueError(f"widths: expected with affinity 'gaussian', got {self.affinity!r}")

    @functools.cached_property
    def size(self) -> Tensor:
        """Root mean square of the values of V, a number on its device."""
        return self.vectors.square().mean().sqrt().clamp_min(1e-30)

    def coordinates(self) -> Tensor:
        """D^(-1/2) V, ``[N, m]``: eigenvectors of the random walk D^(-1) A, constant on a component
        of the graph where θ = 1; 0 at rows without edges."""
        return _scaled(self.vectors, self.degrees)

    def neighbours(self, new: Tensor) -> NeighbourLists:
        """The nearest old rows of new ones ``[n, C]``: k of each."""
        if self.rows is None:
            raise ValueError("rows: none were kept, so that only lists can be extended")
        checks.tensor("new", new)
        checks.shape("new", new, "n", self.rows.shape[1])
        checks.dtype("new", new, checks.FLOATING)
        checks.device("new", new, self.rows, "rows")
        new = new.float()
        checks.finite("new", new)  # as float32: a row beyond it would have no neighbours
        k, metric = min(self.k, len(self.rows)), AFFINITIES[self.affinity]
        values, indices = knn_blocks(new, self.rows, k, metric=metric)
        widths = _widths(values) if self.affinity == "gaussian" else None
        similarities = _similarities(self.affinity, values, indices, widths, self.widths)
        return NeighbourLists(indices, similarities, widths)

    def extend(self, new: Tensor | NeighbourLists, pixel: CSRGraph | None = None) -> Tensor:
        """Values of the eigenvectors at new rows, by Nyström's extension, ``[n, m]``.

        Columns whose eigenvalue is not positive, or not above α with a second graph, are 0: such
        vectors have no smooth continuation.

        Args:
            new: ``[n, C]`` rows, on the device of the old ones; or lists of their neighbours.
            pixel: the second graph among the new rows, normalised and symmetric; its weight is α.

        Raises:
            TypeError, ValueError: an argument is not as described; no rows were kept.
        """
        lists = new if isinstance(new, NeighbourLists) else self.neighbours(new)
        weights = cross_weights(lists.indices, lists.similarities, self.degrees)
        alpha = 0.0 if pixel is None else self.alpha
        count = self.extended(alpha)
        found = self.vectors.new_zeros(
            len(weights),
            len(self.values),
            dtype=torch.promote_types(self.vectors.dtype, torch.float32),
        )
        found[:, :count] = extend(
            self.values[:count],
            self.vectors[:, :count],
            (lists.indices, weights),
            pixel=pixel,
            alpha=alpha,
        )
        return found

    def extended(self, alpha: float) -> int:
        """How many of the columns, the first, :meth:`extend` does not leave at 0."""
        least = max(_LEAST_RATIO * alpha, 1e-6 * float(self.values.abs().amax()))
        return int((self.values > least).sum())  # they descend

    def same_rows(self, new: Tensor, lists: NeighbourLists) -> Tensor:
        """Which old row each new one equals, of those in its list; int64 ``[n]``, -1 for none."""
        new, found = new.to(self.rows.dtype), []
        step = max(1, _GATHERED // max(1, lists.indices.shape[1] * new.shape[1]))
        for x, near in zip(new.split(step), lists.indices.long().split(step), strict=True):
            equal = (self.rows[near.clamp_min(0)] == x[:, None]).all(2) & (near >= 0)
            place = equal.int().argmax(1, keepdim=True)
            found.append(near.gather(1, place)[:, 0].masked_fill(~equal.any(1), -1))
        return torch.cat(found)

    def extend_coordinates(self, new: Tensor | NeighbourLists) -> Tensor:
        """:meth:`coordinates` of new rows, ``[n, m]``."""
        lists = new if isinstance(new, NeighbourLists) else self.neighbours(new)
        return _scaled(self.extend(lists), lists.similarities.double().sum(1))

    def leading(self, count: int) -> Embedding:
        """The same with the first ``count`` eigenpairs only."""
        return dataclasses.replace(
            self,
            values=self.values[:count],
            vectors=self.vectors[:, :count].contiguous(),
            residuals=self.residuals[:count],
        )

    def to(self, device: torch.device | str) -> Embedding:
        """The same on a device; values and residuals stay on the CPU."""
        names = ("vectors", "degrees", "rows", "widths")
        tensors = {name: getattr(self, name) for name in names}
        moved = {name: None if one is None else one.to(device) for name, one in tensors.items()}
        return dataclasses.replace(self, **moved)

    def state(self) -> dict[str, Tensor]:
        """All of it as tensors on the CPU, as safetensors stores them; see :meth:`from_state`."""
        state = {
            field.name: getattr(self, field.name).cpu().contiguous()
            for field in dataclasses.fields(self)
            if isinstance(getattr(self, field.name), Tensor)
        }
        return state | {
            "k": torch.tensor(self.k),
            "affinity": torch.tensor(list(AFFINITIES).index(self.affinity)),
            "alpha": torch.tensor(self.alpha, dtype=torch.float64),
        }

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Embedding:
        """From what :meth:`state` gave.

        Raises:
            ValueError: a tensor is missing or of another shape.
        """
        sizes = check_state(state, _STATE)
        if not 1 <= int(state["k"]) <= sizes["N"]:
            raise ValueError(f"k: expected 1 to {sizes['N']}, got {int(state['k'])}")
        fields = {field.name: field for field in dataclasses.fields(cls)}
        values = {name: state[name] for name in fields if name in state}
        index = int(values["affinity"])
        if not 0 <= index < len(AFFINITIES):
            raise ValueError(f"affinity: expected 0 to {len(AFFINITIES) - 1}, got {index}")
        return cls(
            **values
            | {
                "k": int(values["k"]),
                "alpha": float(values["alpha"]),
                "affinity": list(AFFINITIES)[index],
            }
        )


@torch.no_grad()
def embed(
    rows: Tensor,
    count: int,
    *,
    k: int,
    affinity: str = "cosine",
    second: CSRGraph | None = None,
    alpha: float = 0.0,
    tol: float = 1e-3,
    seed: int = 0,
    keep: torch.dtype = torch.float32,
) -> Embedding:
    """Rows to graph to leading eigenpairs.

    Args:
        rows: ``[N, C]``, floating point, finite, on any device.
        count: m, from 1 to N.
        k: neighbours of a row, itself excluded; all others where there are fewer.
        affinity: see :func:`neighbour_lists`.
        second: P, a normalised symmetric graph over the same rows; None: no such term.
        alpha: its weight.
        tol, seed: see :func:`nefkern.spectral.eigenpairs.leading_eigenpairs`.
        keep: float32, or float16 for half the memory: how rows are kept for extension.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    if keep not in ROW_DTYPES:
        raise ValueError(f"keep: expected float32 or float16, got {keep}")
    lists = neighbour_lists(rows, k, affinity)
    kept = rows.to(keep)
    if not bool(kept.isfinite().all()):
        raise ValueError(
            f"keep: expected rows within {torch.finfo(keep).max:g}, what {keep} holds, "
            f"got {rows.abs().max().item():g}"
        )
    found = embed_lists(lists, count, second=second, alpha=alpha, tol=tol, seed=seed)
    k = min(int(k), max(1, len(rows) - 1))  # as many as the lists hold
    return dataclasses.replace(found, rows=kept, widths=lists.widths, k=k, affinity=affinity)


@torch.no_grad()
def embed_lists(
    lists: NeighbourLists,
    count: int,
    *,
    second: CSRGraph | None = None,
    alpha: float = 0.0,
    tol: float = 1e-3,
    seed: int = 0,
) -> Embedding:
    """Neighbour lists of N rows to leading eigenpairs; arguments as those of :func:`embed`."""
    graph = adjacency(lists)
    if second is not None:
        graph = add(graph, second, alpha)
    degree = degrees_of(lists.indices, lists.similarities, len(lists.indices))
    pairs = leading_eigenpairs(graph, count, tol=tol, seed=seed)
    alpha = 0.0 if second is None else float(alpha)
    return dataclasses.replace(_embedding(pairs, degree), alpha=alpha)


@torch.no_grad()
def embed_adjacency(graph: CSRGraph, count: int, *, tol: float = 1e-3, seed: int = 0) -> Embedding:
    """A symmetric graph's A itself, not normalised, to leading eigenpairs of D^(-1/2) A D^(-1/2).

    Args:
        graph: A, values of at least 0; its diagonal is left out, as in the normalised Laplacian.
        count, tol, seed: as for :func:`embed`.
    """
    if bool((graph.values < 0).any()):
        raise ValueError("graph: expected similarities of at least 0, got negative ones")
    rows, columns = row_of_entry(graph.row_offsets, graph.nnz), graph.columns.long()
    values = graph.values.double().masked_fill(rows == columns, 0)
    degree = sums_of(values, rows, graph.num_nodes)
    scale = _inverse_root(degree)
    values = (values * (scale[rows] * scale[columns])).float()
    pairs = leading_eigenpairs(dataclasses.replace(graph, values=values), count, tol=tol, seed=seed)
    return _embedding(pairs, degree)


def _embedding(pairs: EigenPairs, degree: Tensor) -> Embedding:
    # Rows of V are what is gathered from.
    return Embedding(pairs.values, pairs.vectors.contiguous(), pairs.residuals, degree)


def _widths(distances: Tensor) -> Tensor:
    """σ: the distance to the last neighbour that there is, ``[n]``."""
    return distances.masked_fill(distances == math.inf, 0).amax(1)


def _similarities(
    affinity: str,
    values: Tensor,
    indices: Tensor,
    widths: Tensor | None,
    other_widths: Tensor | None,
) -> Tensor:
    """From knn's values ``[n, k]`` to similarities; ``other_widths`` are those of the neighbours'
    set."""
    missing = indices < 0
    if affinity == "cosine":
        found = values.clamp(min=0)
    elif affinity == "connectivity":
        found = torch.ones_like(values)
    else:
        # d²/(σ_i σ_j) as a product of ratios: squares of small or large distances leave the range.
        other = other_widths[indices.long().clamp_min(0)]
        exponent = (values / widths[:, None]) * (values / other)
        # Where a width is 0 only duplicates are near: 1 for them, 0 for all others.
        found = torch.where(values > 0, (-exponent).exp(), 1)
    return found.masked_fill_(missing, 0).float()


def _scaled(vectors: Tensor, degrees: Tensor) -> Tensor:
    return vectors * _inverse_root(degrees)[:, None].to(vectors.dtype)


def _inverse_root(degrees: Tensor) -> Tensor:
    return torch.where(degrees > 0, degrees, 1).rsqrt().masked_fill(degrees <= 0, 0)
