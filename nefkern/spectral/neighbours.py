"""Exact nearest neighbours in more rows than one memory holds: on a disk, or in several processes.

Both come down to :func:`nefkern.ops.knn` with a part of the rows as database at a time, and merged
lists. On the CPU a pair's value depends on its two rows alone, so the result is that of one call
with all rows, to the last bit; elsewhere to the rounding of values (see there).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nefkern.ops import checks, knn

BLOCK_ROWS = 1 << 16


def knn_blocks(
    queries: Tensor,
    blocks: object,
    k: int,
    *,
    metric: str = "cosine",
    check_finite: bool = False,
    block_rows: int = BLOCK_ROWS,
) -> tuple[Tensor, Tensor]:
    """The k nearest rows of a database that need not fit in memory, for every query.

    One block of it is held at a time, beside the queries and their O(N k) lists. The result is that
    of ``knn(queries, k, database=...)`` with all blocks one after the other; see
    :func:`nefkern.ops.knn` for values, order and missing neighbours.

    Args:
        queries: [N, C], float16, bfloat16, float32 or float64, on any device.
        blocks: the database: a tensor or array [M, C] that is cut into blocks by slicing
            (``numpy.memmap``, ``numpy.load(..., mmap_mode="r")``, an HDF5 data set), or any
            iterable of tensors or arrays [·, C]. Of the dtype of ``queries``, or of one that it
            holds exactly; moved to its device.
        k: neighbours a query, at least 1; it may exceed the number of rows.
        metric: "cosine", "euclidean" or "inner_product".
        check_finite: raise where queries or a block hold NaN or inf.
        block_rows: rows of a block that ``blocks`` is cut into; an iterable keeps its own.

    Returns:
        values [N, k], and indices [N, k] of rows counted through all blocks: int32, or int64 for a
        database of 2^31 rows or more.

    Raises:
        TypeError, ValueError: as :func:`nefkern.ops.knn`; a block is named by its number.
    """
    block_rows = checks.integer("block_rows", block_rows, 1)
    checks.tensor("queries", queries)
    checks.shape("queries", queries, "N", "C")
    checks.dtype("queries", queries, checks.FLOATING)
    best = _Lists(*knn(queries, k, database=queries[:0], metric=metric))
    if check_finite:
        checks.finite("queries", queries)
    first = number = 0
    for block in _cut(blocks, block_rows):
        rows = _block(f"blocks[{number}]", block, queries)
        if check_finite:
            checks.finite(f"blocks[{number}]", rows)
        found = _Lists(*knn(queries, k, database=rows, metric=metric))
        best = _merged(best, found.from_row(first), metric)
        first, number = first + len(rows), number + 1
        del block, rows  # before the next is made
    return best.of_rows(first)


def knn_distributed(
    features: Tensor,
    k: int,
    *,
    database: Tensor | None = None,
    metric: str = "cosine",
    include_self: bool = False,
    check_finite: bool = False,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """The k nearest of all processes' rows, for every row of this one.

    Every process calls it with its own rows, any number of them. They travel round a ring, each
    part from process to process while the one before it is searched; a process holds its own rows
    and two parts. The result is what :func:`nefkern.ops.knn` finds for these rows among those of
    all processes, one after the other. Without ``torch.distributed`` there is one process.

    Args:
        features: [N, C], this process's rows; C and dtype are the same everywhere.
        k: neighbours a row.
        database: [M, C], this process's part of the candidates; None: ``features``.
        metric: "cosine", "euclidean" or "inner_product".
        include_self: whether a row is a candidate for itself; False with a database.
        check_finite: raise when rows of any process hold NaN or inf.
        group: the processes; None: all.

    Returns:
        values [N, k], and indices [N, k] counted through the rows of all processes in the order of
        their ranks: int32, or int64 where they are 2^31 or more.

    Raises:
        TypeError, ValueError: as :func:`nefkern.ops.knn`, in the process whose argument it is.
        RuntimeError: in the others, none of which waits in vain; or where the processes' arguments
            differ.
    """
    single = not (dist.is_available() and dist.is_initialized())
    if single or dist.get_world_size(group) == 1:
        return knn(
            features, k, database=database, metric=metric, include_self=include_self,
            check_finite=check_finite,
        )  # fmt: skip
    part = features if database is None else database
    counts = _agreed_counts(features, k, database, metric, include_self, check_finite, group)
    firsts = [0, *itertools.accumulate(counts)]
    rank, features = dist.get_rank(group), features.detach()
    below = above = (
        None  # of the parts up to this process's own, and after it; each comes downwards
    )
    for owner, rows in _travelling(part.detach().contiguous(), counts, group):
        own = owner == rank and database is None
        options = {"include_self": include_self} if own else {"database": rows}
        found = _Lists(*knn(features, k, metric=metric, **options)).from_row(firsts[owner])
        if owner <= rank:
            below = found if below is None else _merged(found, below, metric)
        else:
            above = found if above is None else _merged(found, above, metric)
    best = below if above is None else _merged(below, above, metric)
    return best.of_rows(firsts[-1])


# ---- lists of neighbours ----


@dataclasses.dataclass(frozen=True)
class _Lists:
    """values and indices [N, k], best first; -1 where there is no neighbour."""

    values: Tensor
    indices: Tensor

    def from_row(self, first: int) -> _Lists:
        """The same with rows counted from ``first``, as int64."""
        indices = self.indices.long()
        return _Lists(self.values, torch.where(indices < 0, indices, indices + first))

    def of_rows(self, count: int) -> tuple[Tensor, Tensor]:
        return self.values, self.indices.to(torch.int32 if count < 2**31 else torch.int64)


def _merged(lower: _Lists, higher: _Lists, metric: str) -> _Lists:
    """The k best of both; all indices of ``lower`` are below those of ``higher``, so that a stable
    sort leaves ties in their order."""
    k = lower.values.shape[1]
    values = torch.cat([lower.values, higher.values], 1)
    indices = torch.cat([lower.indices.long(), higher.indices], 1)
    cost = values if metric == "euclidean" else -values
    # NaN sorts last: no neighbour comes after one that is infinitely far.
    order = cost.masked_fill(indices < 0, torch.nan).sort(dim=1, stable=True).indices[:, :k]
    return _Lists(values.gather(1, order), indices.gather(1, order))


# ---- blocks ----


def _cut(blocks: object, block_rows: int) -> Iterator[object]:
    if getattr(blocks, "ndim", None) == 2:
        for first in range(0, blocks.shape[0], block_rows):
            yield blocks[first : first + block_rows]
        return
    if isinstance(blocks, Tensor | np.ndarray):
        raise ValueError(f"blocks: expected shape [M, C], got {list(blocks.shape)}")
    if not isinstance(blocks, Iterable) or isinstance(blocks, str | bytes):
        raise TypeError(
            "blocks: expected an array or tensor [M, C], or an iterable of them, "
            f"got {type(blocks).__name__}"
        )
    yield from blocks


def _block(name: str, block: object, queries: Tensor) -> Tensor:
    """A block as a tensor beside the queries; what is on a disk is read here."""
    if not isinstance(block, Tensor | np.ndarray):
        raise TypeError(f"{name}: expected a tensor or an array, got {type(block).__name__}")
    if isinstance(block, np.ndarray):
        block = torch.from_numpy(np.array(block))  # a copy: a map may be read-only
    checks.shape(name, block, "M", queries.shape[1])
    checks.dtype(name, block, checks.FLOATING)
    if torch.promote_types(block.dtype, queries.dtype) != queries.dtype:
        want, got = (str(t.dtype).removeprefix("torch.") for t in (queries, block))
        raise TypeError(f"{name}: expected {want}, as the queries, or what it holds, got {got}")
    return block.to(queries.device, queries.dtype)


# ---- processes ----


def _agreed_counts(
    features: Tensor, k: int, database: Tensor | None, metric: str, include_self: bool,
    check_finite: bool, group: dist.ProcessGroup | None,
) -> list[int]:  # fmt: skip
    """Rows of every process's part, once all have found their arguments good and alike."""
    error, mine = None, None
    try:
        few = None if database is None else database[:0]
        knn(features[:0], k, database=few, metric=metric, include_self=include_self)
        if check_finite:
            checks.finite("features", features)
            if database is not None:
                checks.finite("database", database)
        kind = str(features.dtype).removeprefix("torch.")
        own = database is None
        mine = (features.shape[1], kind, int(k), metric, include_self, own)
    except Exception as caught:
        error = caught
    part = features if database is None else database
    told = f"{type(error).__name__}: {error}" if error else None
    all_told: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(all_told, (told, mine, None if error else len(part)), group)
    if error:
        raise error
    for rank, (its, theirs, _) in enumerate(all_told):
        if its:
            raise RuntimeError(f"knn_distributed: process {rank} has failed: {its}")
        if theirs != all_told[0][1]:
            raise RuntimeError(
                "knn_distributed: expected the same columns, dtype, k, metric, include_self and "
                f"absence of a database in all processes, got {all_told[0][1]} in process 0 and "
                f"{theirs} in process {rank}"
            )
    return [count for _, _, count in all_told]


def _travelling(
    part: Tensor, counts: list[int], group: dist.ProcessGroup | None
) -> Iterator[tuple[int, Tensor]]:
    """Every process's part and whose it is, from this one's own downwards; the next is on its way
    while one is worked on."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    for step in range(ranks):
        owner, coming = (rank - step) % ranks, (rank - step - 1) % ranks
        waiting, arriving = [], part[:0]
        if step + 1 < ranks:
            arriving = part.new_empty((counts[coming], part.shape[1]))
            waiting = _pass_on(part, arriving, group)
        yield owner, part
        for work in waiting:
            work.wait()
        part = arriving


def _pass_on(part: Tensor, arriving: Tensor, group: dist.ProcessGroup | None) -> list[dist.Work]:
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    moves = (dist.isend, part, (rank + 1) % ranks), (dist.irecv, arriving, (rank - 1) % ranks)
    messages = [
        dist.P2POp(move, rows, peer if group is None else dist.get_global_rank(group, peer), group)
        for move, rows, peer in moves
        if rows.numel() > 0
    ]
    return dist.batch_isend_irecv(messages) if messages else []
