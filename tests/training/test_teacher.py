"""--teacher spectral: ψ learns the data set's eigenvectors, repeatable and resumable to the bit."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nefkern import eigenmaps, evaluate, segment, spectrum, summarize, train
from nefkern.runtime import distributed
from nefkern.runtime.errors import UserError
from nefkern.segmentation.segmenter import Segmenter
from nefkern.training.option_parsing import resolve
from nefkern.training.options import TrainOptions
from nefkern.training.runs import STAGES, Run
from nefkern.training.spectral import SpectralTrainer
from nefkern.training.teacher import FOLDER, check_data_set, indicator_rotation, regression_loss
from nefkern.training.trainer import Trainer
from tests.training.outcomes import assert_same, broken_off, start

K = 5


@pytest.fixture
def taught(tiny):
    """taught(**changes): options of a run of seconds with a teacher."""

    def make(**changes) -> TrainOptions:
        usual = {"teacher": "spectral", "num_eigenfunctions": K, "dataset_k": "8", "epochs": 2}
        return tiny(**usual | changes)

    return make


@pytest.mark.parametrize("loss", ["rows", "values"])
def test_psi_comes_to_agree_with_its_teacher(taught, loss):
    options = taught(epochs=12, gumbel=False, views=2, teacher_loss=loss)
    start(options).train()
    rows = Run(options.out).metrics()
    assert all({"regression", "cosine", "live"} <= set(row) for row in rows)
    assert not any("trace" in row for row in rows)
    assert sum(row["regression"] for row in rows[-5:]) < sum(row["regression"] for row in rows[:5])
    assert rows[-1]["cosine"] > 0.8 > rows[0]["cosine"] + 0.3


def test_the_teacher_is_a_run_of_its_own(taught, images):
    options = taught(gumbel=False, eigenvectors=3, keep="landmarks:20")  # as a file may have them
    start(options).train()
    teacher = Run(Path(options.out) / FOLDER)
    assert [row["stage"] for row in teacher.metrics()] == list(STAGES)
    assert teacher.metrics()[0]["patches"] == 10 * 16  # plain crops, whatever ψ sees
    assert teacher.options().method == "spectral"
    assert len(teacher.load()[0]["embedding.rows"]) == 160
    assert Segmenter.load(teacher.folder, "cpu")(images[0]).shape == (70, 100)


@pytest.mark.parametrize("gumbel", [False, True])
def test_targets_are_the_eigenvectors_of_the_plain_crops(taught, gumbel):
    """Of rows that the graph has: near its own values, of mean square 1; turned, if quantised."""
    trainer = start(taught(gumbel=gumbel, augment=False))
    trainer._look_at_the_data_set()
    teacher = trainer.step.teacher
    images = torch.cat(list(SpectralTrainer._batches(_plain(trainer))))
    targets = teacher.targets(trainer.backbone(images), images).flatten(0, 1)
    known = teacher.model.embedding.vectors * len(targets) ** 0.5
    assert torch.allclose(known.square().mean(0), torch.ones(K), atol=1e-3)
    if gumbel:
        assert torch.allclose(teacher.rotation.T @ teacher.rotation, torch.eye(K), atol=1e-5)
        known = known @ teacher.rotation
    assert F.cosine_similarity(targets, known, dim=0).min() > 0.95


def _plain(trainer: Trainer) -> SpectralTrainer:
    folder = Run(trainer.run.path(FOLDER))
    options = folder.options()
    options.resume = True
    return SpectralTrainer(options, folder, trainer.parts)


def test_targets_of_an_image_do_not_depend_on_its_batch(taught):
    trainer = start(taught(views=2))
    trainer._look_at_the_data_set()
    teacher = trainer.step.teacher
    batch = next(iter(trainer._batches()))
    maps = trainer.parts.features(batch)
    together = teacher.targets(maps, batch)
    assert len(teacher._kept) == 2
    assert torch.equal(teacher.targets(maps, batch), together)  # now the kept ones
    teacher._kept.clear()
    for index, image in enumerate(batch):
        alone = teacher.targets(trainer.parts.features(image[None]), image[None])
        assert torch.equal(alone[0], together[index])


def test_argmax_of_turned_rows_is_their_cluster():
    generator = torch.Generator().manual_seed(0)
    frame = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    labels = torch.arange(6).repeat(20)
    rows = F.normalize(frame[labels] + 0.1 * torch.randn(120, 6, generator=generator), dim=1)
    centers = torch.stack([rows[labels == c].mean(0) for c in range(6)])
    rotation = indicator_rotation(centers)
    assert torch.allclose(rotation.T @ rotation, torch.eye(6), atol=1e-6)
    assert torch.equal((rows @ rotation).argmax(1), labels)


def test_losses_by_hand():
    outputs = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    targets = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert regression_loss(outputs, targets, "rows").item() == pytest.approx(0.5)
    assert regression_loss(outputs, targets, "values").item() == pytest.approx(9 / 8)
    with pytest.raises(ValueError, match="expected rows or values, got 'cubes'"):
        regression_loss(outputs, targets, "cubes")


def test_the_objective_goes_on_from_where_the_teacher_leaves(taught, tmp_path):
    options = taught(teacher_share=0.5, epochs=4, out=str(tmp_path / "both"))
    start(options).train()
    rows = Run(options.out).metrics()
    assert ["regression" in row for row in rows] == [True] * 10 + [False] * 10
    assert ["trace" in row for row in rows] == [False] * 10 + [True] * 10
    assert rows[10]["confidence"] > 0
    assert (Path(options.out) / "checkpoint.safetensors").exists()


@pytest.mark.parametrize(
    ("step", "changes"),
    [
        (2, {}),
        (6, {"teacher_share": 0.5}),  # the first one of the objective
        (5, {"teacher_share": 0.7, "views": 2, "gumbel": False}),
        (7, {"accumulate": 2, "epochs": 4, "augment": False}),
    ],
)
def test_resuming_equals_never_having_stopped(taught, tmp_path, step, changes):
    whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
    start(taught(out=whole, **changes)).train()

    broken_off(step, taught(out=broken, **changes))
    torch.manual_seed(99)
    start(taught(out=broken, resume=True, **changes)).train()
    assert_same(whole, broken)


@pytest.mark.parametrize("stage", ["_pixel_lists", "_kappa", "_model"])
def test_a_run_stopped_while_the_teacher_is_made_goes_on(taught, tmp_path, monkeypatch, stage):
    """Gumbel's noise included: a teacher in the making leaves training's generator alone."""
    whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
    start(taught(out=whole, teacher_share=0.5)).train()
    original = getattr(SpectralTrainer, stage)

    def interrupted(self, *args):
        if not self.interrupts.received:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(SpectralTrainer, stage, interrupted)
        with pytest.raises(KeyboardInterrupt, match="--resume goes on"):
            start(taught(out=broken, teacher_share=0.5)).train()
    start(taught(out=broken, teacher_share=0.5, resume=True)).train()
    assert_same(whole, broken)


def test_a_finished_run_needs_its_teacher_no_more(taught, monkeypatch):
    start(taught(epochs=1)).train()
    monkeypatch.setattr(SpectralTrainer, "train", lambda self: pytest.fail("made again"))
    assert start(taught(epochs=1, resume=True)).train()["cosine"]


def test_resume_refuses_another_teacher(taught):
    start(taught(epochs=1)).train()
    with pytest.raises(UserError, match="this run had --teacher spectral, not none"):
        Run.create(taught(epochs=1, teacher="none", resume=True))
    with pytest.raises(UserError, match="this run had --dataset-k 8, not 9"):
        Run.create(taught(epochs=1, dataset_k="9", resume=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_k": "160"}, "--dataset-k 160: expected fewer than the 160 rows .* lower --data"),
        ({"alpha": 1.0, "num_eigenfunctions": 32}, "of the 32 eigenvectors .* lower --alpha or -K"),
    ],
)
def test_what_the_data_set_cannot_carry(taught, changes, message):
    with pytest.raises(UserError, match=message):
        start(taught(**changes)).train()


@pytest.mark.parametrize("flag", ["teacher spectral", "edges dataset"])
def test_several_processes_are_refused(tiny, monkeypatch, flag):
    name, value = flag.split()
    monkeypatch.setattr(distributed, "ranks", lambda: 2)
    with pytest.raises(UserError, match=f"--{flag}: works in one process, not in 2"):
        check_data_set(tiny(**{name: value}), 160)
    check_data_set(tiny(), 160)


def test_an_impossible_k_leaves_the_folder_free(taught):
    with pytest.raises(UserError, match="--dataset-k 160: expected fewer"):
        start(taught(dataset_k="160"))
    assert not list(Path(taught().out).iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"teacher_share": 0.5}, "--teacher-share 0.5: expected --teacher spectral beside it"),
        ({"teacher": "spectral", "teacher_share": 0.0}, "--teacher-share 0.0: expected more than"),
        ({"teacher": "spectral", "teacher_share": 1.5}, "--teacher-share 1.5: expected more than"),
        ({"edges": "dataset", "batch_size": 1}, "--batch-size 1: expected at least 2 with --edges"),
        ({"dataset_k": "few"}, "--dataset-k few: expected a number of neighbours"),
        ({"method": "spectral", "teacher": "spectral"}, "--teacher: is an option of --method neu"),
        ({"method": "spectral", "edges": "dataset"}, "--edges: is an option of --method neural"),
    ],
)
def test_options_of_no_use(flags, message):
    with pytest.raises(UserError, match=message):
        resolve(flags)


def test_a_graph_of_the_batch_is_asked_for_only_if_there_is_one(taught):
    start(taught(k="999", epochs=1)).train()
    with pytest.raises(UserError, match="--k 999: expected fewer than the 32 rows"):
        start(taught(k="999", epochs=1, teacher_share=0.5, out=taught().out + "-2"))


# ---- the commands


@pytest.mark.parametrize("flags", [["--no-gumbel"], ["--teacher-share", "0.5"]])
def test_all_commands_work_on_a_run(annotated, tmp_path, capsys, flags):
    run = tmp_path / "run"
    common = ["--data", "folder", "--data-root", str(annotated), "--crop", "64", "--k", "8"]
    common += ["--backbone", "test_vit", "--weights", "random", "-K", str(K), "--pictures", "2"]
    common += ["--dataset-k", "8", "--epochs", "4", "--batch-size", "4", "--workers", "0"]
    common += ["--heads", "3", "--mlp-hidden", "96", "--views", "2"]
    assert train.main(["--teacher", "spectral", *flags, *common, "--out", str(run)]) == 0
    page = (run / "report.html").read_text("utf-8")
    assert "Regression on the teacher in" in page
    assert "first from the eigenvectors, computed exactly" in page
    assert ("Objective" in page) == ("--no-gumbel" not in flags)
    assert evaluate.main([str(run), "--methods", "ours,ours*", "--size", "64"]) == 0
    photo = str(annotated / "images" / "val" / "1.png")
    assert segment.main([str(run), photo, "--out", str(tmp_path / "s")]) == 0
    assert spectrum.main([str(run), "--images", "6"]) == 0
    assert eigenmaps.main([str(run), photo]) == 0
    assert summarize.main([str(run)]) == 0
    assert "| ours |" in capsys.readouterr().out
    assert evaluate.main([str(run / FOLDER), "--size", "64"]) == 0  # the teacher itself
