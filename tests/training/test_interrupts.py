"""Signals while training: handlers, and a step left as if it had not been begun."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from nefkern.training.interrupts import Interrupts
from nefkern.training.runs import Run
from nefkern.training.step import TrainingStep
from tests.training.outcomes import assert_same, start


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
