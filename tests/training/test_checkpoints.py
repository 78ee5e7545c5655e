"""The run folder and its checkpoints: never half written, damage told, kills and full disks."""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from nefkern.runtime import files, tensor_files
from nefkern.runtime.errors import UserError
from nefkern.segmentation.segmenter import Segmenter
from nefkern.training.options import TrainOptions
from nefkern.training.runs import CHECKPOINT, CONFIG, FEATURES, Run
from tests.training.outcomes import outcome, start

# ---- the run folder


def test_existing_run_is_refused(tiny):
    options = tiny(epochs=1)
    start(options).train()
    before = outcome(options.out)[1]
    with pytest.raises(UserError, match=f"--out {options.out}: holds a run already; --resume"):
        Run.create(tiny())
    assert outcome(options.out)[1] == before


def test_folder_with_something_else_is_refused(tiny):
    options = tiny()
    Path(options.out).mkdir()
    (Path(options.out) / "diary.txt").write_text("dear")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        Run.create(options)
    file = Path(options.out) / "diary.txt"
    with pytest.raises(UserError, match="is a file; expected a folder"):
        Run.create(tiny(out=str(file)))


def test_an_error_before_training_leaves_the_folder_free(tiny):
    with pytest.raises(UserError, match=r"--k 999: expected fewer than the 32 rows"):
        start(tiny(k="999"))
    with pytest.raises(UserError, match="--num-eigenfunctions 33: expected at most 32"):
        start(tiny(num_eigenfunctions=33))
    with pytest.raises(UserError, match="--crop 15: expected at least 16, a patch"):
        start(tiny(crop=15))
    start(tiny(epochs=1)).train()


def test_no_run(tmp_path):
    for path in (tmp_path, tmp_path / "none", __file__):
        with pytest.raises(UserError, match="not a run folder"):
            Segmenter.load(path)
    options = TrainOptions(out=str(tmp_path / "new"))
    Run.create(options).write_config(options)
    with pytest.raises(UserError, match="holds no checkpoint yet"):
        Segmenter.load(tmp_path / "new")


@pytest.mark.parametrize("content", ["", "3", "options: 3", "a: [", "options: {lr: 1}"])
def test_damaged_configuration(tiny, content):
    options = tiny(resume=True)
    Run.create(options)
    (Path(options.out) / CONFIG).write_text(content)
    with pytest.raises(UserError, match="not a run's configuration"):
        Run(options.out).options()


# ---- checkpoints


def test_a_checkpoint_is_the_same_file_whenever_it_is_written(tmp_path):
    """The order of the metadata is drawn at every writing; three keys have six orders."""
    weights, contents = {"ψ.é": torch.ones(3), "b": torch.zeros(5).double()}, set()
    for _ in range(12):
        Run(tmp_path).save(weights, {"step": 1}, 1)
        contents.add(Run(tmp_path).path(CHECKPOINT).read_bytes())
    assert len(contents) == 1
    found, metadata = Run(tmp_path).load()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert metadata["step"] == "1"


def test_checkpoints_in_between(tiny, monkeypatch):
    steps = []
    original = Run.save
    monkeypatch.setattr(
        Run, "save", lambda self, w, s, step: (steps.append(step), original(self, w, s, step))[1]
    )
    start(tiny(epochs=1, checkpoint_seconds=0.0)).train()
    assert steps == [1, 2, 3, 4, 5, 5]


def test_how_far_a_run_is_costs_no_tensor(tiny, monkeypatch):
    """Nor the optimiser's state, but of checkpoints that have no epoch in their header."""
    options = tiny(epochs=2)
    start(options).train()
    run = Run(options.out)

    def refused(*_):
        raise AssertionError("read")

    with monkeypatch.context() as patch:
        patch.setattr(tensor_files, "unpacked", refused)
        patch.setattr(torch, "load", refused)
        assert run.epochs_done() == 2
        assert run.is_trained(options)
        assert Run(options.out + "-none").epochs_done() == 0
    weights, metadata = run.load()
    del metadata["epoch"]
    run.path(CHECKPOINT).write_bytes(tensor_files.packed(weights, metadata))
    assert run.epochs_done() == 2
    run.path(CHECKPOINT).write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match="not a readable checkpoint"):
        run.epochs_done()


@pytest.mark.parametrize("content", [b"", b"short", b"\0" * 500])
def test_damaged_checkpoint(tiny, content):
    options = tiny(epochs=1)
    start(options).train()
    run = Run(options.out)
    state = next(run.folder.glob("state-*.pt"))
    whole = state.read_bytes()
    state.write_bytes(content)
    with pytest.raises(UserError, match=f"--resume: {state} is damaged"):
        start(tiny(epochs=1, resume=True))
    state.unlink()
    with pytest.raises(UserError, match=f"--resume: {state} is missing"):
        start(tiny(epochs=1, resume=True))
    state.write_bytes(whole)
    run.path(CHECKPOINT).write_bytes(content)
    with pytest.raises(UserError, match=f"{run.path(CHECKPOINT)}: not a readable checkpoint"):
        start(tiny(epochs=1, resume=True))


# ---- kills and full disks


def save_forever(folder: str, saving) -> None:
    run = Run(folder)
    for step in itertools.count(1):
        saving.value = step
        tensors = {name: torch.full((300, 300), float(step)) for name in "ab"}
        run.save(tensors, {"step": step, "blob": torch.full((200_000,), float(step))}, step)


def test_a_kill_at_any_moment_leaves_a_loadable_checkpoint(tmp_path):
    dice = random.Random(0)
    context = multiprocessing.get_context("fork")
    run, steps = Run(tmp_path), []
    for _ in range(25):
        saving = context.RawValue("i", 0)
        saver = context.Process(target=save_forever, args=(str(tmp_path), saving))
        saver.start()
        last = dice.randint(1, 6)
        while saving.value < last:  # however long a busy machine takes
            time.sleep(1e-4)
        time.sleep(dice.uniform(0, 0.01))
        os.kill(saver.pid, signal.SIGKILL)
        saver.join()
        found = run.load()
        if found is None:
            continue
        weights, metadata = found
        step = int(metadata["step"])
        assert all((tensor == step).all() for tensor in weights.values())
        state = run.load_state(metadata)
        assert state["step"] == step
        assert (state["blob"] == step).all()
        steps.append(step)
    assert len(steps) > 10
    assert len(set(steps)) > 3, "killed at different moments"
    files.remove_parts(tmp_path)
    assert not list(tmp_path.glob(".*.part"))


def test_resume_removes_the_parts_that_a_kill_left(tiny):
    options = tiny(epochs=1)
    run = Run.create(options)
    run.write_config(options)
    parts = [run.folder / ".metrics.0.part", run.path(FEATURES) / "ab" / ".entry.0.part"]
    for part in parts:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(b"half")
    del run  # and its lock
    Run.create(tiny(epochs=1, resume=True))
    assert not any(part.exists() for part in parts)


@pytest.mark.parametrize("failing", range(4))
def test_a_full_disk_leaves_the_old_checkpoint(tiny, monkeypatch, failing):
    options = tiny(epochs=1)
    start(options).train()
    run = Run(options.out)
    before = outcome(options.out)[0]
    real, calls = os.fsync, iter(range(100))

    def full(descriptor):
        if next(calls) == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    new = {name: tensor + 1 for name, tensor in before.items()}

    def save_twice():
        run.save(new, {"step": 6}, 6)
        run.save(new, {"step": 7}, 7)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            save_twice()
    weights, metadata = run.load()
    expected = before if failing < 2 else new
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert metadata["step"] == ("5" if failing < 2 else "6")
    run.load_state(metadata)
    assert not list(run.folder.glob(".*.part"))
