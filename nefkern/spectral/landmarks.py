"""Fewer rows to extend eigenvectors from.

Nyström's extension sums over a new row's neighbours among all N old ones. A random subset of them,
the landmarks, is a sample of that sum: its value at a fraction of the memory and of the search.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from nefkern.ops import checks
from nefkern.spectral.embedding import Embedding

#: Neighbours among the landmarks at least: fewer are noisy, and more reach too far.
_LEAST_NEIGHBOURS = 8


def chosen_rows(total: int, count: int, seed: int) -> Tensor:
    """A seed's ``count`` landmarks among ``total`` rows: int64 ``[count]``, ascending."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(total, generator=generator)[:count].sort().values


def landmarks(embedding: Embedding, count: int, seed: int = 0) -> Embedding:
    """The same eigenpairs, to be extended from ``count`` random rows alone.

    Of a new row's k neighbours about k n / N are landmarks; so many are taken, but at least 8,
    which then reach farther. Degrees are scaled by as much as lists are shorter, so that values
    keep their size.

    Args:
        embedding: with its N rows.
        count: n, at least 1; all of them where there are no more.
        seed: of the choice.

    Raises:
        TypeError, ValueError: no rows were kept; a count that is no int, or below 1.
    """
    if embedding.rows is None:
        raise ValueError("embedding: expected one with rows, got rows=None")
    count = checks.integer("count", count, 1)
    total = len(embedding.rows)
    if count >= total:
        return embedding
    chosen = chosen_rows(total, count, seed).to(embedding.rows.device)
    k = min(embedding.k, count, max(_LEAST_NEIGHBOURS, round(embedding.k * count / total)))
    return dataclasses.replace(
        embedding,
        vectors=embedding.vectors[chosen],
        degrees=embedding.degrees[chosen] * (k / embedding.k),
        rows=embedding.rows[chosen],
        widths=None if embedding.widths is None else embedding.widths[chosen],
        k=k,
    )
