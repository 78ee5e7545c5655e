"""bench.report: the README's table is what the published results say."""

from __future__ import annotations

import json

import pytest

from bench import report
from bench.harness import Rates, Work
from nefkern.runtime.errors import UserError


def entry(case, contestant, seconds, ratio=None, rows=100, **extra):
    return {
        "case": case, "contestant": contestant, "seconds": seconds, "ratio": ratio, "rounds": 3,
        "sizes": {"N": rows}, "peak_bytes": 3 << 20, "floor": None, **extra,
    }  # fmt: skip


@pytest.fixture
def results(tmp_path):
    document = {
        "environment": {
            "gpu": None, "processor": "a processor", "threads": 2, "torch": "2.0",
            "rates": {"flops": {"float32": 1e11, "bfloat16": 2e11}, "bandwidth": 2e10},
        },
        "entries": [
            entry("knn", "nefkern", 0.5, floor=0.25),
            entry("knn", "faiss", 1.0, 2.0),
            entry("scaling, knn, N = 100", "nefkern", 0.1),
            entry("scaling, knn, N = 100", "torch.mm alone", 0.2, 2.0),
        ],
    }  # fmt: skip
    path = tmp_path / "results.json"
    path.write_text(json.dumps(document))
    return path


def test_readme_shows_the_published_results():
    readme = report.README.read_text("utf-8")
    published = report.merge([report.PUBLISHED])
    assert report.written(readme, published) == readme


def test_table_has_one_row_a_case(results):
    rows = report.table(report.merge([results])).splitlines()[4:]
    assert rows == ["| knn | 500 ms | 50% | 3 MB | faiss 2.0× (3 MB) |"]


@pytest.fixture
def gpu_results(tmp_path):
    """As bench.gpu_check leaves them."""
    document = {
        "device": "cuda",
        "environment": {
            "gpu": "NVIDIA H200", "torch": "2.0",
            "rates": {"flops": {"float32": 5e13, "bfloat16": 7.8e14}, "bandwidth": 4.3e12},
        },
        "entries": [
            entry("knn", "nefkern", 0.002, floor=0.0005, dispatch=0.0003),
            entry("knn", "torch.mm + topk", 0.01, 5.0, dispatch=0.0001),
        ],
        "stages": {
            "operators": {"cases": {
                "a": {"status": "passed"}, "b": {"status": "hung"}, "c": {"status": "skipped"}}},
            "kernels": {"cases": {
                "knn/cuda": {"status": "passed", "device": 0.002, "predicted": 0.0016},
                "add/cuda": {"status": "passed", "device": 0.002}}},
            "training": {"cases": {"whole amp": {"step": 0.03, "predicted": 0.015}}},
        },
    }  # fmt: skip
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(document))
    return path


def test_the_second_table_has_the_gpus_times_beside_the_predicted(gpu_results):
    rows = report.gpu_table(gpu_results).splitlines()
    assert rows[0].startswith(
        "NVIDIA H200, PyTorch 2.0; measured: 50 in float32, 780 in bfloat16 TFLOP/s, 4.3 TB/s."
    )
    assert rows[4] == "| knn | 2 ms | 0.3 ms | 25% | 3 MB | torch.mm + topk 5.0× (3 MB) |"
    assert rows[8:] == [
        "| knn/cuda | 2 ms | 1.6 ms | 1.2× |",
        "| step, whole amp | 30 ms | 15 ms | 2.0× |",
        "",
        "Against float64: 1 cases right, 1 wrong.",
    ]


def test_without_a_gpu_the_second_table_says_so(tmp_path):
    assert report.gpu_table(tmp_path / "none.json") == report.NO_GPU


def test_a_run_on_a_gpu_is_published_and_a_rehearsal_is_not(gpu_results, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "PUBLISHED_GPU", tmp_path / "published-gpu.json")
    whole = json.loads(gpu_results.read_text("utf-8"))
    logged = json.loads(gpu_results.read_text("utf-8"))
    logged["stages"]["operators"]["cases"]["b"] |= {"output": "a path", "traceback": "another"}
    gpu_results.write_text(json.dumps(logged))
    report.publish_gpu(gpu_results)
    assert json.loads(report.PUBLISHED_GPU.read_text("utf-8")) == whole, "logs stay out"
    rehearsed = json.loads(gpu_results.read_text("utf-8")) | {"device": "cpu"}
    gpu_results.write_text(json.dumps(rehearsed))
    with pytest.raises(UserError, match="expected times measured on a GPU"):
        report.publish_gpu(gpu_results)
    gpu_results.write_text("{}")
    with pytest.raises(UserError, match=r"gpu\.json: expected what python -m bench\.gpu_check"):
        report.publish_gpu(gpu_results)


def test_a_later_file_takes_a_case_over(results, tmp_path):
    document = json.loads(results.read_text("utf-8"))
    document["entries"] = [entry("knn", "nefkern", 0.4), entry("knn", "faiss", 1.2, 3.0)]
    later = tmp_path / "later.json"
    later.write_text(json.dumps(document))
    cases = report.by_case(report.merge([results, later]))
    assert [e["seconds"] for e in cases["knn"]] == [0.4, 1.2]
    assert "scaling, knn, N = 100" in cases


@pytest.mark.drawn
def test_plots_are_drawn(results, tmp_path):
    document = report.merge([results])
    report.draw_ratios(document, tmp_path / "ratios.svg")
    assert report.draw_scaling(document, tmp_path / "scaling.svg")
    for name in ("ratios.svg", "scaling.svg"):
        assert "<svg" in (tmp_path / name).read_text("utf-8")


def test_a_file_of_something_else_is_named(tmp_path):
    path = tmp_path / "other.json"
    path.write_text("{}")
    with pytest.raises(UserError, match=r"other\.json: expected results of pytest bench"):
        report.merge([path])


def test_readme_without_markers_is_refused():
    with pytest.raises(UserError, match="expected the lines"):
        report.with_table("no markers", "table")


def test_floor_is_the_longer_of_compute_and_memory():
    rates = Rates({"float32": 100.0, "bfloat16": 200.0}, bandwidth=10.0)
    assert Work(20.0, {"float32": 100.0, "bfloat16": 200.0}).floor(rates) == 2.0
    assert Work(50.0, {"float32": 100.0}).floor(rates) == 5.0
