"""Stage "operators": every operator on every backend against float64, three runs equal in all bits.

The error is the largest difference over the largest entry, of each result and of each gradient.
An operator of half precision has results in float32 too, which are held to that.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.gpu import inputs, oracles
from bench.gpu.inputs import ALPHA, Sizes
from bench.gpu.plan import Settings
from bench.gpu.worker import Skipped
from bench.harness import DEVICE
from nefkern import backends, ops
from nefkern.ops import CSRGraph, registry
from nefkern.ops.kappa import kappa_padded as padded
from nefkern.spectral.objective import scaled_beta

RUNS = 3
T = 0.01
#: Errors that are allowed. Sums of thousands of terms in float32; in half precision four roundings
#: of the largest entry: of features, state and result of an attention, and one to spare. The tests
#: of the operators are stricter, at their sizes.
FLOAT32, ROUNDINGS = 2e-5, 4

#: Named results, of the operator or of the formulas.
Results = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Check:
    """One operator on one set of inputs.

    Attributes:
        call: the operator, forward and, where it has one, backward.
        compare: errors by name, of what a call returned.
        forward: the operator alone, where that is what the model of docs/gpu.md speaks of.
    """

    call: Callable[[], Results]
    compare: Callable[[Results], dict[str, float]]
    forward: Callable[[], Any] | None = None


def run(case: str, settings: Settings) -> Iterator[dict[str, Any]]:
    """ "operator/backend/dtype/size"."""
    operator, backend, dtype, size = case.split("/")
    if reason := backends.why_not(backend):
        raise Skipped(reason)
    check = check_of(operator, dtype, inputs.sizes_of(size, settings.size))
    with backends.backend(backend):
        try:
            runs = [check.call() for _ in range(RUNS)]
        except RuntimeError as error:
            if "cannot take this call" in str(error):
                raise Skipped(str(error)) from None
            raise
    equal = all(same_bits(runs[0], other) for other in runs[1:])
    yield {"bit_equal": equal}
    errors = check.compare(runs[0])
    yield {"errors": errors}
    wrong = [name for name, e in errors.items() if not e <= tolerance(runs[0].get(name))]
    if wrong:
        raise AssertionError(f"error beyond the tolerance: { {n: errors[n] for n in wrong} }")
    if not equal:
        raise AssertionError(f"{RUNS} runs differ in {differing(runs)}")


def same_bits(a: Results, b: Results) -> bool:
    return not differing([a, b])


def differing(runs: list[Results]) -> list[str]:
    """Names of the results that are not equal in all runs, NaN being equal to itself."""
    first = runs[0]
    return [
        name
        for name in first
        if not all(torch.equal(_bytes(first[name]), _bytes(other[name])) for other in runs[1:])
    ]


def _bytes(x: Tensor) -> Tensor:
    return x.detach().contiguous().flatten().view(torch.uint8)


def tolerance(result: Tensor | None) -> float:
    """By the result's dtype; what is made of results is float32."""
    if result is None or result.dtype not in (torch.float16, torch.bfloat16):
        return FLOAT32
    return ROUNDINGS * torch.finfo(result.dtype).eps / 2


def error(found: Tensor, exact: Tensor) -> float:
    """Below the smallest normal number of its dtype a result is not held to be more exact."""
    if found.shape != exact.shape:
        raise AssertionError(f"shape {list(found.shape)}, expected {list(exact.shape)}")
    if found.numel() == 0:
        return 0.0
    scale = exact.abs().max().clamp(min=torch.finfo(found.dtype).smallest_normal)
    return ((found.double() - exact).abs().max() / scale).item()


def errors(found: Results, exact: Results) -> dict[str, float]:
    return {name: error(found[name], exact[name]) for name in exact}


# ---- the operators ----


def check_of(operator: str, dtype: str, sizes: Sizes) -> Check:
    """The check of "knn cosine", "spmm", ..."""
    name, _, variant = operator.partition(" ")
    make = {
        "knn": knn, "normalized_adjacency": normalized_adjacency, "add": add, "kappa": kappa,
        "kappa_padded": kappa_padded, "feature_kappa": feature_kappa, "spmm": spmm, "sddmm": sddmm,
        "quadratic_form": quadratic_form, "neuralef_loss": neuralef_loss,
        "linear_attention": linear_attention, "weights_gradient": weights_gradient,
    }[name]  # fmt: skip
    arguments = (getattr(torch, dtype), sizes)
    return make(variant, *arguments) if variant else make(*arguments)


def knn(variant: str, dtype: torch.dtype, sizes: Sizes) -> Check:
    """Any order and choice among equals is right: the values are compared, and those of the rows
    that were named, computed anew."""
    metric = {"database": "cosine", "segments": "euclidean"}.get(variant, variant)
    x = (inputs.pixels if variant == "segments" else inputs.features)(sizes).to(dtype)
    options: dict[str, Any] = {"metric": metric}
    k = sizes.k
    if variant == "database":
        options["database"] = x.flip(0)[: sizes.rows // 2].contiguous()
        x = x[: sizes.rows // 3]
    if variant == "segments":
        options["segments"], k = inputs.offsets(sizes), min(10, sizes.patches - 1)

    def call() -> Results:
        values, indices = ops.knn(x, k, **options)
        return {"values": values, "indices": indices}

    def compare(found: Results) -> dict[str, float]:
        scores = oracles.scores(x, options.get("database", x), metric)
        if "database" not in options:
            scores.fill_diagonal_(-math.inf)
        if variant == "segments":
            oracles.own_segment(scores, sizes.patches)
        best = scores.topk(k).values
        sign = -1 if metric == "euclidean" else 1
        indices = found["indices"].long()
        if int(indices.min()) < 0 or bool((indices.sort(1).values.diff(dim=1) == 0).any()):
            raise AssertionError("indices: padding or a neighbour named twice")
        named = scores.gather(1, indices)
        return errors({"values": sign * found["values"], "indices": named},
                      {"values": best, "indices": best})  # fmt: skip

    return Check(call, compare)


def _assembled(call: Callable[[], CSRGraph], exact: Callable[[], Tensor]) -> Check:
    def tensors() -> Results:
        graph = call()
        return {"offsets": graph.row_offsets, "columns": graph.columns, "values": graph.values}

    def compare(found: Results) -> dict[str, float]:
        dense = exact()
        offsets, columns, values = found.values()
        graph = CSRGraph(offsets, columns, values, len(offsets) - 1, symmetric=True).validate()
        return {"entries": error(graph.to_dense(), dense)}

    return Check(tensors, compare)


def normalized_adjacency(symmetrize: str, dtype: torch.dtype, sizes: Sizes) -> Check:
    neighbours, values, near = inputs.lists(sizes)
    indices, weights = (neighbours, values) if symmetrize == "mean" else (near, None)
    return _assembled(
        lambda: ops.normalized_adjacency(
            indices, weights, num_nodes=sizes.rows, symmetrize=symmetrize
        ),
        lambda: oracles.adjacency(indices, weights, symmetrize),
    )


def add(dtype: torch.dtype, sizes: Sizes) -> Check:
    graph = inputs.graph(sizes)
    _, _, near = inputs.lists(sizes)
    dense = oracles.adjacency(near, None, "union").float()
    other = CSRGraph.from_torch(dense, symmetric=True)
    return _assembled(
        lambda: ops.add(graph, other, ALPHA),
        lambda: graph.to_dense().double() + ALPHA * dense.double(),
    )


def kappa(dtype: torch.dtype, sizes: Sizes) -> Check:
    lists = inputs.lists(sizes)
    return _assembled(
        lambda: ops.kappa(*lists, num_nodes=sizes.rows, alpha=ALPHA),
        lambda: oracles.kappa(*lists, ALPHA),
    )


def kappa_padded(dtype: torch.dtype, sizes: Sizes) -> Check:
    """The entries up to the last offset; what stands behind them means nothing."""
    lists = inputs.lists(sizes)

    def call() -> CSRGraph:
        graph = padded(*lists, num_nodes=sizes.rows, alpha=ALPHA)
        used = int(graph.row_offsets[-1])
        return CSRGraph(
            graph.row_offsets, graph.columns[:used], graph.values[:used], sizes.rows, True
        )

    whole = _assembled(call, lambda: oracles.kappa(*lists, ALPHA))
    return Check(
        whole.call, whole.compare, lambda: padded(*lists, num_nodes=sizes.rows, alpha=ALPHA)
    )


def feature_kappa(dtype: torch.dtype, sizes: Sizes) -> Check:
    """Of the neighbours that ``knn`` finds, which has a case of its own: who they are may depend on
    the last bit of a similarity."""
    x, (_, _, near) = inputs.features(sizes).to(dtype), inputs.lists(sizes)
    weight = inputs.weights(sizes.rows, sizes.rows)

    def call() -> Results:
        leaf = x.detach().requires_grad_()
        graph = ops.feature_kappa(leaf, sizes.k, pixel_indices=near, alpha=ALPHA)
        rows = torch.arange(sizes.rows, device=DEVICE).repeat_interleave(graph.row_offsets.diff())
        loss = (graph.values * weight[rows, graph.columns.long()]).sum()
        (gradient,) = torch.autograd.grad(loss, leaf)
        _, indices = ops.knn(x, sizes.k)
        return {
            "offsets": graph.row_offsets, "columns": graph.columns, "gradient": gradient,
            "values": graph.values.detach(), "indices": indices,
        }  # fmt: skip

    def compare(found: Results) -> dict[str, float]:
        leaf = x.double().requires_grad_()
        values = oracles.similarities(leaf, found["indices"])
        exact = oracles.kappa(found["indices"], values, near, ALPHA)
        (gradient,) = torch.autograd.grad((exact * weight).sum(), leaf)
        graph = CSRGraph(found["offsets"], found["columns"], found["values"], sizes.rows)
        return {
            "entries": error(graph.to_dense(), exact.detach()),
            "gradient": error(found["gradient"], gradient),
        }

    return Check(call, compare)


def weights_gradient(dtype: torch.dtype, sizes: Sizes) -> Check:
    """From the gradient of κ's values to that of the lists' weights, the backward pass alone."""
    indices, values, near = inputs.lists(sizes)
    graph, weight = inputs.graph(sizes), inputs.weights(sizes.rows, sizes.rows)
    rows = torch.arange(sizes.rows, device=DEVICE).repeat_interleave(graph.row_offsets.diff())
    grad = weight[rows, graph.columns.long()].float()

    def call() -> Results:
        found = registry.call(
            "normalized_adjacency_backward", grad, indices, values, graph.row_offsets,
            graph.columns, "mean", 0.0,
        )  # fmt: skip
        return {"gradient": found}

    def compare(found: Results) -> dict[str, float]:
        leaf = values.double().requires_grad_()
        exact = oracles.kappa(indices, leaf, near, ALPHA)
        (gradient,) = torch.autograd.grad((exact * weight).sum(), leaf)
        return errors(found, {"gradient": gradient})

    return Check(call, compare)


def _differentiated(
    function: Callable[..., dict[str, Tensor]],
    exact: Callable[..., dict[str, Tensor]],
    leaves: dict[str, Tensor],
    gradient: Tensor | None = None,
    forward: Callable[[], Any] | None = None,
) -> Check:
    """Results, and the gradients of the one called "out" in the leaves; those of a sum weighted by
    ``gradient``, where it is not a scalar."""

    def both(of: Callable[..., dict[str, Tensor]], dtype: torch.dtype | None) -> Results:
        own = {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in leaves.items()}
        found = of(**own)
        out = found["out"]
        grad = None if gradient is None else gradient.to(out.dtype)
        gradients = torch.autograd.grad(out, list(own.values()), grad)
        named = {f"gradient of {n}": g for n, g in zip(own, gradients, strict=True)}
        return {name: x.detach() for name, x in found.items()} | named

    return Check(
        lambda: both(function, None),
        lambda found: errors(found, both(exact, torch.float64)),
        forward,
    )


def spmm(dtype: torch.dtype, sizes: Sizes) -> Check:
    graph, x = inputs.graph(sizes), inputs.psi(sizes, dtype)
    return _differentiated(
        lambda x, values: {"out": ops.spmm(dataclasses.replace(graph, values=values), x)},
        lambda x, values: {"out": _dense(graph, values) @ x},
        {"x": x, "values": graph.values},
        inputs.weights(*x.shape).to(dtype),
        lambda: ops.spmm(graph, x),
    )


def _dense(graph: CSRGraph, values: Tensor) -> Tensor:
    """The matrix of these values at the graph's places; differentiable in them."""
    n = graph.num_nodes
    rows = torch.arange(n, device=DEVICE).repeat_interleave(graph.row_offsets.diff())
    zeros = torch.zeros(n, n, dtype=values.dtype, device=DEVICE)
    return zeros.index_put((rows, graph.columns.long()), values)


def sddmm(dtype: torch.dtype, sizes: Sizes) -> Check:
    graph, x = inputs.graph(sizes), inputs.psi(sizes, dtype)
    y = x.flip(0).contiguous()
    rows = torch.arange(sizes.rows, device=DEVICE).repeat_interleave(graph.row_offsets.diff())
    places = (rows, graph.columns.long())
    return _differentiated(
        lambda x, y: {"out": ops.sddmm(graph, x, y)},
        lambda x, y: {"out": (x @ y.T)[places]},
        {"x": x, "y": y},
        inputs.weights(sizes.rows, sizes.rows)[places],
        lambda: ops.sddmm(graph, x, y),
    )


def quadratic_form(dtype: torch.dtype, sizes: Sizes) -> Check:
    graph, x = inputs.graph(sizes), inputs.psi(sizes, dtype)
    return _differentiated(
        lambda psi: {"out": ops.quadratic_form(psi, graph)},
        lambda psi: {"out": psi.T @ (graph.to_dense().double() @ psi)},
        {"psi": x},
        inputs.weights(sizes.outputs, sizes.outputs),
        lambda: ops.quadratic_form(x, graph),
    )


def neuralef_loss(dtype: torch.dtype, sizes: Sizes) -> Check:
    graph, beta = inputs.graph(sizes), scaled_beta(sizes.outputs)

    def ours(psi: Tensor) -> Results:
        loss, r = ops.neuralef_loss(psi, graph, beta, T)
        return {"out": loss, "R": r}

    def exact(psi: Tensor) -> Results:
        loss, r = oracles.objective(psi, graph.to_dense().double(), beta, T)
        return {"out": loss, "R": r}

    return _differentiated(ours, exact, {"psi": inputs.psi(sizes, dtype)})


def linear_attention(feature_map: str, dtype: torch.dtype, sizes: Sizes) -> Check:
    """Ragged sizes with a mask as well; the first and the last image are compared."""
    q, k, v, grad = inputs.attention(sizes, dtype)
    b, _, n, d = sizes.attention
    mask = None
    if d % 16:
        mask = torch.rand(b, n, generator=torch.Generator().manual_seed(5)).to(DEVICE) < 0.7
    few = [0, b - 1]

    def check(images: slice | list[int]) -> Check:
        own = None if mask is None else mask[images]
        return _differentiated(
            lambda **x: {"out": ops.linear_attention(**x, feature_map=feature_map, mask=own)},
            lambda **x: {"out": oracles.attention(**x, feature_map=feature_map, mask=own)},
            {"q": q[images], "k": k[images], "v": v[images]},
            grad[images],
        )

    whole, part = check(slice(None)), check(few)
    return Check(whole.call, lambda found: part.compare({n: x[few] for n, x in found.items()}))
