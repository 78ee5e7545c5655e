"""When the Triton kernels run: for CUDA tensors without the extension, by name, never silently."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")
from nefkern import backends, ops
from nefkern.ops import registry
from nefkern.triton import spmm as spmm_kernels
from nefkern.triton.configs import _may_be_timed
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


@pytest.mark.parametrize("operator", arguments("cpu"))
def test_tensors_elsewhere_are_refused_by_name(monkeypatch, operator):
    monkeypatch.setattr(backends, "why_not", lambda name: None)
    monkeypatch.setattr(backends, "interpreting", lambda: False)
    message = f"{operator}: backend 'triton' cannot take this call on device 'cpu'"
    with backends.backend("triton"), pytest.raises(RuntimeError, match=message):
        registry.select(operator, *arguments("cpu")[operator])


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


def test_no_tile_is_timed_where_none_may_be(monkeypatch):
    """Another tile sums in another order; and timing cannot be captured into a CUDA graph."""
    configs = spmm_kernels.CONFIGS
    assert spmm_kernels._tuned.early_config_prune is _may_be_timed
    assert _may_be_timed(configs, {}) == configs
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert _may_be_timed(configs, {}) == configs[:1]
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert _may_be_timed(configs, {}) == configs[:1]
