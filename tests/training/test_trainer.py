"""Training: repeatable, resumable to the bit, and nothing lost by kills, disks and memory."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from nefkern.data import TrainLoader
from nefkern.images.graph import kappa
from nefkern.runtime import files, tensor_files
from nefkern.runtime.errors import UserError
from nefkern.segmentation.segmenter import Segmenter
from nefkern.segmentation.upsample import upsample_at
from nefkern.segmentation.windows import Replay
from nefkern.training.interrupts import Interrupts
from nefkern.training.options import TrainOptions
from nefkern.training.runs import CHECKPOINT, CONFIG, FEATURES, METRICS, Run
from nefkern.training.step import TrainingStep
from nefkern.training.trainer import Trainer
from tests.training.outcomes import assert_same, outcome, stop_after

THREADS = torch.get_num_threads()


@pytest.fixture
def all_threads():
    torch.set_num_threads(THREADS)


def start(options: TrainOptions) -> Trainer:
    return Trainer(options, Run.create(options))


def test_a_run_falls_and_records_all(tiny):
    options = tiny()
    last = start(options).train()
    run = Run(options.out)
    rows = run.metrics()
    assert [row["step"] for row in rows] == list(range(1, 16))
    assert [row["epoch"] for row in rows] == [1] * 5 + [2] * 5 + [3] * 5
    assert last == rows[-1]
    keys = {
        "loss", "trace", "penalty", "temperature", "live", "dead", "off_diagonal", "confidence",
        "lr", "images_per_second", "input_wait", "step", "epoch",
    }  # fmt: skip
    assert set(last) == keys
    assert rows[0]["temperature"] == 1.0
    assert rows[0]["lr"] == 1e-3
    assert 0.3 < last["temperature"] < 0.35
    assert 1e-5 < last["lr"] < 5e-5
    config = yaml.safe_load(run.path(CONFIG).read_text())
    assert config["options"]["backbone"] == "test_vit"
    assert config["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert list(run.path("events").glob("events.out.tfevents.*"))
    assert run.options() == options


def test_learning_lowers_the_objective(tiny):
    options = tiny(epochs=8, gumbel=False)
    start(options).train()
    losses = [row["loss"] for row in Run(options.out).metrics()]
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize("changes", [{}, {"gumbel": False, "feature_map": "elu", "amp": True}])
@pytest.mark.usefixtures("all_threads")
def test_same_seed_same_result_another_seed_another(tiny, tmp_path, changes):
    folders = [str(tmp_path / name) for name in "abc"]
    for folder, seed in zip(folders, (3, 3, 4), strict=True):
        start(tiny(out=folder, seed=seed, epochs=1, **changes)).train()
    assert_same(*folders[:2])
    assert outcome(folders[0])[1] != outcome(folders[2])[1]


@pytest.mark.parametrize(
    ("step", "changes"),
    [
        (1, {}),
        (5, {}),  # the end of an epoch
        (8, {"gumbel": False}),
        (15, {}),  # the very end
        (4, {"workers": 2}),
        (6, {"views": 2}),
        (7, {"augment": False, "amp": True}),
    ],
)
def test_resuming_equals_never_having_stopped(tiny, tmp_path, monkeypatch, step, changes):
    whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
    start(tiny(out=whole, **changes)).train()
    with monkeypatch.context() as patch:
        stop_after(step, patch)
        with pytest.raises(KeyboardInterrupt, match=f"checkpoint after step {step} is written"):
            start(tiny(out=broken, **changes)).train()
    assert len(Run(broken).metrics()) == step
    # What was written after the checkpoint by a run that was then killed is taken back.
    with open(Run(broken).path(METRICS), "a") as file:
        file.write(json.dumps({"step": step + 1, "loss": 7.0}) + "\n" + '{"step": 99, "lo')
    torch.manual_seed(99)
    start(tiny(out=broken, resume=True, **changes)).train()
    assert_same(whole, broken)
    assert len(list(Path(broken).glob("state-*.pt"))) <= 2, "of the last two checkpoints"


def test_resuming_a_finished_run_changes_nothing(tiny, tmp_path):
    options = tiny()
    start(options).train()
    before = outcome(options.out)
    trainer = start(tiny(resume=True))
    assert trainer.finished
    trainer.train()
    after = outcome(options.out)
    assert before[1] == after[1]
    assert all(torch.equal(before[0][k], after[0][k]) for k in before[0])


def test_equal_runs_have_equal_files(tiny, tmp_path):
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        start(tiny(out=str(folder), epochs=1)).train()
    names = [{path.name for path in folder.glob("state-*.pt")} for folder in folders]
    assert names[0] == names[1] != set()
    for name in (CHECKPOINT, *names[0]):
        first, second = (folder / name for folder in folders)
        assert first.read_bytes() == second.read_bytes(), name


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


# ---- longer


def lengthen(options: TrainOptions) -> Trainer:
    return Trainer(options, Run.create(options, longer=True))


def test_a_finished_run_is_trained_longer(tiny, caplog):
    """On from the point reached, by the schedule of the new total, and the record says so."""
    options = tiny(epochs=1)
    start(options).train()
    before = Run(options.out).metrics()
    with caplog.at_level(logging.INFO):
        trainer = lengthen(tiny(epochs=2, resume=True))
    lr, temperature = 1e-5 + (1e-3 - 1e-5) / 2, 0.3 + 0.7 / 2  # half-way down the cosines
    assert (
        "2 epochs instead of 1: learning rate and temperature follow their cosines over all 2; "
        f"epoch 2 begins at {lr:.2g} and {temperature:.2f}"
    ) in caplog.text
    trainer.train()
    assert trainer.finished
    rows = Run(options.out).metrics()
    assert rows[:5] == before
    assert [(row["step"], row["epoch"]) for row in rows[5:]] == [(s, 2) for s in range(6, 11)]
    assert rows[5]["lr"] == pytest.approx(lr)
    assert rows[5]["temperature"] == pytest.approx(temperature)
    config = Run(options.out).config()
    assert config["options"]["epochs"] == 2
    assert config["lengthened"] == [{"after_step": 5, "epochs_before": 1}]
    Run.create(tiny(epochs=2, resume=True))
    lengthen(tiny(epochs=3, resume=True))
    assert Run(options.out).config()["lengthened"][1:] == [{"after_step": 10, "epochs_before": 2}]


def test_a_longer_run_resumes_as_if_never_stopped(tiny, tmp_path, monkeypatch):
    whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
    for folder in (whole, broken):
        start(tiny(out=folder, epochs=1)).train()
    lengthen(tiny(out=whole, epochs=2, resume=True)).train()
    with monkeypatch.context() as patch:
        stop_after(8, patch)
        with pytest.raises(KeyboardInterrupt):
            lengthen(tiny(out=broken, epochs=2, resume=True)).train()
    start(tiny(out=broken, epochs=2, resume=True)).train()
    assert_same(whole, broken)


def test_an_interrupted_run_is_trained_longer(tiny, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(KeyboardInterrupt):
            start(tiny(epochs=1)).train()
    lengthen(tiny(epochs=2, resume=True)).train()
    assert [row["step"] for row in Run(tiny().out).metrics()] == list(range(1, 11))


@pytest.mark.parametrize("change", [{"epochs": 1}, {"epochs": 3, "lr": 0.5}])
def test_longer_means_more_epochs_and_nothing_else(tiny, change):
    options = tiny(epochs=2)
    start(options).train()
    before = Run(options.out).path(CONFIG).read_text()
    with pytest.raises(UserError, match=r"--resume: this run had --(epochs 2, not 1|lr 0\.001)"):
        lengthen(tiny(resume=True, **change))
    assert Run(options.out).path(CONFIG).read_text() == before


def test_more_epochs_only_if_asked_for(tiny):
    """The option forgotten, or a row of ``reproduce``: not the run that is asked for."""
    start(tiny(epochs=1)).train()
    with pytest.raises(
        UserError,
        match=r"had --epochs 1, not 3; leave the option as it was, "
        r"train longer \(--resume --epochs 3\), or start anew",
    ):
        start(tiny(resume=True))


# ---- ψ of other shapes


def test_a_run_of_an_earlier_shape_of_psi(tiny, images):
    """Heads and MLP followed the backbone, and ``config.yaml`` says it in the words of then."""
    options = tiny(epochs=1)
    start(options).train()
    expected = Segmenter.load(options.out).maps(images).logits
    path = Path(options.out) / CONFIG
    config = yaml.safe_load(path.read_text())
    for name in ("heads", "mlp_hidden", "psi"):
        del config["options"][name]
    config["options"]["mlp_ratio"] = 1.5  # of 64 channels; 3 heads of 64 cover three maps
    path.write_text(yaml.safe_dump(config))
    assert torch.equal(Segmenter.load(options.out).maps(images).logits, expected)
    with pytest.raises(UserError, match="--resume: this run had --heads 3, not 18"):
        start(tiny(epochs=1, resume=True, heads=18))
    with pytest.raises(UserError, match="--resume: this run had --psi transformer, not conv"):
        start(tiny(epochs=1, resume=True, psi="convolution"))
    assert start(tiny(epochs=1, resume=True)).finished
    del config["backbone"]["dim"]  # then nobody can tell
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="its checkpoint does not fit this version of nefkern"):
        Segmenter.load(options.out)


@pytest.mark.parametrize("amp", [False, True])
def test_a_psi_of_convolutions(tiny, images, amp):
    """Trains, resumes and segments; ``images`` have another grid than the training crops."""
    options = tiny(psi="convolution", epochs=1, amp=amp)
    last = start(options).train()
    assert last["trace"] > 0
    assert start(tiny(psi="convolution", epochs=1, amp=amp, resume=True)).finished
    segmenter = Segmenter.load(options.out)
    maps = segmenter.maps(images)
    assert maps.logits.shape == (2, 8, 5, 7)
    alone = torch.cat([segmenter.maps(image[None]).logits for image in images])
    torch.testing.assert_close(maps.logits, alone, rtol=1e-2 if amp else 1e-5, atol=1e-2)
    assert segmenter(images[0]).shape == (70, 100)


def test_handlers_are_put_back(tiny):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    start(tiny(epochs=1)).train()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_handler_that_is_not_pythons_stays(monkeypatch):
    """``signal.signal`` gives None for it, and takes no None back."""
    before = signal.getsignal(signal.SIGTERM)
    real = signal.getsignal
    monkeypatch.setattr(signal, "getsignal", lambda n: None if n == signal.SIGTERM else real(n))
    interrupts = Interrupts()
    with interrupts.noted():
        assert real(signal.SIGTERM) is before
        signal.raise_signal(signal.SIGINT)
    assert interrupts.received
    assert real(signal.SIGTERM) is before


@pytest.mark.parametrize("at", [1, 4])
@pytest.mark.parametrize("part", ["_logits", "_kappa"])
def test_a_step_is_left_as_if_it_had_not_been_begun(tiny, monkeypatch, tmp_path, part, at):
    """On a processor it takes long; the noise that it drew is drawn again."""
    start(tiny(out=str(tmp_path / "whole"))).train()
    options = tiny()
    trainer, done, take = start(options), [], getattr(TrainingStep, part)

    def signalled(step, *args):
        done.append(part)
        if len(done) == at:
            torch.rand(3)
            os.kill(os.getpid(), signal.SIGTERM)
        return take(step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingStep, part, signalled)
        with pytest.raises(KeyboardInterrupt, match=f"the checkpoint after step {at - 1} is"):
            trainer.train()
    assert len(done) == at, "the step went on"
    assert len(Run(options.out).metrics()) == at - 1
    del trainer
    start(tiny(resume=True)).train()
    assert_same(Path(options.out), tmp_path / "whole")


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


@pytest.mark.parametrize(
    ("asked", "transformer", "standardize"),
    [(None, True, False), (None, False, True), (True, True, True), (False, False, False)],
)
def test_the_scale_of_the_input_is_fitted_where_the_maps_differ(asked, transformer, standardize):
    options = TrainOptions(standardize=asked)
    assert options.eigenfunction(transformer=transformer).standardize is standardize


@pytest.mark.parametrize("change", [{"lr": 0.5}, {"k": "17"}, {"epochs": 9}, {"backbone": "x"}])
def test_resume_with_other_options(tiny, change):
    start(tiny(epochs=1)).train()
    ((name, value),) = change.items()
    with pytest.raises(UserError, match=f"--resume: this run had --{name} .*, not {value}"):
        start(tiny(**{"epochs": 1, "resume": True, **change}))
    start(tiny(epochs=1, resume=True, pictures=7, checkpoint_seconds=3))  # decide no result


@pytest.mark.parametrize(
    "change", [{"high": "block:4"}, {"high": "keys"}, {"input_size": "native"}]
)
def test_resume_with_other_maps(tiny, change):
    start(tiny(epochs=1)).train()
    ((name, value),) = change.items()
    flag = name.replace("_", "-")
    with pytest.raises(UserError, match=f"--resume: this run had --{flag} .*, not {value}"):
        start(tiny(**{"epochs": 1, "resume": True, **change}))


def test_runs_from_before_input_sizes_see_images_as_they_did(tiny):
    options = tiny(epochs=1)
    start(options).train()
    run = Run(options.out)
    config = yaml.safe_load(run.path(CONFIG).read_text())
    assert config["options"].pop("input_size") == "auto"
    run.path(CONFIG).write_text(yaml.safe_dump(config))
    assert run.options().input_size == "crop"
    start(tiny(epochs=1, input_size="crop", resume=True))
    with pytest.raises(UserError, match="--resume: this run had --input-size crop, not auto"):
        start(tiny(epochs=1, resume=True))


def test_resume_with_the_feature_cache_elsewhere(tiny, tmp_path):
    """Where it lies does not matter; whether there is one does: its maps are rounded."""
    cached = {"epochs": 1, "views": 1, "feature_cache": str(tmp_path / "here")}
    start(tiny(**cached)).train()
    start(tiny(**cached | {"feature_cache": str(tmp_path / "there"), "resume": True}))
    with pytest.raises(UserError, match=r"--resume: this run had --feature-cache .*, not None"):
        start(tiny(**cached | {"feature_cache": None, "resume": True}))


def test_the_graph_can_look_at_all_maps(tiny):
    first = start(tiny(epochs=1)).train()
    other = start(tiny(epochs=1, graph_features="all", out=tiny().out + "-all")).train()
    assert 0 < other["trace"] != first["trace"]


def test_resume_where_there_is_nothing_yet_starts(tiny):
    options = tiny(epochs=1, resume=True)
    Run.create(options).write_config(options)  # killed before the first checkpoint
    start(tiny(epochs=1, resume=True, lr=0.5)).train()
    assert Run(options.out).options().lr == 0.5
    assert len(Run(options.out).metrics()) == 5


def test_resume_with_other_weights(tiny, tmp_path):
    import timm

    start(tiny(epochs=1)).train()
    config = yaml.safe_load((tmp_path / "run" / CONFIG).read_text())
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "w.pth")
    config["options"]["weights"] = str(tmp_path / "w.pth")
    (tmp_path / "run" / CONFIG).write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=r"--resume: the backbone's weights .* are not those"):
        start(tiny(epochs=1, resume=True, weights=str(tmp_path / "w.pth")))
    with pytest.raises(UserError, match="was trained on other weights of test_vit"):
        Segmenter.load(tmp_path / "run")


def test_resume_with_other_images(tiny, photos):
    start(tiny(epochs=1)).train()
    (photos / "images" / "train" / "3.png").unlink()
    with pytest.raises(UserError, match="--resume: the run was trained on 10 images, there are 9"):
        start(tiny(epochs=1, resume=True))


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


@pytest.mark.parametrize("content", ["", "3", "options: 3", "a: [", "options: {lr: 1}"])
def test_damaged_configuration(tiny, content):
    options = tiny(resume=True)
    Run.create(options)
    (Path(options.out) / CONFIG).write_text(content)
    with pytest.raises(UserError, match="not a run's configuration"):
        Run(options.out).options()


def test_no_run(tmp_path):
    for path in (tmp_path, tmp_path / "none", __file__):
        with pytest.raises(UserError, match="not a run folder"):
            Segmenter.load(path)
    options = TrainOptions(out=str(tmp_path / "new"))
    Run.create(options).write_config(options)
    with pytest.raises(UserError, match="holds no checkpoint yet"):
        Segmenter.load(tmp_path / "new")


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


def test_checkpoints_in_between(tiny, monkeypatch):
    steps = []
    original = Run.save
    monkeypatch.setattr(
        Run, "save", lambda self, w, s, step: (steps.append(step), original(self, w, s, step))[1]
    )
    start(tiny(epochs=1, checkpoint_seconds=0.0)).train()
    assert steps == [1, 2, 3, 4, 5, 5]


# ---- memory


def watch(monkeypatch, limit: int, at: int, error: Callable[[], Exception]) -> list[tuple]:
    """Record (epoch, image) of every step; from step ``at`` on, more than ``limit`` is too many."""
    seen: list[tuple] = []
    original = TrainingStep.__call__

    def stepping(self, images, progress, number, *graph):
        if len(images) > limit and number >= at:
            raise error()
        epoch = int(progress * self.options.epochs + 1e-9)
        names = [hashlib.sha1(image.numpy().tobytes()).hexdigest() for image in images]
        seen.extend((epoch, name) for name in names)
        return original(self, images, progress, number, *graph)

    monkeypatch.setattr(TrainingStep, "__call__", stepping)
    return seen


ERRORS = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
    "cpu": lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"),
    "python": MemoryError,
}


@pytest.mark.parametrize("kind", ERRORS)
def test_out_of_memory_halves_the_batch_and_loses_no_image(
    tiny, tmp_path, monkeypatch, kind, caplog
):
    with monkeypatch.context() as patch:
        all_images = watch(patch, 100, 0, MemoryError)
        start(tiny(out=str(tmp_path / "whole"), batch_size=1, epochs=2, k="8")).train()
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        seen = watch(patch, 2, 2, ERRORS[kind])
        start(tiny(batch_size=4, epochs=2)).train()
    assert "out of memory: the batch is halved to 2 images" in caplog.text
    assert seen == all_images, "every image once an epoch, in the same order"
    metrics = Run(tmp_path / "run").metrics()
    assert [row["step"] for row in metrics] == list(range(1, 10))  # 4 + 2 + 2 + 2, then five of 2


def test_out_of_memory_with_an_odd_batch_repeats_less_than_a_batch(tiny, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        all_images = watch(patch, 100, 0, MemoryError)
        start(tiny(out=str(tmp_path / "whole"), batch_size=1, epochs=1, k="8")).train()
    seen = watch(monkeypatch, 2, 2, MemoryError)
    start(tiny(batch_size=5, epochs=1)).train()
    assert set(seen) == set(all_images)
    assert len(seen) - len(set(seen)) == 1


def test_out_of_memory_with_one_image_is_the_end(tiny, monkeypatch):
    watch(monkeypatch, 0, 1, ERRORS["cuda"])
    with pytest.raises(UserError, match="out of memory with a single image: lower --crop"):
        start(tiny()).train()


def test_another_runtime_error_is_not_taken_for_it(tiny, monkeypatch):
    watch(monkeypatch, 0, 1, lambda: RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        start(tiny()).train()


# ---- what else goes wrong


def test_non_finite_loss_is_told_and_nothing_is_lost(tiny, monkeypatch):
    options = tiny(checkpoint_seconds=0.0)
    trainer = start(options)
    original = TrainingStep.__call__

    def spoiled(self, images, progress, number, *graph):
        if number == 8:
            self.psi.norm.weight.data.fill_(float("nan"))
        return original(self, images, progress, number, *graph)

    monkeypatch.setattr(TrainingStep, "__call__", spoiled)
    with pytest.raises(UserError, match="the loss is nan at step 8; a lower --lr may help"):
        trainer.train()
    weights, metadata = Run(options.out).load()
    assert metadata["step"] == "7"
    assert all(tensor.isfinite().all() for tensor in weights.values())


@pytest.mark.parametrize("workers", [0, 2])
def test_one_bad_image_is_reported_once_and_skipped(tiny, photos, caplog, workers):
    bad = photos / "images" / "train" / "4.png"
    bad.write_bytes(bad.read_bytes()[:200])
    with caplog.at_level(logging.WARNING):
        start(tiny(workers=workers)).train()
    reports = [r.getMessage() for r in caplog.records if str(bad) in r.getMessage()]
    assert len(reports) == 1, reports
    assert "skipped" in reports[0]
    assert len(Run(tiny().out).metrics()) == 15


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk that is always full")
def test_a_disk_that_fills_up_under_the_record_is_named(tiny, monkeypatch):
    trainer = start(tiny())
    with open("/dev/full", "ab", buffering=0) as full:
        monkeypatch.setattr(
            "nefkern.training.trainer.open", lambda *args, **kw: full, raising=False
        )
        record = trainer.run.path(METRICS)
        with pytest.raises(OSError, match=f"{os.strerror(errno.ENOSPC)}: '{record}'"):
            trainer.train()


@pytest.mark.parametrize(("cores", "processes", "loading"), [(1, 1, 0), (16, 2, 4), (64, 1, 8)])
def test_loading_processes_unasked(tiny, monkeypatch, cores, processes, loading):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert start(tiny(workers=None)).workers == loading
    assert start(tiny(workers=3, out=f"{tiny().out}-3")).workers == 3


@pytest.mark.parametrize("wait", [0.3, 0.01])
def test_a_stalling_input_is_told(tiny, monkeypatch, caplog, wait):
    """A second step's worth of time for every step, or hardly any, goes into loading."""
    original, loaded = TrainingStep.__call__, TrainLoader.__iter__

    def stepping(*args):
        row = original(*args)
        time.sleep(0.3)
        return row

    def loading(self):
        for images in loaded(self):
            time.sleep(wait)
            yield images

    monkeypatch.setattr(TrainingStep, "__call__", stepping)
    monkeypatch.setattr(TrainLoader, "__iter__", loading)
    with caplog.at_level(logging.INFO):
        last = start(tiny(epochs=1, workers=0)).train()
    assert (last["input_wait"] > 0.2) == (wait == 0.3)
    told = [r.getMessage() for r in caplog.records if "waiting for images" in r.getMessage()]
    assert len(told) == (wait == 0.3)
    assert all("--workers (now 0)" in line for line in told)


@pytest.mark.parametrize("workers", [0, 2])
def test_strict_makes_it_an_error(tiny, photos, workers):
    bad = photos / "images" / "train" / "4.png"
    bad.write_bytes(b"")
    with pytest.raises(UserError, match=str(bad)):
        start(tiny(strict=True, workers=workers)).train()


# ---- the trained run


def test_segmenter_gives_what_the_trainer_had(tiny, images):
    options = tiny(amp=True, epochs=1)
    trainer = start(options)
    trainer.train()
    segmenter = Segmenter.load(options.out)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features = trainer.backbone(images)
        hidden = trainer.psi.eval().hidden(features.concat, features.grid).float()
    logits = trainer.psi.head(hidden) / 0.3
    maps = segmenter.maps(images)
    assert maps.padded == (80, 112)
    assert maps.logits.shape == (2, 8, 5, 7)
    assert torch.equal(maps.logits.flatten(2).transpose(1, 2), logits.detach())
    assert torch.equal(maps.hidden.flatten(2).transpose(1, 2), hidden)
    assert torch.equal(maps.graph.flatten(2).transpose(1, 2), features.high)
    assert torch.equal(maps.concat.flatten(2).transpose(1, 2), features.concat)


def test_segmenter_of_resized_images_and_blocks_side_by_side(tiny, images):
    """Crops of 64 pixels seen at 80: cells of 12.8 pixels; F has two blocks."""
    options = tiny(epochs=1, input_size="80", high="block:3,block:5", views=1)
    trainer = start(options)
    trainer.train()
    assert (trainer.backbone.dim, trainer.backbone.concat_dim) == (128, 256)
    recorded = Run(options.out).config()["backbone"]
    assert recorded["high"] == "block:3,block:5"
    assert (recorded["input_size"], recorded["interpolation"]) == (80, "bicubic")
    segmenter = Segmenter.load(options.out)
    # Images of any size are seen, so that windows need not lie on a grid.
    assert (segmenter.patch, segmenter.window, segmenter.stride) == (1, 64, 43)
    features = trainer.backbone(images)
    maps = segmenter.maps(images)
    assert features.grid == maps.logits.shape[2:] == (5, 8)  # of 80 × 114, padded to 128
    assert maps.padded == (70, 128 * 100 / 114)
    # Images that training saw come from the run's cache, in half precision.
    rows = maps.graph.flatten(2).transpose(1, 2)
    torch.testing.assert_close(rows, features.high, rtol=1e-3, atol=1e-3)
    graph = segmenter.kappa(images, maps)
    want = kappa(rows, trainer.backbone.seen(images), (5, 8), options.graph())
    assert torch.equal(graph.columns, want.columns)
    assert torch.equal(graph.values, want.values)
    own = segmenter.kappa(images, maps, per_image=True)
    assert own.num_nodes == 80
    whole = upsample_at(maps.logits[0], maps.padded, torch.arange(70), torch.arange(100))
    assert torch.equal(segmenter.logits(images[0], window=100).argmax(0), whole.argmax(0))
    assert segmenter(images[0][:, :, :70]).shape == (70, 70)
    # What draws edges hears of cells in the image's own pixels: 80 of the network's are 70.
    predict, *cut = segmenter.at_training_scale(images[0])
    job = segmenter.refinable(Replay(predict), *cut, segmenter.training_scale(images[0]), name="")
    assert job.patch == pytest.approx(16 * 70 / 80, rel=0.01)


def test_segmenter_takes_every_form_of_an_image(tiny, photos, tmp_path):
    from PIL import Image

    options = tiny(epochs=1)
    start(options).train()
    segmenter = Segmenter.load(options.out)
    path = photos / "images" / "train" / "2.png"
    picture = Image.open(path)
    import numpy as np

    array = np.array(picture)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    expected = segmenter(path)
    assert expected.shape == (picture.height, picture.width)
    assert expected.dtype == torch.int64
    assert 0 <= expected.min() <= expected.max() < 8
    for form in (str(path), picture, array, tensor):
        assert torch.equal(segmenter(form), expected), type(form)
    (agreement,) = [(segmenter(tensor.float() / 255) == expected).float().mean()]
    assert agreement > 0.99
    small = tmp_path / "small.png"
    Image.new("RGB", (40, 15)).save(small)
    with pytest.raises(UserError, match=f"{small}: 40 × 15 pixels, expected at least one patch"):
        segmenter(small)
    for wrong in (torch.zeros(1, 3, 20, 20), np.zeros((20, 20)), np.zeros((20, 20, 3))):
        with pytest.raises(UserError, match="image: expected"):
            segmenter(wrong)
