"""k nearest neighbours by cosine, Euclidean distance or inner product (section 3.3, eqs 2, 3)."""

from __future__ import annotations

import itertools
import os

import torch
from torch import Tensor

from nefkern import reference
from nefkern.ops import checks, registry

METRICS = ("cosine", "euclidean", "inner_product")


def knn(
    features: Tensor,
    k: int,
    *,
    database: Tensor | None = None,
    metric: str = "cosine",
    segments: Tensor | None = None,
    database_segments: Tensor | None = None,
    include_self: bool = False,
    check_finite: bool = False,
) -> tuple[Tensor, Tensor]:
    """The k nearest rows for every row, nearest first: of the same rows, or of a database.

    Exact: no approximate search. Values are right to the rounding of their dtype, and rows whose
    computed values tie are ordered by index, so the result is the same at any number of threads.
    The N x N (N x M) matrix is never held: extra memory is O(N k), copies of the rows, and a fixed
    workspace.

    Entries may be of any size, from the smallest positive number of their dtype to the largest, and
    of very different sizes side by side: no square overflows or vanishes on the way. So a cosine
    does not depend on the rows' lengths, a distance is right to its own rounding however small it
    is beside the entries, and a row of no-data values (1e38, say) leaves the others as they are. A
    distance beyond the largest float is +inf, of a neighbour like any other; such distances tie. So
    do inner products beyond it, ±inf; one is right to the rounding of |x| |y|.

    On the CPU a value depends on its two rows alone, to the last bit: they have the same in any
    database, or any part of one, which :mod:`nefkern.spectral.neighbours` builds on. (Elsewhere to
    rounding: the reference's products round as their shapes have it, a GPU's by the way taken.)

    On a GPU there are two ways, of the same accuracy: all values in IEEE float32, or only those of
    candidates that tensor cores choose. NEFKERN_KNN_CUDA ("baseline", "fused") and
    NEFKERN_KNN_TRITON ("ieee", "preselect") insist on one.

    Args:
        features: [N, C], float16, bfloat16, float32 (all computed in float32) or float64.
        k: neighbours a row, at least 1; it may exceed the number of candidates.
        database: [M, C], the candidates, of the dtype and on the device of ``features``. Every row
            of it is one, also where it equals the query. None: the rows of ``features``.
        metric: "cosine": similarity <x, y> / (|x| |y|), highest first, 0 where x or y is zero;
            "euclidean": distance |x - y|, lowest first; "inner_product": <x, y>, highest first, in
            which a row need not be its own nearest.
        segments: [S + 1] int32 or int64 offsets from 0 to N, never falling. Row i of segment s
            (``segments[s] <= i < segments[s + 1]``) finds neighbours in its own segment only: in
            its own image, for instance. None: one segment of all rows. The host plans by them:
            offsets on the CPU spare it the wait for a GPU.
        database_segments: [S + 1] offsets from 0 to M: row i of segment s finds neighbours in
            segment s of the database. Given with ``segments`` and a database, or not at all.
        include_self: whether a row is a candidate for itself. With a database nothing is a row's
            self: False.
        check_finite: raise when ``features`` or ``database`` holds NaN or inf. Without it such a
            row neither has neighbours nor is one.

    Returns:
        values [N, k], float32 (float64 for float64 features), and indices [N, k], int32. A row with
        fewer than k candidates is filled up with index -1 and value -inf (cosine, inner product) or
        +inf (euclidean); only the index tells that from a value that is too large.

    Raises:
        TypeError: an argument of the wrong type, or a database of another dtype.
        ValueError: a wrong shape or device, ``k`` below 1, an unknown metric, offsets that don't
            cover the rows or of one side only, ``include_self`` with a database, or
            (``check_finite``) a value that isn't finite.
        RuntimeError: in ``backward()``, when a gradient through ``values`` is asked for. The
            operator isn't differentiable; use the indices to recompute the values that need it.
    """
    checks.tensor("features", features)
    checks.shape("features", features, "N", "C")
    checks.dtype("features", features, checks.FLOATING)
    k = checks.integer("k", k, 1)
    if isinstance(k, int) and k > _MAX_NEIGHBOURS:
        raise ValueError(f"k: expected less than 2^31, indices being int32, got {k}")
    include_self = checks.flag("include_self", include_self)
    check_finite = checks.flag("check_finite", check_finite)
    checks.choice("metric", metric, METRICS)
    if database is not None:
        _check_database(database, features, include_self)
    _check_segments(segments, database, database_segments)
    return registry.call(
        "knn", features, k, metric, segments, include_self, check_finite, database,
        database_segments,
    )  # fmt: skip


_MAX_NEIGHBOURS = 2**31 - 1


def _check_database(database: Tensor, features: Tensor, include_self: bool) -> None:
    checks.tensor("database", database)
    checks.shape("database", database, "M", features.shape[1])
    checks.dtype("database", database, (features.dtype,))
    checks.device("database", database, features, "features")
    if include_self:
        raise ValueError(
            "include_self: expected False with a database, all of whose rows are candidates, got "
            f"{include_self}"
        )


def _check_segments(
    segments: Tensor | None, database: Tensor | None, database_segments: Tensor | None
) -> None:
    for name, offsets in (("segments", segments), ("database_segments", database_segments)):
        if offsets is not None:
            checks.tensor(name, offsets)
            checks.shape(name, offsets, "S + 1")
            checks.dtype(name, offsets, checks.INTEGER)
    if database is None and database_segments is not None:
        raise ValueError("database_segments: expected None without a database, got offsets")
    if database is not None and (segments is None) != (database_segments is None):
        got, missing = "segments", "database_segments"
        if segments is None:
            got, missing = missing, got
        raise ValueError(f"{missing}: expected offsets beside {got}, got None")


def _fake(features, k, metric, segments, include_self, check_finite, database, database_segments):
    n = features.shape[0]
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    return features.new_empty((n, k), dtype=dtype), features.new_empty((n, k), dtype=torch.int32)


registry.define(
    "knn(Tensor features, SymInt k, str metric, Tensor? segments, bool include_self, "
    "bool check_finite, Tensor? database, Tensor? database_segments) "
    "-> (Tensor values, Tensor indices)",
    fake=_fake,
)


def _check_values(
    features: Tensor,
    segments: Tensor | None,
    check_finite: bool,
    database: Tensor | None = None,
    database_segments: Tensor | None = None,
) -> tuple[list[int], list[int] | None]:
    """What only the values can tell; returns the segments' offsets, and those of the database."""
    bounds = _check_rows("features", features, "segments", segments, check_finite)
    if database is None:
        return bounds, None
    other = _check_rows("database", database, "database_segments", database_segments, check_finite)
    if len(other) != len(bounds):
        raise ValueError(
            f"database_segments: expected as many offsets as segments, {len(bounds)}, "
            f"got {len(other)}"
        )
    return bounds, other


def _check_rows(
    name: str, rows: Tensor, segments_name: str, segments: Tensor | None, check_finite: bool
) -> list[int]:
    n = len(rows)
    if n >= 2**31:
        raise ValueError(f"{name}: expected fewer than 2^31 rows (int32 indices), got {n}")
    if check_finite:
        checks.finite(name, rows)
    return [0, n] if segments is None else checks.offsets(segments_name, segments, n)


def _on_device(
    segments: Tensor | None, bounds: list[int] | None, device: torch.device
) -> Tensor | None:
    """Offsets on the rows' device, int64, without waiting for it.

    Images of one size have evenly spaced ones, which the device can count by itself: that can be
    captured in a CUDA graph, as a copy from ordinary memory cannot.
    """
    if segments is None or segments.device == device:
        return None if segments is None else segments.to(torch.int64).contiguous()
    step = bounds[1] - bounds[0] if len(bounds) > 1 else 0
    if step > 0 and all(b - a == step for a, b in itertools.pairwise(bounds)):
        return torch.arange(0, bounds[-1] + 1, step, device=device)
    pinned = torch.tensor(bounds, pin_memory=device.type == "cuda")
    return pinned.to(device, non_blocking=True)


@registry.kernel("knn", "reference")
def _reference(
    features, k, metric, segments, include_self, check_finite, database, database_segments
):
    bounds = _check_values(features, segments, check_finite, database, database_segments)
    return reference.knn(features, k, metric, bounds[0], include_self, database, bounds[1])


def _in_float32(features, *_) -> bool:
    return features.dtype != torch.float64


@registry.kernel("knn", "cpu", accepts=_in_float32)
def _cpu(features, k, metric, segments, include_self, check_finite, database, database_segments):
    bounds = _check_values(features, segments, check_finite, database, database_segments)
    offsets, other_offsets = (None if each is None else torch.tensor(each) for each in bounds)
    return torch.ops.nefkern_native.knn(
        features.float(), offsets, k, METRICS.index(metric), include_self,
        None if database is None else database.float(), other_offsets,
    )  # fmt: skip


#: How the Triton kernels find neighbours, by NEFKERN_KNN_TRITON: "ieee" computes all values in IEEE
#: float32; "preselect" lets tensor cores choose the candidates whose values are then computed so
#: (nefkern/triton/knn.py); "auto", the default, does that for many channels and a small k. The
#: accuracy is the same.
TRITON_METHODS = ("auto", "ieee", "preselect")


def _by_triton(features, k, metric, segments, include_self, check_finite, database, *_) -> bool:
    rows = _counted_together(features, database)
    return _in_float32(features) and rows < 2**31


@registry.kernel("knn", "triton", accepts=_by_triton)
def _triton(features, k, metric, segments, include_self, check_finite, database, database_segments):
    from nefkern.triton.knn import knn

    bounds = _check_values(features, segments, check_finite, database, database_segments)
    method = _method("NEFKERN_KNN_TRITON", TRITON_METHODS)
    preselect = {"auto": None, "ieee": False, "preselect": True}[method]
    device = features.device
    return knn(
        features, k, metric, _on_device(segments, bounds[0], device), bounds[0], include_self,
        database, _on_device(database_segments, bounds[1], device), bounds[1], preselect=preselect,
    )  # fmt: skip


#: How the CUDA kernels find neighbours, by NEFKERN_KNN_CUDA: "baseline" computes all values in
#: float32; "fused" lets tensor cores choose the candidates whose values are then computed, where k
#: allows (csrc/cuda/knn.h); "auto", the default, does that for long segments only. Results are the
#: same to the last bit: the choice is open until both have been measured on a GPU.
CUDA_METHODS = ("auto", "baseline", "fused")


def _method(variable: str, methods: tuple[str, ...]) -> str:
    """The method that an environment variable names; the first where it is unset."""
    name = os.environ.get(variable) or methods[0]
    if name not in methods:
        raise ValueError(f"{variable}={name}: expected one of {', '.join(methods)}")
    return name


def _by_cuda(features, k, metric, segments, include_self, check_finite, database, *_) -> bool:
    return _in_float32(features) and _counted_together(features, database) < 2**31


def _counted_together(features: Tensor, database: Tensor | None) -> int:
    """Rows of both, which the GPU's kernels number as one array."""
    return len(features) + (0 if database is None else len(database))


@registry.kernel("knn", "cuda", accepts=_by_cuda)
def _cuda(features, k, metric, segments, include_self, check_finite, database, database_segments):
    bounds = _check_values(features, segments, check_finite, database, database_segments)
    offsets, other_offsets = (None if each is None else torch.tensor(each) for each in bounds)
    there, other_there = (
        _on_device(each, on_host, features.device)
        for each, on_host in zip((segments, database_segments), bounds, strict=True)
    )
    return torch.ops.nefkern_native.knn_cuda(
        features.float(), offsets, there, k, METRICS.index(metric), include_self,
        None if database is None else database.float(), other_offsets, other_there,
        CUDA_METHODS.index(_method("NEFKERN_KNN_CUDA", CUDA_METHODS)),
    )  # fmt: skip


def _setup_context(ctx, inputs, output):
    pass


def _backward(ctx, grad_values, grad_indices):
    raise RuntimeError(
        "knn is not differentiable: a gradient through its values was asked for. Call it on "
        "features.detach(), or recompute the values from the indices."
    )


registry.autograd("knn", _backward, _setup_context)
