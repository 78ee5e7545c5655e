"""Memory that runs out: the batch is halved, and no image is lost."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable

import pytest
import torch

from nefkern.runtime.errors import UserError
from nefkern.training.runs import Run
from nefkern.training.step import TrainingStep
from tests.training.outcomes import start


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
