"""Checkpoints cut short or with bits changed are found, and the one before is taken; one process
to a run folder; nothing in a run folder is ever run."""

from __future__ import annotations

import logging
import os
import pickle
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from nefkern import train
from nefkern.images.feature_cache import FeatureCache
from nefkern.images.loading import load_backbone
from nefkern.runtime import tensor_files
from nefkern.runtime.errors import UserError
from nefkern.runtime.locks import NAME, FolderLock
from nefkern.segmentation.segmenter import Segmenter
from nefkern.training.runs import CHECKPOINT, CONFIG, METRICS, PREVIOUS, Run
from nefkern.training.spectral import SpectralTrainer
from nefkern.training.trainer import Trainer
from tests.faults.processes import Forked
from tests.training.outcomes import assert_same


def trained(options) -> Run:
    run = Run.create(options)
    (SpectralTrainer if options.method == "spectral" else Trainer)(options, run).train()
    return run


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


# ---- files of tensors


TENSORS = {"a": torch.arange(60.0).reshape(6, 10), "ψ": torch.ones(3, dtype=torch.int32)}


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "x.safetensors"
    path.write_bytes(tensor_files.packed(TENSORS, {"step": "3"}))
    return path


def test_a_file_of_tensors_comes_back(file):
    tensors, metadata = tensor_files.unpacked(file)
    assert metadata == {"step": "3"}
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert file.read_bytes() == tensor_files.packed(TENSORS, {"step": "3"})


def test_every_changed_bit_is_found(file):
    whole = file.read_bytes()
    for place in range(len(whole)):
        flip(file, place)
        with pytest.raises(tensor_files.DamagedFile):
            tensor_files.unpacked(file)
        file.write_bytes(whole)


def test_every_missing_end_is_found(file):
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(tensor_files.DamagedFile):
            tensor_files.unpacked(file)


def test_files_without_a_checksum_are_taken(tmp_path):
    from safetensors.torch import save_file

    save_file(TENSORS, tmp_path / "old.safetensors", {"step": "3"})
    assert tensor_files.unpacked(tmp_path / "old.safetensors")[1] == {"step": "3"}


# ---- the checkpoint before the last


@pytest.mark.parametrize("changes", [{"checkpoint_seconds": 0.0}, {"method": "spectral", "k": "8"}])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "state"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tiny, tmp_path, caplog, changes, damage):
    if damage == "state" and "method" in changes:
        pytest.skip("has no state")
    whole = trained(tiny(out=str(tmp_path / "whole"), **changes))
    run = trained(tiny(**changes))
    last = run.load()[1]["step"]
    path = run.path(CHECKPOINT)
    if damage == "flip":
        flip(path, path.stat().st_size - 9)
    elif damage == "cut":
        os.truncate(path, path.stat().st_size - 9)
    elif damage == "gone":
        path.unlink()
    else:
        flip(run.path(run.load()[1]["state"]), 2000)
    if damage in ("flip", "cut"):
        with pytest.raises(UserError, match=f"{CHECKPOINT}: .*; {PREVIOUS}, of step .* is whole"):
            Segmenter.load(run.folder, "cpu")
    with caplog.at_level(logging.WARNING):
        trained(tiny(resume=True, **changes))
    assert f"going on from the one before, {PREVIOUS}, of step {int(last) - 1}" in caplog.text
    assert_same(whole.folder, run.folder)


def test_a_state_of_another_checkpoint_is_not_taken(tiny):
    """Both files are whole, and do not belong together."""
    run = trained(tiny(checkpoint_seconds=0.0))
    last, before = (tensor_files.metadata_of(run.path(n))["state"] for n in (CHECKPOINT, PREVIOUS))
    shutil.copy(run.path(before), run.path(last))
    with pytest.raises(UserError, match=f"{last} is damaged"):
        run.load_state(run.load()[1])


@pytest.mark.parametrize("failing", [1, 2])
def test_a_step_that_is_saved_twice_is_whole_at_any_moment(tmp_path, monkeypatch, failing):
    """The first checkpoint of all, then another state of that step: killed after either file."""
    run, weights, real = Run(tmp_path), {"w": torch.ones(3)}, os.fsync
    run.save(weights, {"position": {"epoch": 0}}, 5)
    calls = iter(range(1, 100))

    def killed(descriptor: int) -> None:
        if next(calls) == failing:
            raise KeyboardInterrupt
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            run.save(weights, {"position": {"epoch": 1}}, 5)
    assert run.load_state(run.load()[1]) == {"position": {"epoch": 0}}
    run.save(weights, {"position": {"epoch": 1}}, 5)
    assert run.load_state(run.load()[1]) == {"position": {"epoch": 1}}
    assert len(list(tmp_path.glob("state-*.pt"))) == 1


def test_what_no_run_goes_back_to_is_removed(tiny):
    run = trained(tiny(checkpoint_seconds=0.0))
    states = {path.name for path in run.folder.glob("state-*.pt")}
    named = {tensor_files.metadata_of(run.path(n))["state"] for n in (CHECKPOINT, PREVIOUS)}
    assert states == named
    assert len(named) == 2


@pytest.mark.parametrize("name", ["../outside.pt", "/etc/passwd", "state-1.pt\n", "", "state-.pt"])
def test_a_checkpoint_names_no_file_outside(tiny, name):
    run = trained(tiny(epochs=1))
    tensors, metadata = run.load()
    content = tensor_files.packed(tensors, {**metadata, "state": name})
    run.path(CHECKPOINT).write_bytes(content)
    with pytest.raises(UserError, match="names no state of this run"):
        trained(tiny(epochs=1, resume=True))


# ---- caches


def test_a_damaged_entry_of_a_cache_is_computed_again(tmp_path):
    backbone, image = load_backbone("test_vit", "random"), torch.zeros(1, 3, 32, 32).byte()
    expected = FeatureCache(tmp_path, backbone)(image).concat
    (entry,) = tmp_path.rglob("*.safetensors")
    flip(entry, entry.stat().st_size - 3)
    cache = FeatureCache(tmp_path, backbone)
    found = cache(image).concat
    assert (cache.hits, cache.misses) == (0, 1)
    assert torch.allclose(found, expected, atol=1e-2)
    again = FeatureCache(tmp_path, backbone)
    again(image)
    assert again.hits == 1, "it was written anew"


# ---- pickles


class Malice:
    """What runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["torch", "pickle", "legacy"])
def test_no_pickle_in_a_run_folder_is_run(tiny, tmp_path, form):
    trap = tmp_path / "trap"
    run = trained(tiny(epochs=1))
    tensors, metadata = run.load()
    state = run.path(metadata["state"])
    if form == "pickle":
        state.write_bytes(pickle.dumps(Malice(trap)))
    else:
        malice = {"position": Malice(trap), "optimizer": {}}
        torch.save(malice, state, _use_new_zipfile_serialization=form == "torch")
    # With the right checksum: whoever made it can make that, too.
    told = {
        **metadata,
        "state_sha256": __import__("hashlib").sha256(state.read_bytes()).hexdigest(),
    }
    run.path(CHECKPOINT).write_bytes(tensor_files.packed(tensors, told))
    with pytest.raises(UserError, match="is damaged"):
        trained(tiny(epochs=1, resume=True))
    for name in (CHECKPOINT, "clusters.safetensors", "graph.safetensors"):
        run.path(name).write_bytes(pickle.dumps(Malice(trap)))
        with pytest.raises(UserError):
            Segmenter.load(run.folder, "cpu")
    run.path(CONFIG).write_text(f"!!python/object/apply:os.mkdir ['{trap}']\n")
    with pytest.raises(UserError, match="not a run's configuration"):
        Segmenter.load(run.folder, "cpu")
    assert not trap.exists()


def test_no_pickle_in_a_cache_or_a_weights_file_is_run(tmp_path):
    trap, backbone = tmp_path / "trap", load_backbone("test_vit", "random")
    image = torch.zeros(1, 3, 32, 32).byte()
    FeatureCache(tmp_path / "cache", backbone)(image)
    (entry,) = (tmp_path / "cache").rglob("*.safetensors")
    entry.write_bytes(pickle.dumps(Malice(trap)))
    FeatureCache(tmp_path / "cache", backbone)(image)
    for name in ("weights.pth", "weights.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(Malice(trap)))
        with pytest.raises(UserError, match="not a readable"):
            load_backbone("test_vit", str(tmp_path / name))
    assert not trap.exists()


# ---- a start that was killed


def test_a_run_killed_before_its_configuration_is_begun_anew(tiny):
    folder = Path(tiny().out)
    folder.mkdir()
    (folder / ".config.yaml.0123456789ab.part").write_text("half")
    assert Run.create(tiny(resume=True)).folder == folder
    assert not list(folder.glob(".*.part"))


# ---- one process to a folder


def test_a_second_process_is_sent_away(tiny, tmp_path):
    options = tiny()
    first = Forked(lambda: _hold(options))
    try:
        deadline = time.monotonic() + 100
        while not (tmp_path / "held").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        line = f"--out {options.out}: is in use by another process .{first.pid} on .*; wait until"
        with pytest.raises(UserError, match=line):
            Run.create(tiny(resume=True))
        assert first.wait(0.01) is None
    finally:
        first.kill(signal.SIGKILL)
        first.wait(100)
    assert (Path(options.out) / NAME).exists()
    run = Run.create(tiny(resume=True))  # killed, it holds nothing
    assert run._lock is not None


def _hold(options) -> int:
    run = Run.create(options)
    (Path(options.out).parent / "held").touch()
    time.sleep(1000)
    return len(str(run))


def test_the_command_says_it_in_one_line(photos, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    lock = FolderLock.of(out, "--out")
    arguments = ["--data", "folder", "--data-root", str(photos), "--out", str(out)]
    arguments += ["--backbone", "test_vit", "--weights", "random"]
    ended = Forked(lambda: train.main(arguments)).wait(100)
    assert lock is not None
    assert ended.code == 2
    assert ended.last.startswith(f"error: --out {out}: is in use by another process")


def test_a_lock_goes_with_its_last_holder(tmp_path):
    first, second = (FolderLock.of(tmp_path, "--out") for _ in range(2))
    assert first is second
    del first
    assert (tmp_path / NAME).exists()
    del second
    assert not (tmp_path / NAME).exists()
    assert FolderLock.of(tmp_path, "--out") is not None


def test_a_fork_neither_holds_nor_removes_it(tmp_path):
    lock = FolderLock.of(tmp_path, "--out")

    def drop() -> int:
        nonlocal lock
        del lock
        return 0

    assert Forked(drop).wait(100).code == 0
    assert (tmp_path / NAME).exists()
    assert Forked(lambda: _taken(tmp_path)).wait(100).code == 7


def _taken(folder: Path) -> int:
    FolderLock._held.clear()
    try:
        FolderLock.of(folder, "--out")
    except UserError:
        return 7
    return 0


def test_a_link_in_the_place_of_the_lock_leads_nowhere(tmp_path):
    (tmp_path / "precious").write_text("untouched")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / NAME).symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic link"):
        FolderLock.of(folder, "--out")
    assert (tmp_path / "precious").read_text("utf-8") == "untouched"


@pytest.mark.parametrize("name", ["events", "overlays", "teacher"])
def test_links_do_not_lead_out_of_a_run_folder(tiny, tmp_path, name):
    outside = tmp_path / "outside"
    outside.mkdir()
    options = tiny(epochs=1)
    Run.create(options).write_config(options)
    (Path(options.out) / name).symlink_to(outside)
    flags = ["--config", str(Path(options.out) / CONFIG), "--out", options.out, "--resume"]
    flags += ["--teacher", "spectral", "--no-gumbel"] if name == "teacher" else []
    assert train.main(flags) == 2
    assert not list(outside.iterdir())


# ---- clocks


def test_a_clock_that_jumps_changes_nothing(tiny, tmp_path, monkeypatch):
    """Forwards by years and back again in the midst of training."""
    whole = trained(tiny(out=str(tmp_path / "whole")))
    real, dice = time.time, random.Random(0)
    monkeypatch.setattr(time, "time", lambda: real() + dice.choice((-1, 1)) * 1e9)
    run = trained(tiny(checkpoint_seconds=1.0))
    assert_same(whole.folder, run.folder)
    assert run.path(METRICS).exists()
