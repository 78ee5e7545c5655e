"""The CRF over many images: the same results whoever computes them, and ends that are clean."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from nefkern.runtime.errors import UserError
from nefkern.segmentation.crf import crf
from nefkern.segmentation.mean_field import CRFParameters
from nefkern.segmentation.refinement import Job, Refiner, default_workers

pytest.importorskip("pydensecrf")

PATIENCE = 120  # seconds, for a busy machine


def job(number: int, height: int = 40, width: int = 50) -> Job:
    """Noise of a seed; three labels that are not 0, 1, 2."""
    generator = torch.Generator().manual_seed(number)
    image = torch.randint(256, (3, height, width), generator=generator).to(torch.uint8)
    probabilities = torch.randn(3, height, width, generator=generator).softmax(0)
    return Job(f"image-{number}", image, probabilities, torch.tensor([4, 9, 7]), number)


# The first takes longest, so that workers finish out of order.
SIZES = ((200, 180), (40, 50), (30, 30), (60, 20), (90, 90), (1, 1))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_are_those_of_the_crf_in_the_order_of_the_jobs(workers):
    jobs = [job(number, *size) for number, size in enumerate(SIZES)]
    refiner = Refiner(workers)
    with refiner(jobs) as results:
        found = list(results)
    assert [context for _, context in found] == list(range(len(SIZES)))
    for each, (labels, _) in zip(jobs, found, strict=True):
        best = crf(each.image, each.probabilities, all_labels=True).argmax(0)
        assert torch.equal(labels, each.labels[best])
    assert refiner.inferences == len(SIZES)
    assert refiner.seconds > 0


def test_parameters_reach_the_workers():
    each = job(0)
    found = []
    for parameters in (CRFParameters(), CRFParameters(iterations=1, gaussian_weight=0.1)):
        with Refiner(1, parameters)([each]) as results:
            found += [labels for labels, _ in results]
    assert not torch.equal(*found)


@pytest.mark.parametrize("workers", [1, 2])
def test_jobs_are_taken_as_results_are_handed_back(workers):
    taken = returned = most = 0

    def jobs():
        nonlocal taken, most
        for number in range(12):
            taken += 1
            most = max(most, taken - returned)
            yield job(number)

    with Refiner(workers)(jobs()) as results:
        for _ in results:
            returned += 1
    assert returned == 12
    assert most == workers + 2


@pytest.mark.parametrize("workers", [0, 1])
def test_a_failing_inference_names_its_image(workers):
    bad = CRFParameters(iterations="ten")
    with (
        pytest.raises(RuntimeError, match=r"image-5: the CRF failed \(TypeError: "),
        Refiner(workers, bad)([job(5)]) as results,
    ):
        list(results)
    assert not multiprocessing.active_children()


def test_a_worker_that_dies_names_what_it_may_have_died_of():
    def jobs():
        yield job(1)
        yield job(2)
        for worker in multiprocessing.active_children():
            worker.kill()
            worker.join()
        yield job(3)

    message = "CRF: a worker process died with one of these in hand: image-.*smaller --crf-workers"
    with pytest.raises(UserError, match=message), Refiner(1)(jobs()) as results:
        list(results)
    assert not multiprocessing.active_children()


def test_an_error_of_the_jobs_or_of_the_caller_ends_the_workers():
    def jobs():
        yield job(1)
        raise UserError("no such image")

    with pytest.raises(UserError, match="no such image"), Refiner(1)(jobs()) as results:
        list(results)
    with pytest.raises(ZeroDivisionError), Refiner(1)(map(job, range(9))) as results:
        raise ZeroDivisionError(next(results))
    assert not multiprocessing.active_children()


def test_wrong_input_is_told_before_it_travels():
    wrong = Job("image", job(0).image, torch.ones(2, 3, 3), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"\[K, 40, 50\]"), Refiner(1)([wrong]) as results:
        list(results)


@pytest.mark.parametrize(
    ("cores", "processes", "expected"), [(1, 1, 0), (2, 1, 1), (6, 1, 5), (64, 1, 8), (16, 4, 3)]
)
def test_default_number_of_workers(monkeypatch, cores, processes, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert default_workers() == Refiner(None).workers == expected


def test_a_worker_needs_no_torch():
    code = "import nefkern.segmentation.mean_field, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---- signals ----

ENDLESS = """
import itertools, sys, torch
from nefkern.runtime.errors import command
from nefkern.segmentation.refinement import Job, Refiner

def jobs():
    image = torch.randint(256, (3, 60, 60)).to(torch.uint8)
    for number in itertools.count():
        yield Job(str(number), image, torch.rand(4, 60, 60).softmax(0), torch.arange(4))

@command
def main():
    with Refiner(2)(jobs()) as results:
        for _ in results:
            print("one", flush=True)

if __name__ == "__main__":
    sys.exit(main())
"""


@pytest.fixture
def endless(tmp_path):
    """A program with two workers at work, in a process group of its own."""
    (tmp_path / "endless.py").write_text(ENDLESS)
    program = subprocess.Popen(
        [sys.executable, str(tmp_path / "endless.py")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Where the tests are a shell's background job, SIGINT is ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert [program.stdout.readline() for _ in range(4)] == ["one\n"] * 4
    yield program
    with contextlib.suppress(ProcessLookupError):
        os.killpg(program.pid, signal.SIGKILL)
    program.communicate()


def group_is_gone(group: int) -> bool:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("to_all", [True, False])
def test_an_interrupt_ends_it_in_a_line(endless, to_all):
    """Ctrl-C reaches the whole group; kill -INT the main process alone."""
    (os.killpg if to_all else os.kill)(endless.pid, signal.SIGINT)
    _, errors = endless.communicate(timeout=PATIENCE)
    assert errors == "interrupted\n"
    assert endless.returncode == 130
    assert group_is_gone(endless.pid)


def test_workers_do_not_outlive_a_killed_main_process(endless):
    endless.kill()
    endless.wait(PATIENCE)
    assert group_is_gone(endless.pid)
