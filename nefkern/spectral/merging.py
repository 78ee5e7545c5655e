"""Any number of clusters from one clustering: merged two by two to a tree that is cut anywhere."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from nefkern.ops import checks


def merge(distances: Tensor, sizes: Tensor, linkage: Literal["ward", "average"] = "ward") -> Tensor:
    """Merge the two nearest clusters, again and again, until one is left.

    Args:
        distances: ``[K, K]``, symmetric, not negative: under ``"ward"`` Euclidean, between centres.
        sizes: ``[K]``, points in each cluster.
        linkage: what two merged clusters are away from a third, by the formula of Lance and
            Williams (1967). ``"ward"``: by what K-means' inertia rises if they are merged (Ward
            1963), in SciPy's scale: the distance itself between two single points. ``"average"``:
            by the mean over all pairs of points.

    Returns:
        float64 ``[K − 1, 4]``, in the form of :func:`scipy.cluster.hierarchy.linkage`: each row the
        two that are merged (from K on those made by the rows before), their distance, never smaller
        than in the row before, and how many of the K are in both. Ties go to the lower clusters.

    Raises:
        ValueError: shapes that do not fit each other; another linkage; a distance that is not
            finite.
    """
    k = len(distances)
    if distances.shape != (k, k) or sizes.shape != (k,):
        raise ValueError(
            "distances and sizes must be [K, K] and [K], "
            f"got {list(distances.shape)} and {list(sizes.shape)}"
        )
    if linkage not in ("ward", "average"):
        raise ValueError(f"linkage must be 'ward' or 'average', got {linkage!r}")
    checks.finite("distances", distances)
    d, n = distances.double().cpu().clone(), sizes.double().cpu().clone()
    if linkage == "ward":  # squares, weighted: of two single points it is the square itself
        d = d.square() * (2 * n[:, None] * n / (n[:, None] + n).clamp_min(1e-300))
    d.fill_diagonal_(torch.inf)
    names, leaves, rows = list(range(k)), [1] * k, []
    alive = torch.ones(k, dtype=torch.bool)
    for step in range(k - 1):
        a, b = divmod(int(d.argmin()), k)
        apart, both = d[a, b].clone(), n[a] + n[b]
        height = apart.sqrt() if linkage == "ward" else apart
        leaves[a] += leaves[b]
        rows.append([*sorted((names[a], names[b])), float(height), leaves[a]])
        if linkage == "ward":
            joined = (n[a] + n) * d[a] + (n[b] + n) * d[b] - n * apart
            joined /= (both + n).clamp_min(1e-300)
        else:
            joined = (n[a] * d[a] + n[b] * d[b]) / both.clamp_min(1e-300)
        alive[b] = False
        joined[~alive] = torch.inf
        joined[a] = torch.inf
        d[a], d[:, a] = joined, joined
        d[b], d[:, b] = torch.inf, torch.inf
        n[a], names[a] = both, k + step
    return torch.tensor(rows, dtype=torch.float64).view(-1, 4)


def ward(centers: Tensor, sizes: Tensor) -> Tensor:
    """The tree of K-means' clusters that raises its inertia least with every merger.

    Args:
        centers: ``[K, D]``.
        sizes: ``[K]``, points in each cluster.

    Returns:
        See :func:`merge`.
    """
    centers = centers.double()
    exact = "donot_use_mm_for_euclid_dist"
    return merge(torch.cdist(centers, centers, compute_mode=exact), sizes, "ward")


def cut(tree: Tensor, count: int) -> Tensor:
    """Which of ``count`` groups each cluster belongs to.

    Args:
        tree: ``[K − 1, 4]`` of :func:`merge`.
        count: 1 to K.

    Returns:
        int64 ``[K]``, groups in the order of their first clusters.

    Raises:
        TypeError, ValueError: ``count`` is no int, or out of range.
    """
    k, count = len(tree) + 1, checks.integer("count", count, 0)
    if not 1 <= count <= k:
        raise ValueError(f"count must be 1 to {k}, the clusters, got {count}")
    members = {i: [i] for i in range(k)}
    for step, (a, b) in enumerate(tree[: k - count, :2].long().tolist()):
        members[k + step] = members.pop(a) + members.pop(b)
    groups = torch.empty(k, dtype=torch.int64)
    for group, clusters in enumerate(sorted(members.values(), key=min)):
        groups[clusters] = group
    return groups
