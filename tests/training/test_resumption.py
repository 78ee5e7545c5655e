"""Resumed to the bit, or trained longer; with other options refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
import yaml

from nefkern.runtime.errors import UserError
from nefkern.segmentation.segmenter import Segmenter
from nefkern.training.options import TrainOptions
from nefkern.training.runs import CONFIG, METRICS, Run
from nefkern.training.trainer import Trainer
from tests.training.outcomes import assert_same, broken_off, outcome, start, stop_after


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
def test_resuming_equals_never_having_stopped(tiny, tmp_path, step, changes):
    whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
    start(tiny(out=whole, **changes)).train()
    broken_off(step, tiny(out=broken, **changes))
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


def test_resume_where_there_is_nothing_yet_starts(tiny):
    options = tiny(epochs=1, resume=True)
    Run.create(options).write_config(options)  # killed before the first checkpoint
    start(tiny(epochs=1, resume=True, lr=0.5)).train()
    assert Run(options.out).options().lr == 0.5
    assert len(Run(options.out).metrics()) == 5


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
    before = Run(options.out).path(CONFIG).read_text("utf-8")
    with pytest.raises(UserError, match=r"--resume: this run had --(epochs 2, not 1|lr 0\.001)"):
        lengthen(tiny(resume=True, **change))
    assert Run(options.out).path(CONFIG).read_text("utf-8") == before


def test_more_epochs_only_if_asked_for(tiny):
    """The option forgotten, or a row of ``reproduce``: not the run that is asked for."""
    start(tiny(epochs=1)).train()
    with pytest.raises(
        UserError,
        match=r"had --epochs 1, not 3; leave the option as it was, "
        r"train longer \(--resume --epochs 3\), or start anew",
    ):
        start(tiny(resume=True))


# ---- what is refused


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
    config = yaml.safe_load(run.path(CONFIG).read_text("utf-8"))
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


def test_resume_with_other_weights(tiny, tmp_path):
    import timm

    start(tiny(epochs=1)).train()
    config = yaml.safe_load((tmp_path / "run" / CONFIG).read_text("utf-8"))
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
