"""The extension built with CUDA: it imports, and its operators are there for CUDA tensors."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from nefkern import backends, ops
from nefkern.ops import registry

#: Operators with a CUDA kernel of their own; the others are made of these and of dense products.
KERNELS = ("knn_cuda", "normalized_adjacency", "add", "kappa", "kappa_padded", "spmm")
SERVED = ("knn", *KERNELS[1:], "quadratic_form", "neuralef_loss")


@pytest.fixture
def build_info() -> dict:
    native = backends.native_module()
    if isinstance(native, str):
        pytest.skip(native)
    if not native.build_info()["cuda"]:
        pytest.skip(f"built without CUDA: {native.build_info()['why_no_cuda']}")
    return native.build_info()


def test_build_info_tells_toolkit_and_architectures(build_info):
    assert build_info["cuda"].split(".")[0] == torch.version.cuda.split(".")[0]
    assert "-real" in build_info["cuda_architectures"]


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_registered_for_cuda(build_info, name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"nefkern_native::{name}", "CUDA")


def test_reason_is_told_where_it_cannot_run():
    native = backends.native_module()
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    reason = backends.why_not("cuda")
    if isinstance(native, str):
        assert reason == native
    elif native.build_info()["cuda"]:
        assert reason == "PyTorch finds no CUDA device"
    else:
        assert native.build_info()["why_no_cuda"] in reason


@pytest.mark.parametrize("name", SERVED)
def test_cuda_kernels_are_the_first_choice_on_a_gpu(monkeypatch, name):
    """No GPU needed: which function is chosen depends on the device's name alone."""
    monkeypatch.setattr(backends, "why_not", lambda name: None)
    with FakeTensorMode():
        offsets, columns = _int(5, torch.int64), _int(8, torch.int32)
        values, x = torch.empty(8, device="cuda"), torch.empty(4, 6, device="cuda")
        indices = torch.empty(4, 2, dtype=torch.int32, device="cuda")
        graph = (offsets, columns, values)
        arguments = {
            "knn": (x, 2, "cosine", None, False, False, None, None),
            "normalized_adjacency": (indices, None, 4, "mean", 0.0),
            "add": (*graph, *graph, 1.0),
            "spmm": (*graph, x, True),
            "kappa": (indices, None, indices, 4, 0.3, 0.0),
            "kappa_padded": (indices, None, indices, 4, 0.3, 0.0),
            "quadratic_form": (*graph, x, None, True),
            "neuralef_loss": (*graph, x, 0.1, 0.01),
        }[name]
        chosen = registry.select(name, *arguments)
        assert chosen is registry._kernels[name]["cuda"][0]
        wide = [a.double() if a is x or a is values else a for a in arguments]
        if name in ("knn", "add", "spmm", "quadratic_form", "neuralef_loss"):
            assert registry.select(name, *wide) is registry._kernels[name]["reference"][0]


@pytest.mark.parametrize("metric", ["cosine", "euclidean", "inner_product"])
@pytest.mark.parametrize("among", ["own rows", "database"])
def test_knn_is_the_cuda_kernels_whatever_the_metric(monkeypatch, metric, among):
    monkeypatch.setattr(backends, "why_not", lambda name: None)
    with FakeTensorMode():
        x = torch.empty(4, 6, device="cuda")
        y, offsets = torch.empty(9, 6, device="cuda"), _int(3, torch.int64)
        others = (None, None) if among == "own rows" else (y, offsets)
        chosen = registry.select("knn", x, 2, metric, offsets, False, False, *others)
        assert chosen is registry._kernels["knn"]["cuda"][0]


def _int(size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="cuda")


def test_operators_trace_on_fake_cuda_tensors():
    """Forward only: autograd's engine asks the driver for the device."""
    with FakeTensorMode(shape_env=ShapeEnv()):
        indices = torch.empty(4, 2, dtype=torch.int32, device="cuda")
        graph = ops.normalized_adjacency(indices, num_nodes=4)
        graph = ops.add(graph, ops.kappa(indices, None, indices, num_nodes=4), 0.3)
        assert graph.symmetric
        assert graph.device.type == "cuda"
        psi = torch.empty(4, 6, device="cuda")
        y = ops.spmm(graph, psi.bfloat16())
        assert y.shape == (4, 6)
        assert (y.dtype, y.device.type) == (torch.bfloat16, "cuda")
        loss, r = ops.neuralef_loss(psi, graph, 0.1)
        assert loss.shape == ()
        assert r.shape == ops.quadratic_form(psi, graph).shape == (6, 6)
        assert r.device.type == "cuda"
