"""What the tests of the graph operators share: backends, cases and the dense formulas."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nefkern import backends
from nefkern.ops import CSRGraph, registry

HALF = (torch.float16, torch.bfloat16)


def backends_of(op: str, *, compiled: bool = False) -> list[str]:
    """The backends that implement ``op`` and run here; Triton's without a GPU by interpreting.

    Args:
        compiled: leave the interpreter out, where a test would take it minutes or is about threads.
    """
    without = {"triton"} if compiled and backends.interpreting() else set()
    found = registry.implemented()[op]
    return [name for name in found if name not in without and not backends.why_not(name)]


def backend_device(name: str | None = None) -> str:
    """Where backend ``name``, or the one in use, takes its tensors: on the real device, if any."""
    name = name or backends.current()
    on_gpu = name == "cuda" or (name == "triton" and not backends.interpreting())
    return "cuda" if on_gpu else "cpu"


def moved(name: str, *things: torch.Tensor | CSRGraph | None) -> list:
    """``things`` where backend ``name`` runs."""
    return [thing if thing is None else thing.to(backend_device(name)) for thing in things]


def on_backend_device(op: Callable) -> Callable:
    """``op``, with tensors and graphs moved to the backend's device and its results moved back.

    What is there already stays as it is, strides included.
    """

    def there(value, device):
        return value.to(device) if isinstance(value, torch.Tensor | CSRGraph) else value

    def call(*args, **options):
        device = backend_device()
        args = [there(value, device) for value in args]
        results = op(*args, **{name: there(value, device) for name, value in options.items()})
        if isinstance(results, tuple):
            return tuple(there(result, "cpu") for result in results)
        return there(results, "cpu")

    return call


def on_threads(function: Callable, counts=(1, 2, 5)) -> list:
    """What ``function`` returns on each number of threads."""
    before, results = torch.get_num_threads(), []
    try:
        for count in counts:
            torch.set_num_threads(count)
            results.append(function())
    finally:
        torch.set_num_threads(before)
    return results


def dense_adjacency(indices, weights, num_nodes, symmetrize="mean", clamp_min=0.0):
    """D^(-1/2) A D^(-1/2) in float64, straight from the formulas, entry by entry."""
    a = torch.zeros(num_nodes, num_nodes, dtype=torch.float64)
    for i, row in enumerate(indices.tolist()):
        for slot, j in enumerate(row):
            if j >= 0:
                w = 1.0 if weights is None else max(float(weights[i, slot]), clamp_min)
                a[i, j] = max(a[i, j].item(), w)
    a = (a + a.T) / 2 if symmetrize == "mean" else torch.maximum(a, a.T)
    degree = a.sum(1)
    scale = torch.where(degree > 0, degree.rsqrt(), 0.0)
    return scale[:, None] * a * scale[None, :]


def random_lists(n, k, seed=0, *, dtype=torch.float32, index_dtype=torch.int32):
    """Neighbour lists with padding, duplicates, self loops, negative and zero weights."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(-1, max(n, 1), (n, k), generator=generator)
    weights = torch.randn(n, k, generator=generator, dtype=torch.float64)
    weights[torch.rand(n, k, generator=generator) < 0.1] = 0
    return indices.to(index_dtype), weights.to(dtype)


def random_graph(n, per_row, seed=0, *, symmetric=True, dtype=torch.float32) -> CSRGraph:
    """A random sparse graph with empty rows and a few heavy ones; built without the operators."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(n, 1, generator=generator) * 2 * per_row / max(n, 1)
    share[torch.rand(n, 1, generator=generator) < 0.2] = 0
    dense = torch.randn(n, n, generator=generator, dtype=torch.float64)
    dense = torch.where(torch.rand(n, n, generator=generator) < share, dense, 0.0)
    if symmetric:
        dense = (dense + dense.T) / 2
    return CSRGraph.from_torch(dense.to(dtype), symmetric=symmetric)


def assert_half_close(result, exact, dtype):
    """``result`` in half precision is as near to ``exact`` as rounding once to ``dtype`` allows."""
    unit = torch.finfo(dtype).eps
    error = (result.double() - exact).abs()
    allowed = unit * exact.abs() + unit * 1e-2 * exact.abs().max() + torch.finfo(dtype).tiny
    assert (error <= allowed).all(), f"largest excess {(error - allowed).max()}"
