"""Runs begun and stopped, and what they leave, to be compared with another's."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from nefkern.training.options import TrainOptions
from nefkern.training.runs import Run
from nefkern.training.step import TrainingStep
from nefkern.training.trainer import Trainer

#: The only things in a record that a clock decides.
TIMED = ("images_per_second", "input_wait", "seconds", "knn_seconds")


def start(options: TrainOptions) -> Trainer:
    return Trainer(options, Run.create(options))


def trained(data_root: Path, out: Path) -> Path:
    """The folder of a run of seconds on a folder of images: a small random backbone, K = 6."""
    options = TrainOptions(
        data="folder", data_root=str(data_root), out=str(out), backbone="test_vit",
        weights="random", crop=64, k="16", num_eigenfunctions=6, heads=3, mlp_hidden=96, epochs=1,
        batch_size=3, workers=0, pictures=0,
    )  # fmt: skip
    start(options).train()
    return out


def outcome(folder: str | Path) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """The checkpoint's tensors, and the record without times."""
    run = Run(folder)
    rows = [{k: v for k, v in row.items() if k not in TIMED} for row in run.metrics()]
    return run.load()[0], rows


def assert_same(first: str | Path, second: str | Path) -> None:
    """Two runs came to the same, to the bit."""
    (tensors, rows), (others, other_rows) = outcome(first), outcome(second)
    assert rows == other_rows
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt training at the end of its ``step``-th step, as Ctrl-C does."""
    original = TrainingStep.__call__

    def stepping(self, images, progress, number, *graph):
        record = original(self, images, progress, number, *graph)
        if number == step:
            os.kill(os.getpid(), signal.SIGINT)
        return record

    monkeypatch.setattr(TrainingStep, "__call__", stepping)


def broken_off(step: int, options: TrainOptions) -> None:
    """Train until the interrupt at the end of the ``step``-th step has written its checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(step, patch)
        with pytest.raises(KeyboardInterrupt, match=f"checkpoint after step {step} is written"):
            start(options).train()
