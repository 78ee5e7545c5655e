"""Every operator with arguments of every kind: an error that names one, or a right result."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nefkern import backends, ops
from nefkern.runtime.distributed import is_out_of_memory
from tests.fuzz.running import Attempt

Arguments = dict[str, Any]


class Sub(torch.Tensor):
    """A subclass that does nothing of its own."""


def _graph(random: random.Random, n: int) -> ops.CSRGraph:
    lists = torch.tensor([[random.randrange(-1, max(n, 1)) for _ in range(3)] for _ in range(n)])
    lists = lists.reshape(n, 3) if n else torch.zeros(0, 3, dtype=torch.int64)
    return ops.normalized_adjacency(lists, num_nodes=n)


def _rows(random: random.Random, *shape: int) -> Tensor:
    torch.manual_seed(random.randrange(2**31))
    return torch.randn(*shape)


def _lists(random: random.Random, n: int, k: int) -> Tensor:
    torch.manual_seed(random.randrange(2**31))
    return torch.randint(-1, max(1, n), (n, k))


def _valid(random: random.Random) -> tuple[str, Arguments]:
    """An operator and arguments that it takes."""
    n, c, k = (
        random.choice((0, 1, 2, 7, 33)),
        random.choice((1, 2, 5, 16)),
        random.choice((1, 2, 4)),
    )
    name = random.choice(sorted(_CALLS))
    x, g = _rows(random, n, c), None
    if name in ("add", "spmm", "quadratic_form", "neuralef_loss", "sddmm"):
        g = _graph(random, n)
    made: Arguments = {
        "knn": lambda: {
            "features": x, "k": k,
            "metric": random.choice(("cosine", "euclidean", "inner_product")),
            "segments": random.choice((None, torch.tensor([0, n // 2, n]))),
            "database": None, "include_self": random.random() < 0.5,
            "check_finite": random.random() < 0.5,
        },
        "normalized_adjacency": lambda: {
            "indices": _lists(random, n, k), "weights": random.choice((None, _rows(random, n, k))),
            "num_nodes": n, "symmetrize": random.choice(("mean", "union")), "clamp_min": 0.0,
            "check_finite": random.random() < 0.5,
        },
        "kappa": lambda: {
            "indices": _lists(random, n, k), "weights": random.choice((None, _rows(random, n, k))),
            "pixel_indices": _lists(random, n, 2), "num_nodes": n, "alpha": 0.3, "clamp_min": 0.0,
        },
        "feature_kappa": lambda: {
            "features": x, "k": k, "pixel_indices": random.choice((None, _lists(random, n, 2))),
            "alpha": 0.3, "segments": None,
        },
        "neighbour_similarities": lambda: {"features": x, "indices": _lists(random, n, k)},
        "add": lambda: {"graph_a": g, "graph_b": _graph(random, n), "alpha": 0.3},
        "spmm": lambda: {"graph": g, "x": x},
        "sddmm": lambda: {"graph": g, "x": x, "y": _rows(random, n, c)},
        "quadratic_form": lambda: {"psi": x, "graph": g, "phi": random.choice((None, x))},
        "neuralef_loss": lambda: {"psi": x, "graph": g, "beta": 0.08, "t": 0.01},
        "linear_attention": lambda: {
            "q": _rows(random, 2, 1, n, c), "k": _rows(random, 2, 1, n, c),
            "v": _rows(random, 2, 1, n, c), "feature_map": random.choice(("elu", "softmax")),
            "mask": random.choice((None, torch.ones(2, n, dtype=torch.bool))), "eps": 1e-6,
        },
    }[name]()  # fmt: skip
    return name, made


_CALLS: dict[str, Callable] = {
    name: getattr(ops, name) for name in ops.__all__ if name != "CSRGraph"
}

_NUMBERS = (
    -1, 0, 1, 3, 2**31, 2**40, 2**62, 2**63, -(2**63), 10**30, 0.5, float("nan"), float("inf"),
    "1", None, True, [], torch.tensor(2), torch.tensor([1, 2]), torch.tensor(0.5), 1j,
)  # fmt: skip


def _odd_tensor(random: random.Random, t: Tensor) -> Any:
    """In one way unlike ``t``."""
    dtypes = (
        torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int32,
        torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn,
    )  # fmt: skip
    special = random.choice((float("nan"), float("inf"), -float("inf"), 1e38, -1e38, 1e-45, 0.0))
    number = random.choice((-1, -2, 2**31 - 1, -(2**31), 10**6))

    def filled() -> Tensor:
        t_ = t.clone()
        if t_.numel():
            place = random.randrange(t_.numel())
            floating = t_.is_floating_point()
            t_.view(-1)[place] = special if floating else number if t_.dtype != torch.bool else True
        return t_

    made: Callable[[], Any] = random.choice(
        (
            lambda: t.to(random.choice(dtypes)), lambda: t.to(random.choice(dtypes)),
            lambda: t.to("meta"), lambda: t.mT if t.ndim > 1 else t[None],
            lambda: t[..., ::2], lambda: t.flip(0) if t.ndim else t,
            lambda: t[:1].expand(t.shape) if t.ndim and t.shape[0] else t[None],
            lambda: t.repeat_interleave(2, -1)[..., ::2] if t.ndim else t, filled, filled, filled,
            lambda: t.new_empty(0), lambda: t[..., :0], lambda: t[None], lambda: t.flatten(),
            lambda: t.clone().as_subclass(Sub), lambda: torch.nn.Parameter(t.float()),
            lambda: t.float().requires_grad_(), lambda: t.to_sparse(), lambda: None, lambda: "x",
            lambda: t.numpy() if not t.requires_grad else t, lambda: t.tolist(), lambda: 3,
            lambda: torch._efficientzerotensor(t.shape) if t.is_floating_point() else t,
            lambda: t.float().neg_view() if hasattr(t, "neg_view") else torch._neg_view(t.float()),
            lambda: t.new_empty(()).expand(3, 2**40) if t.ndim == 2 else t,
            lambda: t.new_zeros(1).as_strided(t.shape, [0] * t.ndim),
        )
    )  # fmt: skip
    return made()


def _odd_graph(random: random.Random, graph: ops.CSRGraph) -> Any:
    offsets, columns, values = (t.clone() for t in graph.tensors())
    kind = random.randrange(9)
    if kind == 0:
        return None
    if kind == 1:
        return graph.to_torch()
    if kind == 2:
        return graph.to("meta")
    if kind == 3 and len(columns):
        columns[random.randrange(len(columns))] = random.choice((-1, 2**31 - 1, graph.num_nodes))
    elif kind == 4:
        offsets[random.randrange(len(offsets))] = random.choice((-1, 2**40, len(columns) + 1))
    elif kind == 5:
        values = values.double()
    elif kind == 6:
        values = values[:-1]
    elif kind == 7 and len(values):
        values[0] = random.choice((float("nan"), float("inf")))
    else:
        values = values.requires_grad_()
    return ops.CSRGraph(offsets, columns, values, graph.num_nodes, graph.symmetric)


def _odd(random: random.Random, given: Any) -> Any:
    if isinstance(given, Tensor):
        return _odd_tensor(random, given)
    if isinstance(given, ops.CSRGraph):
        return _odd_graph(random, given)
    if isinstance(given, str):
        return random.choice(("", "Cosine", "x", None, 1))
    if isinstance(given, bool):
        return random.choice((0, 1, None, "x", True, False))
    return random.choice(_NUMBERS)


def _outcome(name: str, arguments: Arguments) -> Any:
    """The result, or the error that a user may see."""
    torch.manual_seed(0)
    try:
        return _CALLS[name](**arguments)
    except (ValueError, TypeError, NotImplementedError) as error:
        return error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return MemoryError()


#: What may stand for an argument in a message: several at once, parts of a graph.
_ALSO = ("row_offsets", "columns", "values", "graph", "expected", "not differentiable")


def _check_error(name: str, arguments: Arguments, error: Exception) -> None:
    text = str(error)
    known = [*arguments, *_ALSO]
    assert any(re.search(rf"\b{re.escape(word)}\b", text) for word in known), f"{name}: {text}"
    assert len(text) < 2000


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, ops.CSRGraph):
        return list(result.tensors())
    return list(result) if isinstance(result, tuple) else [result]


def _touch(name: str, result: Any) -> None:
    """Read all of a result and go back through it: what crashes late, crashes here."""
    for tensor in _tensors(result):
        if tensor.device.type != "meta":
            tensor.detach().sum() if tensor.dtype != torch.bool else None
    floating = [t for t in _tensors(result) if t.requires_grad and t.device.type == "cpu"]
    if floating and name not in ("knn", "feature_kappa"):  # they refuse there
        sum(t.double().sum() for t in floating).backward()


def _same(a: Any, b: Any) -> None:
    for one, two in zip(_tensors(a), _tensors(b), strict=True):
        assert one.dtype == two.dtype
        assert one.shape == two.shape
        if one.device.type == "meta" or not one.is_floating_point():
            continue
        assert torch.equal(one.isnan(), two.isnan()), "NaN in other places than the reference's"
        tolerance = {torch.float16: 2e-2, torch.bfloat16: 5e-2}.get(one.dtype, 1e-3)
        torch.testing.assert_close(
            one.detach(), two.detach(), atol=tolerance, rtol=tolerance, equal_nan=True
        )


def operators(folder: Path) -> Attempt:
    """Against the reference: both refuse, or both give the same."""

    def attempt(random: random.Random) -> str:
        name, arguments = _valid(random)
        if random.random() < 0.9:
            for _ in range(random.choice((1, 1, 2))):
                place = random.choice(sorted(arguments))
                if arguments[place] is not None or random.random() < 0.2:
                    try:
                        arguments[place] = _odd(random, arguments[place])
                    except (ValueError, TypeError, RuntimeError):  # that cannot be made
                        return "refused"
        if random.random() < 0.05:  # the same memory twice
            tensors = [key for key, value in arguments.items() if isinstance(value, Tensor)]
            if len(tensors) > 1:
                arguments[tensors[0]] = arguments[tensors[1]]
        found = _outcome(name, arguments)
        with backends.backend("reference"):
            expected = _outcome(name, arguments)
        if MemoryError in (type(found), type(expected)):
            return "out of memory"  # asked for as many neighbours, which need their place
        refused = isinstance(found, Exception)
        assert refused == isinstance(expected, Exception), f"{name}: {found!r}, not {expected!r}"
        if refused:
            _check_error(name, arguments, found)
            return "refused"
        _same(found, expected)
        _touch(name, found)
        return "taken"

    return attempt
