"""A benchmark whose opponent is not installed races the others."""

from __future__ import annotations

import sys

import pytest
import torch

from bench import bench_knn, harness


@pytest.fixture
def none_installed(monkeypatch):
    for module in ("faiss", "sklearn.neighbors", "pyamg"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(harness, "absent", {})


@pytest.mark.parametrize(
    ("contestants", "package"),
    [
        (lambda x: bench_knn.faiss_flat(x, 2), "faiss-cpu"),
        (lambda x: bench_knn.faiss_flat(x, 2, database=x), "faiss-cpu"),
        (lambda x: bench_knn.sklearn_brute(x, 2), "scikit-learn"),
    ],
)
def test_an_absent_opponent_is_left_out_and_told(monkeypatch, none_installed, contestants, package):
    monkeypatch.setattr(bench_knn, "DEVICE", torch.device("cpu"))
    assert contestants(torch.randn(4, 3)) == {}
    assert harness.absent == {package: f"pip install {package}"}


def test_on_a_gpu_opponents_for_the_cpu_are_not_missed(monkeypatch, none_installed):
    monkeypatch.setattr(bench_knn, "DEVICE", torch.device("cuda"))
    x = torch.randn(4, 3)
    assert bench_knn.faiss_flat(x, 2) == bench_knn.sklearn_brute(x, 2) == {}
    assert harness.absent == {}
