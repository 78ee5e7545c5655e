"""What is said about an extension that is missing: the reason, and once where it is slower."""

from __future__ import annotations

import importlib
import json
import os
import sys
import warnings

import pytest
import torch

from nefkern import backends, info
from nefkern.ops import knn, normalized_adjacency, spmm

FAILED = "against PyTorch 2.11.0: csrc/a.cpp:3:2: error: no such thing"


@pytest.fixture
def package(monkeypatch, tmp_path):
    """The package's folder as installed, empty, and its extension not to be found."""
    monkeypatch.setattr(backends, "PACKAGE", tmp_path)
    monkeypatch.delitem(sys.modules, "nefkern._C", raising=False)
    find = importlib.import_module

    def without(name: str):
        if name == "nefkern._C":
            raise ModuleNotFoundError(name)
        return find(name)

    monkeypatch.setattr(importlib, "import_module", without)
    return tmp_path


def record(package, reason=FAILED):
    (package / "_build.json").write_text(json.dumps({"reason": reason}))


def not_built() -> str:
    return backends.native_module.__wrapped__()


def test_the_reason_is_the_builds_first_error(package):
    record(package)
    assert not_built() == f"the extension is not built: {FAILED}"


def test_a_folder_that_was_not_installed_is_told(package):
    assert "this folder was not installed (pip install . builds it)" in not_built()


def test_a_module_of_another_python_is_named(package):
    (package / "_C.cpython-39-other.so").touch()
    assert "is built for another Python (_C.cpython-39-other.so)" in not_built()


@pytest.mark.parametrize("text", ["", "[]", "{}", "\0"])
def test_a_record_that_cannot_be_read_is_none(package, text):
    (package / "_build.json").write_text(text)
    assert "was not installed" in not_built()


def test_a_record_is_of_the_past_once_a_module_was_built_since(package):
    record(package)
    module = package / "_C.cpython-311.so"
    module.touch()
    os.utime(module, (0, 0))
    assert backends.failed_build() == FAILED
    os.utime(module)
    os.utime(package / "_build.json", (0, 0))
    assert backends.failed_build() is None


def test_info_tells_of_a_build_that_failed_since(monkeypatch, capsys):
    if isinstance(backends.native_module(), str):
        pytest.skip(backends.native_module())
    monkeypatch.setattr(backends, "failed_build", lambda: FAILED)
    assert info.main([]) == 0
    assert f"outdated     the last installation built none: {FAILED}" in capsys.readouterr().out


@pytest.fixture
def reason(monkeypatch):
    """Set this to the reason why no compiled kernel can run."""
    holder = {"why": f"the extension is not built: {FAILED}"}
    monkeypatch.setattr(
        backends, "why_not", lambda name: None if name == "reference" else holder["why"]
    )
    monkeypatch.delenv("NEFKERN_BACKEND", raising=False)
    backends.warn_of_reference.cache_clear()
    yield holder
    backends.warn_of_reference.cache_clear()


def warned(function) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [str(one.message) for one in caught if one.category is RuntimeWarning]


def test_the_first_call_that_is_slower_for_it_says_so_once(reason):
    rows = torch.randn(8, 3)
    found = warned(lambda: knn(rows, 2))
    assert len(found) == 1
    assert FAILED in found[0]
    assert "NEFKERN_NATIVE=require" in found[0]
    graph = normalized_adjacency(knn(rows, 2)[1], num_nodes=8)
    assert not warned(lambda: spmm(graph, rows))


def test_a_build_that_is_no_use_here_is_not_asked_what_it_said(reason):
    reason["why"] = "the extension does not load: undefined symbol"
    (found,) = warned(lambda: knn(torch.randn(8, 3), 2))
    assert "undefined symbol" in found
    assert "NEFKERN_NATIVE" not in found


def test_what_no_kernel_would_take_is_no_reason_to_complain(reason):
    assert not warned(lambda: knn(torch.randn(8, 3).double(), 2))
    assert warned(lambda: knn(torch.randn(8, 3), 2))


def test_who_asks_for_the_reference_is_not_told(reason, monkeypatch):
    def forced():
        with backends.backend("reference"):
            knn(torch.randn(8, 3), 2)

    assert not warned(forced)
    monkeypatch.setenv("NEFKERN_BACKEND", "reference")
    assert not warned(lambda: knn(torch.randn(8, 3), 2))


@pytest.mark.parametrize("chosen", backends.CHOSEN)
def test_nor_who_left_the_extension_out(reason, chosen):
    reason["why"] = f"the extension is not built: {chosen}"
    assert not warned(lambda: knn(torch.randn(8, 3), 2))


H200, A100, RTX3090, RTX5090 = (9, 0), (8, 0), (8, 6), (12, 0)


@pytest.mark.parametrize(
    ("architectures", "gpu", "runs"),
    [
        ("90a-real", H200, True),
        ("90a-real", A100, False),
        ("90a-real,90a-virtual", RTX5090, False),
        ("80-real", A100, True),
        ("80-real", RTX3090, True),
        ("86-real", A100, False),
        ("80-real", H200, False),
        ("80-real,80-virtual", H200, True),
        ("100f-real", (10, 3), True),
        ("100f-virtual", RTX5090, False),
        ("80-real,86-real,89-real,90a-real,100-real,100-virtual", RTX5090, True),
        ("80-real,86-real,89-real,90a-real,100-real", RTX5090, False),
    ],
)
def test_kernels_run_on_the_gpus_they_were_built_for(monkeypatch, architectures, gpu, runs):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "a GPU")
    reason = backends._why_not_these_gpus(architectures)
    assert (reason is None) == runs
    if not runs:
        assert f"TORCH_CUDA_ARCH_LIST={gpu[0]}.{gpu[1]}" in reason
        assert architectures in reason
