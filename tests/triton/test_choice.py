"""When the Triton kernels run: for CUDA tensors without the extension, by name, never silently."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")
import triton

from nefkern import backends, ops
from nefkern.ops import registry
from nefkern.triton import configs
from tests.ops.graph_common import random_graph


def arguments(device: str) -> dict[str, tuple]:
    """A call of every operator."""
    offsets = torch.empty(5, dtype=torch.int64, device=device)
    indices = torch.empty(4, 2, dtype=torch.int32, device=device)
    graph = (offsets, indices[0], torch.empty(2, device=device))
    x, q = torch.empty(4, 6, device=device), torch.empty(1, 2, 4, 6, device=device)
    state, stats = q.new_empty(1, 2, 6, 6), q.new_empty(1, 2, 2, 6)
    return {
        "knn": (x, 2, "cosine", None, False, False, None, None),
        "normalized_adjacency": (indices, None, 4, "mean", 0.0),
        "add": (*graph, *graph, 1.0),
        "kappa": (indices, None, indices, 4, 0.3, 0.0),
        "kappa_padded": (indices, None, indices, 4, 0.3, 0.0),
        "spmm": (*graph, x, True),
        "sddmm": (*graph[:2], x, x),
        "quadratic_form": (*graph, x, None, True),
        "neuralef_loss": (*graph, x, 0.1, 0.01),
        "linear_attention": (q, q, q, None, "elu", 0.0),
        "normalized_adjacency_backward": (
            graph[2],
            indices,
            indices.float(),
            *graph[:2],
            "mean",
            0.0,
        ),
        "add_backward": (graph[2], *graph[:2], *graph[:2]),
        "linear_attention_backward": (q, q, q, q, None, state, stats, "elu", 0.0),
    }


def test_every_operator_runs_on_triton():
    assert registry.implemented().keys() == arguments("cpu").keys()
    assert all("triton" in found for found in registry.implemented().values())


@pytest.mark.parametrize("operator", arguments("cpu"))
def test_chosen_for_cuda_tensors_where_the_extension_is_not_built(monkeypatch, operator):
    """No GPU needed: the choice depends on the device's name alone."""
    monkeypatch.delenv("NEFKERN_BACKEND", raising=False)
    monkeypatch.setattr(
        backends, "why_not", lambda name: "not built" if name in ("cuda", "cpu") else None
    )
    triton, reference = (registry._kernels[operator][b][0] for b in ("triton", "reference"))
    with FakeTensorMode():
        assert registry.select(operator, *arguments("cuda")[operator]) is triton
        assert registry.select(operator, *arguments("cpu")[operator]) is reference
        with backends.backend("triton"):
            assert registry.select(operator, *arguments("cuda")[operator]) is triton


@pytest.mark.parametrize(("name", "device"), [("triton", "cpu"), ("cuda", "cpu"), ("cpu", "cuda")])
@pytest.mark.parametrize("operator", arguments("cpu"))
def test_tensors_elsewhere_are_refused_by_name(monkeypatch, operator, name, device):
    monkeypatch.setattr(backends, "why_not", lambda name: None)
    monkeypatch.setattr(backends, "interpreting", lambda: False)
    message = f"{operator}: backend '{name}' cannot take this call on device '{device}', with tenso"
    refused = pytest.raises(RuntimeError, match=message)
    with FakeTensorMode(), backends.backend(name), refused:
        registry.select(operator, *arguments(device)[operator])


def test_the_backward_pass_has_the_forward_passs_backend(monkeypatch):
    """Also where the block has ended: autograd's own threads never see it."""
    chosen = []
    select = registry.select

    def noted(name, *args):
        chosen.append((name, backends.current()))
        return select(name, *args)

    monkeypatch.setattr(registry, "select", noted)
    graph = random_graph(9, 3, symmetric=False)
    x, q = torch.ones(9, 2, requires_grad=True), torch.ones(1, 1, 3, 4, requires_grad=True)
    with backends.backend("reference"):
        results = ops.spmm(graph, x), ops.quadratic_form(x, graph), ops.linear_attention(q, q, q)
    sum(result.sum() for result in results).backward()
    assert {"spmm", "linear_attention_backward"} <= {name for name, _ in chosen}
    assert len(chosen) > 3
    assert {backend for _, backend in chosen} == {"reference"}


class Recorded:
    """In place of a kernel, and of Triton's autotuner of it: notes with what it was launched."""

    arg_names = ("x", "width", "BLOCK")

    def __init__(self, best_config=None):
        self.best_config, self.launches = best_config, []

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append(options)


@pytest.fixture
def tuned(monkeypatch):
    """A kernel whose second configuration is the fastest, as on a GPU that need not exist."""
    first, second = (triton.Config({"BLOCK": block}) for block in (16, 32))
    autotuner = Recorded(second)
    monkeypatch.setattr(configs, "interpreting", lambda: False)
    monkeypatch.setattr(triton, "autotune", lambda configs, key: lambda kernel: autotuner)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return configs.Tuned(Recorded(), [first, second], key=["width"]), autotuner


def launched_with(tuned, x=None, width=8):
    """BLOCK of a launch; None where the autotuner had it."""
    before = len(tuned.kernel.launches)
    tuned[(1,)](torch.ones(3) if x is None else x, width)
    after = tuned.kernel.launches
    return after[-1]["BLOCK"] if len(after) > before else None


def test_tiles_are_timed_once(tuned):
    """For a key and dtypes; from then on Triton's autotuner has no part in a launch."""
    tuned, autotuner = tuned
    assert launched_with(tuned) is None
    assert [launched_with(tuned) for _ in range(3)] == [32] * 3
    assert len(autotuner.launches) == 1
    assert launched_with(tuned, width=9) is None
    assert launched_with(tuned, torch.ones(3).half()) is None
    assert len(autotuner.launches) == 3


def test_no_tile_is_timed_where_none_may_be(tuned, monkeypatch):
    """Another tile sums in another order; and timing cannot be captured into a CUDA graph."""
    tuned, autotuner = tuned
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert launched_with(tuned) == 16
    assert autotuner.launches == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert launched_with(tuned) is None, "a capture decides nothing for later"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert launched_with(tuned) == 32, "what was found before may be captured"
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert launched_with(tuned) == 16, "whatever was found before"


@pytest.mark.parametrize("count", [1, 2])
def test_one_configuration_or_an_interpreter_needs_no_autotuner(count, monkeypatch):
    if count == 1:
        monkeypatch.setattr(configs, "interpreting", lambda: False)
    else:
        monkeypatch.setattr(configs, "interpreting", lambda: True)
    monkeypatch.setattr(triton, "autotune", None)
    found = [triton.Config({"BLOCK": block}) for block in (16, 32)][:count]
    assert launched_with(configs.Tuned(Recorded(), found, key=["width"])) == 16
