"""Batches: the same whatever the workers and wherever begun; bad images replaced and reported."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import time

import pytest
import torch

from nefkern.data import TrainTransform, Views, open_dataset, train_loader
from nefkern.runtime.errors import UserError

TRANSFORM = TrainTransform(40, 32)


def loader(root, *, batch_size=2, workers=0, seed=0, strict=False):
    dataset = open_dataset("folder", root=root, strict=strict)
    return train_loader(dataset, TRANSFORM, batch_size=batch_size, workers=workers, seed=seed)


def epoch(loader, number: int, start_step: int = 0) -> torch.Tensor:
    """The epoch's batches stacked, [steps, B, 3, 32, 32]."""
    loader.set_epoch(number, start_step)
    return torch.stack(list(loader))


@pytest.fixture
def damage(images_folder, truncate):
    """damage(letters): truncate those images."""
    return lambda letters: [truncate(images_folder / f"{letter}.jpg") for letter in letters]


def test_batches(images_folder):
    batches = list(loader(images_folder, batch_size=3))
    assert [tuple(batch.shape) for batch in batches] == [(3, 3, 32, 32)] * 2
    assert batches[0].dtype == torch.uint8
    assert len(loader(images_folder, batch_size=3)) == 2


def test_a_short_batch_is_kept_only_if_alone(images_folder):
    assert [len(batch) for batch in loader(images_folder, batch_size=10)] == [7]
    assert [len(batch) for batch in loader(images_folder, batch_size=4)] == [4]
    assert [len(batch) for batch in loader(images_folder, batch_size=7)] == [7]


def test_workers_do_not_change_a_batch(images_folder):
    loaders = [loader(images_folder, workers=workers) for workers in (0, 1, 2)]
    for number in (0, 1, 5):
        expected, *others = (epoch(each, number) for each in loaders)
        assert all(torch.equal(expected, other) for other in others)


def test_threads_do_not_change_a_batch(images_folder):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = epoch(loader(images_folder), 0)
        torch.set_num_threads(2)
        assert torch.equal(epoch(loader(images_folder), 0), one)
    finally:
        torch.set_num_threads(threads)


def test_epochs_and_seeds_differ_and_repeat(images_folder):
    first = loader(images_folder, seed=3)
    zero, one = epoch(first, 0), epoch(first, 1)
    assert not torch.equal(zero, one)
    assert torch.equal(epoch(first, 0), zero)
    assert torch.equal(epoch(loader(images_folder, seed=3), 1), one)
    assert not torch.equal(epoch(loader(images_folder, seed=4), 0), zero)


def test_each_epoch_shuffles_without_repetition(images_folder):
    each = loader(images_folder, batch_size=7)
    orders = []
    for number, (key_epoch, order) in zip(range(4), each._steps, strict=False):
        assert key_epoch == number
        assert sorted(order) == list(range(7))
        orders.append(tuple(order))
    assert len(set(orders)) > 1


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_resuming_goes_on_with_the_same_batches(images_folder, workers, step):
    whole = epoch(loader(images_folder), 2)
    resumed = loader(images_folder, workers=workers)
    resumed.set_epoch(2, start_step=step)
    assert (resumed.epoch, resumed.start_step) == (2, step)
    rest = list(resumed)
    assert len(rest) == 3 - step
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[step:], strict=True))
    assert torch.equal(epoch(resumed, 3), epoch(loader(images_folder), 3))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_abandoned_epoch_leaves_nothing_behind(images_folder, workers):
    abandoned = loader(images_folder, workers=workers)
    next(iter(abandoned))
    assert torch.equal(epoch(abandoned, 1), epoch(loader(images_folder), 1))


def test_the_next_epoch_is_read_ahead(images_folder):
    """Its first batches are there although the images are gone since."""
    expected = epoch(loader(images_folder), 1)
    ahead = loader(images_folder, workers=1)
    epoch(ahead, 0)
    deadline = time.monotonic() + 30
    while ahead._outcomes._worker_result_queue.qsize() < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    shutil.rmtree(images_folder)
    ahead.set_epoch(1)
    batches = iter(ahead)
    assert torch.equal(next(batches), expected[0])
    assert torch.equal(next(batches), expected[1])
    ahead.close()


@pytest.mark.parametrize("step", [-1, 4])
def test_steps_beyond_the_epoch(images_folder, step):
    with pytest.raises(ValueError, match="start_step: expected 0 to 3"):
        loader(images_folder).set_epoch(0, start_step=step)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_generator_is_not_touched(images_folder, workers):
    """Else a resumed run, which begins one more iteration, would go another way."""
    before = torch.get_rng_state()
    epoch(loader(images_folder, workers=workers), 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_views_follow_the_epoch(images_folder):
    views = Views(open_dataset("folder", root=images_folder), TRANSFORM, seed=-5)
    zero = views[2]
    views.set_epoch(1)
    assert not torch.equal(views[2].image, zero.image)
    assert torch.equal(views.view(0, 2).image, zero.image)
    assert (zero.index, zero.problems) == (2, ())
    assert len(list(views)) == 7


def test_distinct_views_come_in_turn_and_are_those_of_every_seed(images_folder):
    dataset = open_dataset("folder", root=images_folder)
    one, other = (Views(dataset, TRANSFORM, seed=seed, distinct=2) for seed in (1, 2))
    images = [one.view(number, 3).image for number in range(4)]
    assert not torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[2])
    assert torch.equal(images[1], images[3])
    assert torch.equal(other.view(4, 3).image, images[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_reported_once_and_replaced(images_folder, caplog, workers, damage):
    damage("bc")
    each = loader(images_folder, batch_size=7, workers=workers)
    with caplog.at_level(logging.WARNING):
        batches = [epoch(each, number) for number in range(3)]
    assert all(batch.shape == (1, 7, 3, 32, 32) for batch in batches)
    for name in ("b.jpg", "c.jpg"):
        assert sum(name in record.getMessage() for record in caplog.records) == 1
    assert len(caplog.records) == 2


def test_the_replacement_is_the_next_good_image(images_folder, damage):
    damage("bcg")
    views = Views(open_dataset("folder", root=images_folder), TRANSFORM)
    assert [view.index for view in views] == [0, 3, 3, 3, 4, 5, 0]
    assert [len(view.problems) for view in views] == [0, 2, 1, 0, 0, 0, 1]
    assert not torch.equal(views[1].image, views[3].image)  # its own view of it


def test_good_images_do_not_notice_a_bad_one(images_folder, damage):
    views = Views(open_dataset("folder", root=images_folder), TRANSFORM)
    before = views[4].image
    damage("bc")
    assert torch.equal(views[4].image, before)


@pytest.mark.parametrize("workers", [0, 2])
def test_strict_makes_a_bad_image_an_error(images_folder, workers, damage):
    damage("c")
    before = set(multiprocessing.active_children())
    with pytest.raises(UserError, match=r"c\.jpg: cannot read this image") as caught:
        list(loader(images_folder, batch_size=7, workers=workers, strict=True))
    assert "\n" not in str(caught.value)
    assert set(multiprocessing.active_children()) <= before  # ended with the error


@pytest.mark.parametrize("workers", [0, 1])
def test_no_good_image_at_all(images_folder, workers, damage):
    damage("abcdefg")
    with pytest.raises(UserError, match="none of the 7 images can be read") as caught:
        list(loader(images_folder, workers=workers))
    assert "\n" not in str(caught.value)


def test_workers_survive_the_interrupt_that_the_trainer_handles(images_folder):
    each = loader(images_folder, workers=1)
    expected = epoch(each, 0)
    (worker,) = each._loader._iterator._workers
    os.kill(worker.pid, signal.SIGINT)
    assert torch.equal(epoch(each, 0), expected)
    assert worker.is_alive()
    each.close()


def test_closing_ends_the_workers_and_iterating_starts_new_ones(images_folder):
    each = loader(images_folder, workers=2)
    expected = epoch(each, 0)
    workers = list(each._loader._iterator._workers)
    start = time.monotonic()
    each.close()
    assert not any(worker.is_alive() for worker in workers)
    assert time.monotonic() - start < 4
    assert torch.equal(epoch(each, 0), expected)


@pytest.mark.parametrize(
    ("options", "text"), [({"batch_size": 0}, "batch"), ({"workers": -1}, "work")]
)
def test_arguments_out_of_range(images_folder, options, text):
    with pytest.raises(UserError, match=text):
        loader(images_folder, **options)


def test_real_photographs_make_batches():
    pytest.importorskip("skimage", reason="the photographs come with scikit-image")
    batches = train_loader(open_dataset("samples"), TrainTransform(128, 96), batch_size=4)
    images = next(iter(batches))
    assert images.shape == (4, 3, 96, 96)
    assert images.float().std() > 20
