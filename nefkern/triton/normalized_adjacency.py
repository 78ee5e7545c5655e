"""Triton kernels of ``normalized_adjacency``: one sort of the edges, then row by row.

Every listed edge (i, j) is written twice, with the keys i N + j and j N + i. Once the keys are
sorted, by torch's radix sort, all that decides about entry (i, j) stands side by side and the
entries of row i are in order. What follows reads each row once to count its entries, and once more
to merge the edges of an entry and to sum the degree.

An entry is a sum of two terms or a maximum, which no order of the edges changes, and one program
sums a row's degree, in double: no two runs differ, and the matrix equals its transpose bit for bit.

Bytes at the paper's size (14,400 x 256 edges, 4.5 million entries), counted, not measured: keys 59
MB, the sort's four passes over 32-bit keys and 64-bit places 0.8 GB, count 30, merge 140, scale 54;
1.1 GB in all, where the lists and the graph alone are 66 MB. A sort of half as many keys is
possible (the lists are in order of their rows), for more passes of another kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nefkern.reference.normalized_adjacency import check_indices
from nefkern.triton.configs import Shipped, device_of, launch

# Edges that a program takes at a time. No autotuning: it would time kernels of microseconds, and
# could choose another order of a degree's sum on another day.
BLOCK = 512
MERGE_WARPS = 8  # 4 spill with Triton 3.6 on sm_90

# A NaN stays visible in a maximum.
NAN = tl.constexpr(tl.PropagateNan.ALL)
SMALLEST = tl.constexpr(2.0**-149)  # of float32's positive numbers

# Each has two keys, whose places must fit 32 bits; torch sorts no more at a time on a GPU either.
MAX_EDGES = 10**9


@triton.jit
def _weight(weights, e, there, clamp_min, HAS_WEIGHTS: tl.constexpr):
    """The clamped weights of edges ``e``. A NaN stays one."""
    if HAS_WEIGHTS:
        weight = tl.load(weights + e, mask=there, other=0.0)
        return tl.where(weight < clamp_min, clamp_min, weight)
    else:
        return tl.full(e.shape, 1.0, tl.float32)


@triton.jit
def _write_keys(
    indices, weights, keys, invalid, num_nodes, k, edges, clamp_min,
    HAS_WEIGHTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Both keys of each edge. Padding and weight 0 go to row N, behind all rows that are read."""
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = e < edges
    node = tl.load(indices + e, mask=there, other=-1)
    tl.store(invalid + tl.zeros_like(e), 1, mask=(node < -1) | (node >= num_nodes))
    weight = _weight(weights, e, there, clamp_min, HAS_WEIGHTS)
    kept = (node >= 0) & (node < num_nodes) & ~(weight <= 0)
    row = (e // k).to(keys.dtype.element_ty)
    node = node.to(keys.dtype.element_ty)
    nowhere = tl.zeros_like(row) + num_nodes
    nowhere *= num_nodes
    tl.store(keys + e, tl.where(kept, row * num_nodes + node, nowhere), mask=there)
    tl.store(keys + edges + e, tl.where(kept, node * num_nodes + row, nowhere), mask=there)


@triton.jit
def _range(offsets, row):
    """Where a row begins and ends."""
    return tl.load(offsets + row).to(tl.int32), tl.load(offsets + row + 1).to(tl.int32)


@triton.jit
def _leaders(keys, p, begin, end):
    """The keys at ``p``, and which of them are the first of their entry."""
    there = p < end
    key = tl.load(keys + p, mask=there, other=0)
    before = tl.load(keys + p - 1, mask=there & (p > begin), other=-1)
    return key, there & (key != before)


@triton.jit
def _count_entries(keys, starts, counts, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    begin, end = _range(starts, row)
    count = tl.zeros([BLOCK], tl.int32)
    for first in range(begin, end, BLOCK):
        count += _leaders(keys, first + tl.arange(0, BLOCK), begin, end)[1].to(tl.int32)
    tl.store(counts + row + 1, tl.sum(count))


@triton.jit
def _merge_edges(
    keys, order, starts, weights, unit, row_offsets, columns, values, scale, num_nodes, edges,
    clamp_min, HAS_WEIGHTS: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row ``program_id(0)`` of A + A^T or max(A, A^T), in ``unit``, and its d^(-1/2)."""
    row = tl.program_id(0).to(tl.int64)
    begin, end = _range(starts, row)
    place, _ = _range(row_offsets, row)
    degree = tl.zeros([], tl.float64)
    for first in range(begin, end, BLOCK):
        p = first + tl.arange(0, BLOCK)
        key, leads = _leaders(keys, p, begin, end)
        listed = tl.zeros([BLOCK], tl.float32)  # in the row's own list
        naming = tl.zeros([BLOCK], tl.float32)  # in the list of the column's node
        more = leads
        while tl.max(more.to(tl.int32)) > 0:  # twice, and again for each duplicate in a list
            e = tl.load(order + p, mask=more, other=0).to(tl.int32)
            own = e < edges
            weight = _weight(weights, tl.where(own, e, e - edges), more, clamp_min, HAS_WEIGHTS)
            if MEAN and HAS_WEIGHTS:
                least = tl.full([BLOCK], SMALLEST, tl.float32)  # none becomes 0
                weight = tl.maximum(weight * tl.load(unit), least, NAN)
            listed = tl.where(more & own, tl.maximum(listed, weight, NAN), listed)
            naming = tl.where(more & ~own, tl.maximum(naming, weight, NAN), naming)
            p += 1
            more = more & (p < end)
            more = more & (tl.load(keys + p, mask=more, other=-1) == key)
        a = listed + naming if MEAN else tl.maximum(listed, naming, NAN)
        at = place + tl.cumsum(leads.to(tl.int32)) - 1
        tl.store(columns + at, (key - row * num_nodes).to(tl.int32), mask=leads)
        tl.store(values + at, a, mask=leads)
        degree += tl.sum(tl.where(leads, a, 0.0).to(tl.float64))
        place += tl.sum(leads.to(tl.int32))
    if MEAN:
        degree *= 0.5
    degree = tl.where(degree == 0, 1.0, degree)  # of an empty row, whose scale is never read
    tl.store(scale + row, tl.rsqrt(degree).to(tl.float32))


@triton.jit
def _scale_entries(row_offsets, columns, values, scale, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """Row ``program_id(0)`` of the graph, from ``_merge_edges``'s."""
    row = tl.program_id(0).to(tl.int64)
    begin, end = _range(row_offsets, row)
    own = tl.load(scale + row).to(tl.float64)
    for first in range(begin, end, BLOCK):
        e = first + tl.arange(0, BLOCK)
        column = tl.load(columns + e, mask=e < end, other=0)
        value = tl.load(values + e, mask=e < end, other=0.0)
        # In double: the product of two scales has no place in float32 where weights are far from
        # 1. It is exact, and the same for the transposed entry.
        both = own * tl.load(scale + column, mask=e < end, other=1.0).to(tl.float64)
        a = value.to(tl.float64)
        if MEAN:
            a *= 0.5
        tl.store(values + e, (a * both).to(tl.float32), mask=e < end)


@dataclass(frozen=True)
class Edges:
    """Both directions of every listed edge, sorted, and what counting their entries tells."""

    keys: Tensor  # [2 edges]
    order: Tensor  # [2 edges]: where they stood before
    starts: Tensor  # [N + 1]: the first key of every row
    weights: Tensor  # [N, k]
    unit: Tensor  # [1]: what weights are multiplied by before two of them are added
    row_offsets: Tensor  # [N + 1] int64, of the graph
    invalid: Tensor  # [1]: 1 where an index is out of range
    its: dict[str, Any]  # constexprs

    @property
    def listed(self) -> int:
        """The number of edges in the lists; the graph has at most twice as many entries."""
        return self.weights.numel()


def sorted_edges(
    indices: Tensor, weights: Tensor | None, num_nodes: int, clamp_min: float
) -> Edges:
    """The first half, after which the number of entries is known on the device. At least one row
    and one edge."""
    n, edges = num_nodes, indices.numel()
    indices = indices.contiguous()
    its = {"HAS_WEIGHTS": weights is not None, "BLOCK": BLOCK}
    # Without weights any pointer will do: nothing is read from it.
    weights = indices if weights is None else weights.float().contiguous()
    unit = _unit(weights, clamp_min)
    counts = torch.zeros(n + 1, dtype=torch.int64, device=indices.device)
    invalid = counts.new_zeros(1)
    keys = indices.new_empty(2 * edges, dtype=_key_dtype(n))
    with device_of(indices):
        launch(_write_keys, (triton.cdiv(edges, BLOCK),))(
            indices, weights, keys, invalid, n, indices.shape[1], edges, clamp_min, **its
        )
        keys, order = torch.sort(keys)
        rows = torch.arange(n + 1, device=indices.device, dtype=keys.dtype)
        starts = torch.searchsorted(keys, rows * n)
        launch(_count_entries, (n,))(keys, starts, counts, BLOCK=BLOCK)
    return Edges(keys, order, starts, weights, unit, counts.cumsum(0), invalid, its)


def _unit(weights: Tensor, clamp_min: float) -> Tensor:
    """[1]: 1, or 1/2 where the sum of two weights may overflow.

    A row is kept as A + A^T, exact for the smallest weights, too, whose halves are not. To halve
    all weights does not change the normalised matrix.
    """
    half_of_largest = torch.finfo(torch.float32).max / 2
    huge = (weights > half_of_largest).any() | (clamp_min > half_of_largest)
    return torch.where(huge, 0.5, 1.0).view(1)


def merged(
    edges: Edges, nnz: int, symmetrize: str, clamp_min: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The second half: the graph's tensors, with room for ``nnz`` entries."""
    n = len(edges.row_offsets) - 1
    columns = edges.keys.new_empty(nnz, dtype=torch.int32)
    values = edges.keys.new_empty(nnz, dtype=torch.float32)
    scale, mean = values.new_empty(n), symmetrize == "mean"
    with device_of(columns):
        launch(_merge_edges, (n,))(
            edges.keys, edges.order, edges.starts, edges.weights, edges.unit, edges.row_offsets,
            columns, values, scale, n, edges.listed, clamp_min, MEAN=mean, **edges.its,
            num_warps=MERGE_WARPS,
        )  # fmt: skip
        launch(_scale_entries, (n,))(
            edges.row_offsets, columns, values, scale, MEAN=mean, BLOCK=BLOCK
        )
    return edges.row_offsets, columns, values


def normalized_adjacency(
    indices: Tensor, weights: Tensor | None, num_nodes: int, symmetrize: str, clamp_min: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The graph's three tensors, of at most MAX_EDGES edges with weights up to float32.

    The host waits once, for the number of entries and whether an index was out of range.

    Raises:
        ValueError: it was.
    """
    if indices.numel() == 0:
        return empty_graph(num_nodes, indices.device)
    edges = sorted_edges(indices, weights, num_nodes, clamp_min)
    nnz, outside = torch.cat([edges.row_offsets[-1:], edges.invalid]).tolist()
    if outside:
        check_indices(indices, num_nodes)
    return merged(edges, nnz, symmetrize, clamp_min)


def empty_graph(num_nodes: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A graph without entries."""
    offsets = torch.zeros(num_nodes + 1, dtype=torch.int64, device=device)
    return offsets, offsets.new_empty(0, dtype=torch.int32), offsets.new_empty(0).float()


def _key_dtype(num_nodes: int) -> torch.dtype:
    """int32 where N^2, the largest key, fits: half the passes of the sort, and half the bytes."""
    return torch.int32 if num_nodes**2 < 2**31 else torch.int64


def shipped() -> list[Shipped]:
    """Every kernel for both widths of indices and of keys, and both ways to symmetrise."""
    found = [
        _ship(_scale_entries, "mean", {"MEAN": True}),
        _ship(_scale_entries, "union", {"MEAN": False}),
    ]
    for key in ("i32", "i64"):
        found.append(_ship(_count_entries, f"{key} keys", keys=key))
        for weighted in (True, False):
            variant = f"{'weighted' if weighted else 'unweighted'}, {key} keys"
            its = {"HAS_WEIGHTS": weighted}
            for indices in ("i32", "i64"):
                types = {"indices": indices, "keys": key}
                found.append(_ship(_write_keys, f"{indices} {variant}", its, **types))
            for symmetrize in ("mean", "union"):
                constants = {"MEAN": symmetrize == "mean", **its}
                found.append(_ship(_merge_edges, f"{symmetrize} {variant}", constants, keys=key))
    return found


def _ship(kernel, variant: str, constants: dict[str, bool] | None = None, **types: str) -> Shipped:
    pointers = dict.fromkeys(("order", "starts", "counts", "row_offsets", "invalid"), "i64")
    pointers |= (
        dict.fromkeys(("weights", "unit", "values", "scale"), "fp32") | {"columns": "i32"} | types
    )
    kinds = {"clamp_min": "fp32"} | {name: f"*{kind}" for name, kind in pointers.items()}
    return Shipped(
        f"normalized_adjacency {kernel.__name__[1:]} {variant}".rstrip(),
        kernel,
        {name: kinds.get(name, "i32") for name in kernel.arg_names if not name.isupper()},
        {"BLOCK": BLOCK, **(constants or {})},
        MERGE_WARPS if kernel is _merge_edges else 4,
    )
