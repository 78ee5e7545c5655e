"""The loop: repeatable, its record, and what goes wrong in it."""

from __future__ import annotations

import errno
import logging
import os
import time
from pathlib import Path

import pytest
import torch
import yaml

from nefkern.data import TrainLoader
from nefkern.runtime.errors import UserError
from nefkern.training.options import TrainOptions
from nefkern.training.runs import CHECKPOINT, CONFIG, METRICS, Run
from nefkern.training.step import TrainingStep
from tests.training.outcomes import assert_same, outcome, start

THREADS = torch.get_num_threads()


@pytest.fixture
def all_threads():
    torch.set_num_threads(THREADS)


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
    config = yaml.safe_load(run.path(CONFIG).read_text("utf-8"))
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


def test_equal_runs_have_equal_files(tiny, tmp_path):
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        start(tiny(out=str(folder), epochs=1)).train()
    names = [{path.name for path in folder.glob("state-*.pt")} for folder in folders]
    assert names[0] == names[1] != set()
    for name in (CHECKPOINT, *names[0]):
        first, second = (folder / name for folder in folders)
        assert first.read_bytes() == second.read_bytes(), name


def test_the_graph_can_look_at_all_maps(tiny):
    first = start(tiny(epochs=1)).train()
    other = start(tiny(epochs=1, graph_features="all", out=tiny().out + "-all")).train()
    assert 0 < other["trace"] != first["trace"]


@pytest.mark.parametrize(
    ("asked", "transformer", "standardize"),
    [(None, True, False), (None, False, True), (True, True, True), (False, False, False)],
)
def test_the_scale_of_the_input_is_fitted_where_the_maps_differ(asked, transformer, standardize):
    options = TrainOptions(standardize=asked)
    assert options.eigenfunction(transformer=transformer).standardize is standardize


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


# ---- what goes wrong


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


@pytest.mark.parametrize("workers", [0, 2])
def test_strict_makes_it_an_error(tiny, photos, workers):
    bad = photos / "images" / "train" / "4.png"
    bad.write_bytes(b"")
    with pytest.raises(UserError, match=str(bad)):
        start(tiny(strict=True, workers=workers)).train()


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
