"""``knn`` in Triton: products of float16 on tensor cores, then float32 where it matters.

Rows go in blocks whose scores, [rows, longest segment] float32, stay in the L2 cache. A block's

1. **scores** estimate every pair's value by one product of tiles (``knn_estimates``),
2. **selection** keeps the candidates that may be among the k best, by a proved margin
   (``knn_select``),
3. **re-rank** computes their values in float32 from the unrounded rows (``knn_values``),
4. **exact scores** are computed in float32 for the rows whose candidates overflow their buffer,
   followed by an exact selection; the kernels look for themselves whether there is such a row,
5. **sort** orders by (value, index), packed into one integer (``knn_keys``): ``torch.sort``, for
   any k.

Few channels, or a k that is a large part of N, skip 1 to 3 (:func:`preselects`): every row is exact
from the start. Both ways have the same accuracy. A row is done by one of them entirely, each value
is summed in one fixed order, and no atomic is used, so results don't depend on scheduling. Nothing
waits for the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from nefkern.triton.configs import Shipped, device_of, launch
from nefkern.triton.knn_estimates import (
    PACK,
    SCORE_CONFIGS,
    SIDES,
    Packed,
    pack,
    pack_kernel,
    score_kernel,
    tuned_score,
)
from nefkern.triton.knn_keys import FLAT, unpack_kernel
from nefkern.triton.knn_rows import DEPTH, Ranges, Rows, rows_of
from nefkern.triton.knn_scores import BLOCK_ROWS, STRIP, grid_of, strips_of
from nefkern.triton.knn_select import SELECT, SELECT_EXACT, select_exact_kernel, select_kernel
from nefkern.triton.knn_values import CHUNK, EXACT, RERANK, exact_kernel, rerank_kernel

#: Bytes of the scores and candidates of a block of rows, which should stay in the L2 cache. Blocks
#: have at least BLOCK_ROWS rows: from 65,000 candidates a row on it takes more, 512 bytes each.
WORKSPACE = 32 << 20
#: From here on :func:`preselects` chooses. Both are estimates, not measured on a GPU yet.
DIRECT_CHANNELS = 16
DIRECT_SHARE = 8


def preselects(channels: int, k: int, longest: int) -> bool:
    """Whether estimates on tensor cores come first, for segments of up to ``longest`` rows.

    With few channels a product of padded tiles has little to save; with a large k the re-rank
    fetches so many rows that all pairs cost less, in tiles.
    """
    return channels > DIRECT_CHANNELS and k * DIRECT_SHARE <= longest


def knn(
    features: Tensor,
    k: int,
    metric: str,
    segments: Tensor | None,
    bounds: Sequence[int],
    include_self: bool,
    database: Tensor | None = None,
    database_segments: Tensor | None = None,
    database_bounds: Sequence[int] | None = None,
    *,
    preselect: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """values and indices [N, k]; see :func:`nefkern.ops.knn` for the contract.

    Args:
        features: [N, C] float16, bfloat16 or float32.
        bounds: ``segments`` on the host, checked; [0, N] for None.
        database: [M, C] likewise, with N + M < 2^31, and offsets as many; None: ``features``.
        preselect: whether tensor cores choose the candidates whose values are then computed, or
            all values are computed in float32. None: as :func:`preselects` says. The accuracy is
            the same.
    """
    n, channels = features.shape
    values = features.new_empty((n, k), dtype=torch.float32)
    indices = features.new_empty((n, k), dtype=torch.int32)
    if n == 0:
        return values, indices
    with device_of(features):
        other = None if database is None else database.float()
        data = rows_of(
            features.float(), metric, Ranges(bounds, segments), other,
            Ranges(database_bounds or (), database_segments),
        )  # fmt: skip
        if data.longest == 0:
            return values.fill_(math.inf if data.euclidean else -math.inf), indices.fill_(-1)
        if preselect is None:
            preselect = preselects(channels, k, data.longest)
        packed = pack(data, channels) if preselect else None
        # A query is no row of its database.
        _blocks(data, packed, k, include_self or database is not None, values, indices)
    return values, indices


def _capacity(k: int, longest: int, preselect: bool) -> int:
    """Candidates a row can keep."""
    return min(longest, k + max(k // 2, 64) if preselect else k)


def _block_rows(n: int, strips: int, capacity: int) -> int:
    # Scores; a position, and a key twice beside its place while it is sorted.
    a_row = 4 * strips * STRIP.value + (4 + 3 * 8) * capacity
    blocks = min(max(1, WORKSPACE // a_row // BLOCK_ROWS.value), triton.cdiv(n, BLOCK_ROWS.value))
    return min(1 << 20, blocks * BLOCK_ROWS.value)


def _blocks(
    data: Rows, packed: Packed | None, k: int, include_self: bool, values: Tensor, indices: Tensor
) -> None:
    """The five steps for every block of rows."""
    n, longest = data.queries, data.longest
    capacity, places = _capacity(k, longest, packed is not None), min(k, longest)
    strips = strips_of(data.reach)
    step = _block_rows(n, strips, capacity)
    new = data.rows.new_empty
    scores, keys = new((step, strips * STRIP.value)), new((step, capacity), dtype=torch.int64)
    counts = new(step, dtype=torch.int32).fill_(capacity + 1)  # an overflow: all exact
    positions = new((step, capacity) if packed else 0, dtype=torch.int32)
    for first in range(0, n, step):
        last = min(first + step, n)
        rows = triton.cdiv(last - first, SELECT["BR"])
        if packed:
            _preselect(data, packed, first, last, places, include_self, scores, counts, positions,
                       keys)  # fmt: skip
        launch(exact_kernel, grid_of(last - first, strips, EXACT))(
            data.planes, data.features, data.exponents, data.present, data.begins, data.ends,
            counts, scores, first, last, len(data.rows), len(data.planes), strips, capacity,
            data.metric, include_self, CHUNK, **EXACT,
        )  # fmt: skip
        launch(select_exact_kernel, (rows,))(
            scores, data.begins, data.ends, counts, keys, first, last, strips, places, capacity,
            **SELECT_EXACT,
        )  # fmt: skip
        ordered = keys[: last - first].sort(dim=1).values
        size = (last - first) * k
        launch(unpack_kernel, (triton.cdiv(size, FLAT["BN"]),))(
            ordered, values[first:], indices[first:], size, k, capacity, data.first_candidate,
            data.euclidean, **FLAT,
        )  # fmt: skip


def _preselect(
    data: Rows, packed: Packed, first: int, last: int, places: int, include_self: bool,
    scores: Tensor, counts: Tensor, positions: Tensor, keys: Tensor,
) -> None:  # fmt: skip
    """Steps 1 to 3 for rows [first, last)."""
    rows, strips, capacity = last - first, scores.shape[1] // STRIP.value, keys.shape[1]
    n, steps = len(packed.rows), packed.rows.shape[1] // DEPTH
    tuned_score[lambda tile: grid_of(rows, strips, tile)](
        packed.rows, packed.others, packed.offsets, packed.other_offsets, data.begins, data.ends,
        scores, first, last, n, steps, strips, INCLUDE_SELF=include_self,
    )  # fmt: skip
    launch(select_kernel, (triton.cdiv(rows, SELECT["BR"]),))(
        scores, data.begins, data.ends, packed.margins, packed.edges, counts, positions, first,
        last, strips, places, places // 16, capacity, packed.relative, **SELECT,
    )  # fmt: skip
    launch(rerank_kernel, (triton.cdiv(rows, RERANK["BR"]),))(
        data.rows, data.features, data.exponents, counts, positions, keys, first, last, steps,
        len(data.planes), capacity, data.metric, **RERANK,
    )  # fmt: skip


def shipped() -> list[Shipped]:
    """Every kernel, all metrics, with and without the row itself, as the launches configure it."""
    found = [_ship(pack_kernel, side, {"SIDE": side} | PACK) for side in SIDES]
    for euclidean in (False, True):
        metric = "distances" if euclidean else "similarities"
        found.append(_ship(unpack_kernel, metric, {"EUCLIDEAN": euclidean} | FLAT))
    for metric in ("cosine", "euclidean", "inner_product"):
        its = {"METRIC": metric, "CHUNK": CHUNK}
        found.append(_ship(rerank_kernel, metric, its | RERANK))
        for include_self, variant in ((False, metric), (True, f"{metric}, with self")):
            found.append(_ship(exact_kernel, variant, its | {"INCLUDE_SELF": include_self} | EXACT))
    for kernel, its in ((select_kernel, SELECT), (select_exact_kernel, SELECT_EXACT)):
        found.append(_ship(kernel, "", its))
    for config in SCORE_CONFIGS:
        tile = f"{config.kwargs['BM']} x {config.kwargs['BN']}, {config.num_warps} warps"
        for include_self, variant in ((False, tile), (True, f"{tile}, with self")):
            its = {"INCLUDE_SELF": include_self, "num_warps": config.num_warps, **config.kwargs}
            found.append(_ship(score_kernel, variant, its, config.num_stages))
    return found


def _ship(kernel, variant: str, its: dict, stages: int = 3) -> Shipped:
    kinds = {"present": "*i1", "keys": "*i64", "relative": "fp32", "scale": "*fp64"}
    kinds |= dict.fromkeys(("packed", "others"), "*fp16")
    integers = ("begins", "ends", "counts", "positions", "indices", "exponents")
    kinds |= dict.fromkeys(integers, "*i32")
    kinds |= dict.fromkeys(
        ("rows", "planes", "features", "centre", "scores", "margins", "edges"), "*fp32"
    )
    kinds |= dict.fromkeys(("offsets", "other_offsets", "lengths", "residuals", "values"), "*fp32")
    names = kernel.arg_names
    return Shipped(
        f"knn {kernel.__name__.removesuffix('_kernel')} {variant}".rstrip(),
        kernel,
        {name: kinds.get(name, "i32") for name in names if not name.isupper()},
        {name: value for name, value in its.items() if name in names},
        its["num_warps"],
        stages,
        product=kernel is score_kernel,
    )
