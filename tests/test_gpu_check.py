"""bench.gpu_check: a rehearsal on the processor, and stages that fail, die and hang."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")  # the model's rates are beside Triton's kernels
from bench import gpu_check
from bench.device_time import Work
from bench.gpu import (
    build,
    counters,
    operators,
    plan,
    predictions,
    process,
    suite,
    summary,
    supervise,
    tools,
)
from bench.gpu.document import Document
from bench.gpu.plan import Settings, Stage
from bench.gpu.worker import Skipped
from bench.roofline import training_step
from bench.roofline.cuda import cuda_kernels
from nefkern import backends
from nefkern.triton.rates import H200

FAULTS = "tests.gpu_check_faults"


@pytest.fixture
def settings(tmp_path) -> Settings:
    return Settings("cpu", "small", str(tmp_path / "out.json"))


def faulty(*cases: str, **changes) -> Stage:
    usual = {"share": 1.0, "patience": 30.0, "jobs": 1, "repeats": 0}
    return Stage("faults", FAULTS, cases, **{**usual, **changes})


def checked(stages, settings, budget=60.0) -> dict:
    gpu_check.check(stages, settings, budget)
    return json.loads(Path(settings.out).read_text("utf-8"))


def found(content: dict, stage: str = "faults") -> dict[str, dict]:
    return content["stages"][stage]["cases"]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---- faults ----


def test_what_fails_costs_its_own_case_alone(settings):
    cases = (
        "raises",
        "fine 1",
        "exits",
        "fine 2",
        "segfaults",
        "fine 3",
        "skips",
        "floods",
        "fine",
    )
    results = found(checked([faulty(*cases)], settings))
    assert {name: case["status"] for name, case in results.items()} == {
        "raises": "failed", "exits": "crashed", "segfaults": "crashed", "skips": "skipped",
        "floods": "crashed", **dict.fromkeys(("fine 1", "fine 2", "fine 3", "fine"), "passed"),
    }  # fmt: skip
    assert results["raises"]["why"] == "ValueError: a wrong number"
    assert "gpu_check_faults.py" in results["raises"]["traceback"]
    assert results["exits"]["why"] == "exit code 7"
    assert results["segfaults"]["why"] == "killed by signal 11"
    assert results["skips"]["why"] == "not here"
    assert results["floods"]["output"].endswith("the last words")
    assert len(results["floods"]["output"]) <= 4000
    assert all(case["first"] == 1 for case in results.values()), "figures before the fault"
    assert results["fine"]["second"] == 2


def test_a_case_that_hangs_is_ended_with_all_that_it_started(settings, monkeypatch):
    monkeypatch.setattr(supervise, "START", 5.0)
    results = found(checked([faulty("fine", "hangs", "fine 2", patience=1.0)], settings))
    assert results["hangs"]["status"] == "hung"
    assert not alive(results["hangs"]["child"])
    assert results["fine 2"]["status"] == "passed"


def test_a_stage_ends_at_its_share_of_the_time(settings):
    """The next one still has its own."""
    began = time.monotonic()
    stages = [faulty("fine", "hangs", "never", share=0.4), faulty("fine")]
    stages[1] = Stage(**{**vars(stages[1]), "name": "after"})
    content = checked(stages, settings, budget=11.0)
    assert time.monotonic() - began < 9
    results = found(content)
    assert [results[name]["status"] for name in ("fine", "hangs", "never")] == [
        "passed", "stopped", "not reached",
    ]  # fmt: skip
    assert not alive(results["hangs"]["child"])
    assert found(content, "after")["fine"]["status"] == "passed"


def test_without_time_no_stage_is_begun(settings):
    content = checked([faulty("fine")], settings, budget=4.0)
    assert content["stages"]["faults"]["why"].startswith("not begun: ")


def test_a_failed_case_is_repeated_alone(settings):
    results = found(checked([faulty("raises", "once", "exits", "fine", repeats=3)], settings))
    assert results["raises"]["repeated"]["status"] == "failed"
    assert results["raises"]["repeated"]["how"] == "alone"
    assert results["once"]["repeated"]["status"] == "passed"
    assert results["exits"]["repeated"]["status"] == "crashed"
    assert "repeated" not in results["fine"]


def test_a_failed_case_is_repeated_under_memcheck_where_it_is(settings, tmp_path, monkeypatch):
    checker = tmp_path / "compute-sanitizer"
    checker.write_text('#!/bin/sh\necho "checked: $*"\nwhile [ $1 != --error-exitcode ]; do shift; '
                       'done\nshift 2\nexec "$@"\n')  # fmt: skip
    checker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    on_gpu = Settings("cuda", "small", settings.out)
    repeated = found(checked([faulty("raises", repeats=1)], on_gpu))["raises"]["repeated"]
    assert (repeated["how"], repeated["status"]) == ("compute-sanitizer memcheck", "failed")
    assert repeated["output"].startswith("checked: --tool memcheck")


def test_what_json_does_not_know_is_null(settings):
    content = checked([faulty("computes")], settings)
    assert found(content)["computes"]["errors"] == {"out": None}
    assert found(content)["computes"]["path"] == "a"
    json.loads(Path(settings.out).read_text("utf-8"), parse_constant=pytest.fail)
    assert "computes" in summary.text(content)


def test_cases_beside_each_other(settings):
    names = [f"fine {number}" for number in range(6)]
    results = found(checked([faulty(*names, "exits", jobs=3)], settings))
    assert all(results[name]["status"] == "passed" for name in names)
    assert results["exits"]["status"] == "crashed"


def test_a_worker_that_cannot_start_costs_no_endless_loop(settings):
    stage = Stage("faults", "no.such.module", ("a", "b"), share=1.0, patience=5.0)
    results = found(checked([stage], settings))
    assert all(case["status"] == "failed" for case in results.values())
    assert "No module named" in results["a"]["why"]


def test_the_file_is_whole_after_every_figure(settings, monkeypatch):
    seen = []
    save = Document.save

    def saving(self):
        save(self)
        seen.append(json.loads(self.path.read_text("utf-8")))

    monkeypatch.setattr(Document, "save", saving)
    checked([faulty("fine")], settings)
    cases = [found(content).get("fine", {}) for content in seen if "faults" in content["stages"]]
    keys = [sorted(case) for case in cases if case]
    assert ["first", "status"] in keys
    assert ["first", "second", "status"] in keys


def test_interrupted_it_leaves_results_and_no_process(tmp_path):
    """By SIGTERM, as a machine that is taken back does it."""
    out = tmp_path / "out.json"
    code = (
        "import sys; from bench import gpu_check; from bench.gpu import plan\n"
        f"stage = plan.Stage('build', {FAULTS!r}, ('fine', 'hangs'), 1.0, 60.0)\n"
        "plan.stages = lambda settings: [stage]\n"
        f"sys.exit(gpu_check.main(['--device', 'cpu', '--out', {str(out)!r}]))"
    )
    running = process.start(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    child = None
    for _ in range(600):
        time.sleep(0.05)
        if out.exists():
            cases = json.loads(out.read_text("utf-8"))["stages"].get("build", {"cases": {}})[
                "cases"
            ]
            if child := cases.get("hangs", {}).get("child"):
                break
    running.send_signal(signal.SIGTERM)
    output, _ = running.communicate(timeout=20)
    assert running.returncode == 130, output
    assert "results so far are kept" in output
    assert f"results: {out}" in output
    assert not alive(child)
    assert (
        json.loads(out.read_text("utf-8"))["stages"]["build"]["cases"]["fine"]["status"] == "passed"
    )


# ---- the command ----


def test_a_mistake_is_told_in_a_line(tmp_path, capsys):
    out = ["--out", str(tmp_path / "out.json")]
    assert gpu_check.main([*out, "--budget", "3"]) == 2
    assert "--budget 3: expected more than 5 s" in capsys.readouterr().err
    assert gpu_check.main([*out, "--stages", "build,tests"]) == 2
    assert "got tests" in capsys.readouterr().err
    assert gpu_check.main([]) == 2
    assert "--out" in capsys.readouterr().err


def test_without_a_gpu_it_says_so(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    out = tmp_path / "out.json"
    assert gpu_check.main(["--out", str(out), "--budget", "60"]) == 1
    assert plan.NO_DEVICE in capsys.readouterr().out
    content = json.loads(out.read_text("utf-8"))
    assert content["stages"]["suite"]["why"] == plan.NO_DEVICE


def test_stages_have_their_names():
    for device in ("cpu", "cuda"):
        stages = plan.stages(Settings(device, "paper", ""))
        assert tuple(stage.name for stage in stages) == plan.NAMES
        assert all(len(set(stage.cases)) == len(stage.cases) > 0 for stage in stages)


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory) -> dict:
    """One rehearsal for all tests of it."""
    out = tmp_path_factory.mktemp("gpu_check") / "out.json"
    code = gpu_check.main(["--device", "cpu", "--out", str(out), "--budget", "300"])
    content = json.loads(out.read_text("utf-8"))
    assert code == 0, summary.text(content)
    return content


@pytest.mark.long
def test_a_rehearsal_reaches_every_stage(rehearsed):
    statuses = {
        name: {case["status"] for case in stage["cases"].values()}
        for name, stage in rehearsed["stages"].items()
    }
    assert tuple(statuses) == plan.NAMES
    assert statuses["counters"] == statuses["sanitizer"] == {"skipped"}
    for name in ("build", "operators", "opponents", "suite"):
        assert statuses[name] == {"passed"}, name
    assert found(rehearsed, "training")["captured amp"]["status"] == "skipped"
    for name in ("kernels", "training"):
        assert "passed" in statuses[name] <= {"passed", "skipped"}


@pytest.mark.long
def test_a_rehearsal_holds_every_operator_against_float64(rehearsed):
    cases = found(rehearsed, "operators")
    operators = set(plan.OPERATORS) - set(plan.ON_GPUS_ALONE)
    assert {name.split("/")[0] for name in cases} == operators
    for case in cases.values():
        assert case["bit_equal"] is True
        assert all(0 <= error < 0.02 for error in case["errors"].values())
    assert max(cases["spmm/cpu/float32/ragged"]["errors"].values()) > 0, "nothing was computed"


@pytest.mark.long
def test_a_rehearsal_measures(rehearsed):
    kernels = found(rehearsed, "kernels")["spmm/cpu/float32/small"]
    assert kernels["device"] > 0
    assert kernels["kernels"]["nefkern::spmm"]["launches"] == 1
    assert {entry["case"] for entry in rehearsed["entries"]} == {
        "spmm, float32", "kappa from neighbour lists",
    }  # fmt: skip
    step = found(rehearsed, "training")["whole amp"]
    assert 0 < step["busy share"] <= 1
    assert found(rehearsed, "suite")["tests"]["counts"]["passed"] > 0
    assert set(rehearsed["environment"]["rates"]["flops"]) == {"float32", "bfloat16"}


# ---- what is right ----


def test_a_wrong_result_is_found():
    """In any one entry, in a gradient, and where it is not a number."""
    exact = torch.arange(6.0, dtype=torch.float64).view(2, 3)
    found = exact.float()
    assert operators.error(found, exact) == 0
    found[1, 1] += 1e-3
    assert operators.error(found, exact) == pytest.approx(2e-4, rel=1e-3)
    found[0, 0] = float("nan")
    assert not operators.error(found, exact) <= operators.tolerance(found)
    with pytest.raises(AssertionError, match=r"shape \[3\], expected \[2, 3\]"):
        operators.error(found[0], exact)


@pytest.mark.parametrize("broken", ["result", "gradient", "second run"])
def test_a_wrong_kernel_fails_its_case(monkeypatch, broken):
    settings, calls = Settings("cpu", "small", ""), iter(range(100))
    real = operators.ops.quadratic_form

    def quadratic_form(psi, graph):
        out = real(psi, graph)
        if broken == "result":
            return out * (1 + 1e-3)
        if broken == "gradient":
            return out + 1e-3 * (out - out.detach())
        return out + 1e-9 * next(calls)

    monkeypatch.setattr(operators.ops, "quadratic_form", quadratic_form)
    words = {"result": "error beyond the tolerance: {'out'", "second run": "3 runs differ in",
             "gradient": "error beyond the tolerance: {'gradient of psi'"}  # fmt: skip
    with pytest.raises(AssertionError, match=re.escape(words[broken])):
        list(operators.run("quadratic_form/cpu/float32/ragged", settings))


def test_a_backend_that_cannot_take_a_call_is_skipped_with_its_words():
    with pytest.raises(Skipped):
        list(operators.run("knn cosine/cuda/float32/ragged", Settings("cpu", "small", "")))


# ---- build and tests ----


@pytest.mark.parametrize(
    ("architectures", "capability", "right"),
    [
        ("80-real,90a-real", (9, 0), True),
        ("90a-real", (8, 0), False),
        ("80-real", (8, 6), True),
        ("86-real", (8, 0), False),
        ("80-real", (9, 0), False),
        ("90a-real", (10, 0), False),
        ("80-real,100-virtual", (12, 0), True),
        ("100-real", (12, 0), False),
        ("100-virtual", (9, 0), False),
        ("80", (9, 0), True),  # both kinds
        ("100f-real", (10, 3), True),
        ("100f-real", (12, 0), False),
    ],
)
def test_which_devices_an_extension_serves(architectures, capability, right):
    assert backends.serves(architectures, capability) is right


def test_a_failed_build_is_told_by_its_first_error():
    output = (
        "[1/9] Building\nx.cpp:3:1: error: no such thing\nx.cpp:9:1: error: another\nninja: stop\n"
    )
    assert build.first_error(process.Finished(1, output)) == "x.cpp:3:1: error: no such thing"
    assert build.first_error(process.Finished(1, "no words of it\n")) == "no words of it"
    assert "took more than" in build.first_error(process.Finished(None, output))


def test_an_extension_that_does_not_serve_is_built_and_its_failure_told(settings, monkeypatch):
    said = iter(["not built", "not built"])
    monkeypatch.setattr(build, "unfit", lambda settings: next(said))
    commands = []

    def run(command, limit, environment):
        commands.append(command)
        return process.Finished(len(commands) - 1, "a.cu(3): error: no\n")

    monkeypatch.setattr(build.process, "run", run)
    steps, figures = build.extension(settings), {}
    figures |= next(steps) | next(steps)
    with pytest.raises(RuntimeError, match=r"a\.cu\(3\): error: no"):
        next(steps)
    assert figures["extension"] == "not built"
    assert figures["because"] == "not built"
    assert commands[1][:2] == ["cmake", "--build"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("tests/ops/test_add.py::test_a[cuda] PASSED            [ 10%]",
         ("tests/ops/test_add.py::test_a[cuda]", "PASSED")),
        ("[gw3] [ 20%] FAILED tests/ops/test_add.py::test_b[cuda-1] ",
         ("tests/ops/test_add.py::test_b[cuda-1]", "FAILED")),
        ("tests/ops/test_add.py::test_c SKIPPED (no GPU)        [ 30%]",
         ("tests/ops/test_add.py::test_c", "SKIPPED")),
        ("tests/ops/test_add.py::test_d[a b] ", None),
        ("FAILURES", None),
    ],
)  # fmt: skip
def test_outcomes_of_tests_are_read(line, expected):
    assert suite.outcome(line) == expected


# ---- predictions ----


def test_every_prediction_has_kernels_of_its_name():
    """By the sources: those of csrc/cuda, of Triton, and of CUB, which is not ours to look into."""
    cuda = "\n".join(path.read_text("utf-8") for path in (process.ROOT / "csrc/cuda").glob("*.cu*"))
    bounds = r"(?:__launch_bounds__\([^)]*\)\s+)?"
    names = set(re.findall(rf"__global__\s+(?:void\s+{bounds}|{bounds}void\s+)(\w+)\(", cuda))
    assert "spmm_rows" in names
    for (part, kernel), pattern in predictions.CUDA_SYMBOLS.items():
        known = {k.name for k in [*cuda_kernels(), training_step.sparse("bfloat16", 2)]
                 if k.part == part}  # fmt: skip
        assert kernel in known, "renamed in bench/roofline/cuda.py"
        found = [name for name in names if re.search(pattern, name)]
        assert found or "Radix" in pattern, f"{pattern}: no such kernel in csrc/cuda"
    known = {
        kernel.name for kernel in (*training_step.step(False), training_step.sparse("bfloat16", 2))
    }
    assert set(predictions.TRITON_SYMBOLS) <= known


@pytest.mark.parametrize("by", ["cuda", "triton"])
def test_the_models_kernels_are_those_of_a_call(by):
    for operator, dtype in plan.TIMED:
        kernels = predictions.kernels_of(operator, by, dtype)
        assert all(kernel.expected(H200) > 0 for kernel in kernels)
    (spmm,) = predictions.kernels_of("spmm", by, "float32")
    assert spmm.name.startswith("spmm, float32")
    whole = training_step.attention(True).moved
    assert (
        predictions.kernels_of("linear_attention elu", "triton", "bfloat16")[0].moved == whole / 2
    )
    assert predictions.expected([], H200) is None


def test_measured_kernels_stand_beside_their_predictions():
    kernels = predictions.kernels_of("knn cosine", "cuda", "float32")
    ran = {
        "void nefkern::cuda::estimate_tiles<true>(Args)": Work(2, 4e-3),
        "void nefkern::cuda::estimate_tiles<false>(Args)": Work(2, 2e-3),
        "void nefkern::cuda::rerank_rows<false>(Args)": Work(2, 8e-3),
        "void at::native::fill(int)": Work(2, 1.0),
    }
    beside = {one.name: one for one in predictions.compared(kernels, "cuda", ran, 2, H200)}
    estimates = beside["scores of the sample; scores, candidates"]
    assert estimates.measured == pytest.approx(3e-3)
    both = [k.expected(H200) for k in kernels if "scores" in k.name]
    assert estimates.predicted == pytest.approx(sum(both))
    assert beside["re-rank, sort"].measured == pytest.approx(4e-3)
    assert beside["thresholds"].measured is None


def test_the_summary_has_what_is_wrong_and_the_times_beside_the_predicted():
    compared = [{"name": "re-rank, sort", "predicted": 1e-3, "measured": 3e-3},
                {"name": "thresholds", "predicted": 1e-4, "measured": None}]  # fmt: skip
    content = {
        "environment": {"gpu": "NVIDIA H200", "torch": "2.11", "commit": "0123456789abc",
                        "rates": {"flops": {"bfloat16": 7.8e14}, "bandwidth": 4.3e12}},
        "seconds": 400.0, "budget": 480.0,
        "entries": [{"case": "knn", "contestant": "mm", "seconds": 0.01, "ratio": 4.0,
                     "dispatch": 2e-4}],
        "stages": {
            "operators": {"seconds": 60.0, "cases": {
                "spmm/cuda/float32/paper": {"status": "passed", "errors": {"out": 2e-7, "y": None}},
                "add/triton/float32/ragged": {
                    "status": "crashed", "why": "killed by signal 11",
                    "repeated": {"how": "compute-sanitizer memcheck", "status": "passed"}}}},
            "kernels": {"seconds": 30.0, "cases": {
                "knn cosine/cuda/float32/paper": {
                    "status": "passed", "device": 2.4e-3, "predicted": 1.6e-3, "dispatch": 5e-4,
                    "launches": 26.0, "compared": compared}}},
            "training": {"seconds": 9.0, "cases": {
                "whole amp": {"status": "passed", "step": 0.028, "predicted": 0.014,
                              "busy share": 0.9, "launches": 900.0,
                              "waits": {"cudaStreamSynchronize": 5.0}}}},
            "suite": {"cases": {}, "why": "not begun: 1.0 s were left"},
        },
    }  # fmt: skip
    lines = [re.sub(r" +", " ", line).strip() for line in summary.text(content).splitlines()]
    for line in (
        "NVIDIA H200, PyTorch 2.11, commit 0123456789: 400 s of 480",
        "measured: bfloat16 780 TFLOP/s, 4.3 TB/s",
        "operators 60.0 s 1 passed, 1 crashed",
        "suite 0.0 s not begun: 1.0 s were left",
        "crashed: operators: add/triton/float32/ragged: killed by signal 11",
        "compute-sanitizer memcheck: passed",
        "largest error, cuda float32 2.0e-07 spmm, paper, out",
        "knn cosine/cuda/float32/paper 2.400 ms 1.600 ms 1.50× 0.500 ms 26",
        "knn cosine/cuda: re-rank, sort 3.000 ms 1.000 ms 3.00×",
        "knn cosine/cuda: thresholds 0.100 ms",
        "knn mm 10.000 ms 4.00× host 0.200 ms",
        "step, whole amp 28.000 ms 14.000 ms 2.00× busy 90%, 900 launches, waits "
        "{'cudaStreamSynchronize': 5.0}",
    ):
        assert line in lines, "\n".join(lines)


# ---- ncu ----


def test_ncu_looks_first_where_the_model_is_furthest_off():
    content = {
        "stages": {
            "kernels": {
                "cases": {
                    "right": {"device": 10.0, "predicted": 10.0},
                    "slow": {"device": 9.0, "predicted": 3.0},
                    "short": {"device": 0.01, "predicted": 0.001},
                    "unpredicted": {"device": 5.0},
                }
            }
        }
    }
    assert counters.least_sure(content, "paper") == [
        "slow", "short", "right", "knn cosine/cuda/float32/paper",
    ]  # fmt: skip
    assert counters.least_sure({"stages": {}}, "paper")[0] == "knn cosine/cuda/float32/paper"


NCU = """==PROF== Connected to process 1
==PROF== Profiling "spmm_rows": 0%....50%....100% - 3 passes
"ID","Process ID","Kernel Name","dram__bytes.sum","gpu__time_duration.sum"
"","","","byte","nsecond"
"0","1","void spmm_rows<float>(Args)","71,000,000","990"
"""


def test_ncus_table_is_read():
    (row,) = counters.counted(NCU)
    assert row["kernel"] == "void spmm_rows<float>(Args)"
    assert row["memory bytes"] == 71e6
    assert row["seconds"] == pytest.approx(990e-9)
    assert row["registers"] is None
    assert counters.counted("==ERROR== no kernels") == []
    (row,) = counters.counted(NCU.replace("nsecond", "usecond"))
    assert row["seconds"] == pytest.approx(990e-6)


def ncu_that_says(tmp_path, monkeypatch, script: str) -> None:
    program = tmp_path / "ncu"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


def counting(tmp_path) -> dict:
    settings = Settings("cuda", "paper", str(tmp_path / "out.json"))
    gpu_check.Document(Path(settings.out), budget=1.0)
    figures = {}
    for found in counters.run("1", settings):
        figures |= found
    return figures


def test_counters_are_skipped_where_they_may_not_be_read(tmp_path, monkeypatch):
    ncu_that_says(tmp_path, monkeypatch, "echo '==ERROR== ERR_NVGPUCTRPERM - no permission'")
    with pytest.raises(Skipped, match=r"cannot read the counters: ==ERROR== ERR_NVGPUCTRPERM"):
        counting(tmp_path)


def test_a_metric_that_an_ncu_does_not_know_is_left_out(tmp_path, monkeypatch):
    (tmp_path / "table").write_text(NCU)
    ncu_that_says(
        tmp_path, monkeypatch,
        f"case \"$*\" in *lts__t_bytes.sum*) echo '==ERROR== Failed to find metric "
        f"lts__t_bytes.sum';; *--clock-control\\ none*) cat '{tmp_path}/table';; esac",
    )  # fmt: skip
    figures = counting(tmp_path)
    assert figures["call"] == "knn cosine/cuda/float32/paper"
    assert figures["launches"][0]["memory bytes"] == 71e6


def test_tools_are_found_in_the_toolkit(tmp_path, monkeypatch):
    program = tmp_path / "bin" / "ncu"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert tools.find("ncu") == str(program)
