"""k nearest neighbours by cosine similarity or Euclidean distance (section 3.3, eqs 2 and 3)."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from nefkern import reference
from nefkern.ops import checks, registry

METRICS = ("cosine", "euclidean")


def knn(
    features: Tensor,
    k: int,
    *,
    metric: str = "cosine",
    segments: Tensor | None = None,
    include_self: bool = False,
    check_finite: bool = False,
) -> tuple[Tensor, Tensor]:
    """The k nearest rows for every row, nearest first.

    Exact: no approximate search. Values are right to the rounding of their dtype, and rows whose
    computed values tie are ordered by index, so the result is the same at any number of threads.
    The N x N matrix is never held: extra memory is O(N k) plus a fixed workspace.

    Entries may be of any size, from the smallest positive number of their dtype to the largest, and
    of very different sizes side by side: no square overflows or vanishes on the way. So a cosine
    does not depend on the rows' lengths, a distance is right to its own rounding however small it
    is beside the entries, and a row of no-data values (1e38, say) leaves the others as they are. A
    distance beyond the largest float is +inf, of a neighbour like any other; such distances tie.

    On a GPU there are two ways, of the same accuracy: all values in IEEE float32, or only those of
    candidates that tensor cores choose. NEFKERN_KNN_CUDA ("baseline", "fused") and
    NEFKERN_KNN_TRITON ("ieee", "preselect") insist on one.

    Args:
        features: [N, C], float16, bfloat16, float32 (all computed in float32) or float64.
        k: neighbours a row, at least 1; it may exceed the number of candidates.
        metric: "cosine": similarity <x, y> / (|x| |y|), highest first, 0 where x or y is zero;
            "euclidean": distance |x - y|, lowest first.
        segments: [S + 1] int32 or int64 offsets from 0 to N, never falling. Row i of segment s
            (``segments[s] <= i < segments[s + 1]``) finds neighbours in its own segment only: in
            its own image, for instance. None: one segment of all rows.
        include_self: whether a row is a candidate for itself.
        check_finite: raise when ``features`` holds NaN or inf. Without it such a row neither has
            neighbours nor is one.

    Returns:
        values [N, k], float32 (float64 for float64 features), and indices [N, k], int32. A row with
        fewer than k candidates is filled up with index -1 and value -inf (cosine) or +inf
        (euclidean); only the index tells that from a distance that is too large.

    Raises:
        TypeError: ``features``, ``k`` or ``segments`` of the wrong type.
        ValueError: a wrong shape, ``k`` below 1, an unknown metric, offsets that don't cover the
            rows, or (``check_finite``) a value that isn't finite.
        RuntimeError: in ``backward()``, when a gradient through ``values`` is asked for. The
            operator isn't differentiable; use the indices to recompute the values that need it.
    """
    checks.tensor("features", features)
    checks.shape("features", features, "N", "C")
    checks.dtype("features", features, checks.FLOATING)
    k = checks.integer("k", k, 1)
    checks.choice("metric", metric, METRICS)
    if segments is not None:
        checks.tensor("segments", segments)
        checks.shape("segments", segments, "S + 1")
        checks.dtype("segments", segments, checks.INTEGER)
    return registry.call("knn", features, k, metric, segments, include_self, check_finite)


def _fake(features, k, metric, segments, include_self, check_finite):
    n = features.shape[0]
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    return features.new_empty((n, k), dtype=dtype), features.new_empty((n, k), dtype=torch.int32)


registry.define(
    "knn(Tensor features, SymInt k, str metric, Tensor? segments, bool include_self, "
    "bool check_finite) -> (Tensor values, Tensor indices)",
    fake=_fake,
)


def _check_values(features: Tensor, segments: Tensor | None, check_finite: bool) -> list[int]:
    """What only the values can tell; returns the segments' offsets."""
    n = len(features)
    if n >= 2**31:
        raise ValueError(f"features: expected fewer than 2^31 rows (int32 indices), got {n}")
    if check_finite:
        checks.finite("features", features)
    return [0, n] if segments is None else checks.offsets("segments", segments, n)


@registry.kernel("knn", "reference")
def _reference(features, k, metric, segments, include_self, check_finite):
    bounds = _check_values(features, segments, check_finite)
    return reference.knn(features, k, metric, bounds, include_self)


@registry.kernel("knn", "cpu", accepts=lambda features, *_: features.dtype != torch.float64)
def _cpu(features, k, metric, segments, include_self, check_finite):
    bounds = torch.tensor(_check_values(features, segments, check_finite))
    return torch.ops.nefkern_native.knn(
        features.float(), bounds, k, metric == "euclidean", include_self
    )


#: How the Triton kernels find neighbours, by NEFKERN_KNN_TRITON: "ieee" computes all values in IEEE
#: float32; "preselect" lets tensor cores choose the candidates whose values are then computed so
#: (nefkern/triton/knn.py); "auto", the default, does that for many channels and a small k. The
#: accuracy is the same.
TRITON_METHODS = ("auto", "ieee", "preselect")


@registry.kernel("knn", "triton", accepts=lambda features, *_: features.dtype != torch.float64)
def _triton(features, k, metric, segments, include_self, check_finite):
    from nefkern.triton.knn import knn

    bounds = _check_values(features, segments, check_finite)
    method = _method("NEFKERN_KNN_TRITON", TRITON_METHODS)
    preselect = {"auto": None, "ieee": False, "preselect": True}[method]
    return knn(features, k, metric, segments, bounds, include_self, preselect=preselect)


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


@registry.kernel("knn", "cuda", accepts=lambda features, *_: features.dtype != torch.float64)
def _cuda(features, k, metric, segments, include_self, check_finite):
    bounds = torch.tensor(_check_values(features, segments, check_finite))
    if segments is not None:
        segments = segments.to(features.device, torch.int64).contiguous()
    method = CUDA_METHODS.index(_method("NEFKERN_KNN_CUDA", CUDA_METHODS))
    return torch.ops.nefkern_native.knn_cuda(
        features.float(), bounds, segments, k, metric == "euclidean", include_self, method
    )


def _setup_context(ctx, inputs, output):
    pass


def _backward(ctx, grad_values, grad_indices):
    raise RuntimeError(
        "knn is not differentiable: a gradient through its values was asked for. Call it on "
        "features.detach(), or recompute the values from the indices."
    )


registry.autograd("knn", _backward, _setup_context)
