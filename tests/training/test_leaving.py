"""A signal in the midst of a step: it is left at the next module, as if it had not been begun."""

import functools
import os
import signal
from pathlib import Path

import pytest
import torch

from nefkern.training.trainer import Trainer
from tests.training.outcomes import assert_same, start


def signalled(monkeypatch: pytest.MonkeyPatch, at: int) -> list[None]:
    """SIGTERM comes at the ``at``-th call of a training's ``heed``; returns the calls so far."""
    calls: list[None] = []
    real = Trainer._heed

    def heed(trainer: Trainer) -> None:
        calls.append(None)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        real(trainer)

    monkeypatch.setattr(Trainer, "_heed", heed)
    return calls


@pytest.mark.parametrize("share", [0.3, 0.78, 0.95], ids=["backbone", "psi", "backward"])
def test_it_is_left_within_a_pass(tiny, monkeypatch, tmp_path, share):
    with monkeypatch.context() as patch:
        calls = signalled(patch, at=0)
        start(tiny(out=str(tmp_path / "whole"))).train()
    step = len(calls) // 15
    assert step > 60, "only between the parts of a step"
    options, at = tiny(), len(calls) - 10 * step + round(share * step)
    with monkeypatch.context() as patch:
        calls = signalled(patch, at)
        with pytest.raises(KeyboardInterrupt, match="the checkpoint after step 5 is"):
            start(options).train()
    assert len(calls) == at, "the step went on"
    start(tiny(resume=True)).train()
    assert_same(Path(options.out), tmp_path / "whole")


def test_a_compiled_step_is_left_between_its_parts(tiny, monkeypatch):
    """Its modules have no hooks: a change of hooks would compile them anew."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    calls = signalled(monkeypatch, at=0)
    start(tiny(compile=True, epochs=1)).train()
    assert len(calls) == 5 * 5
