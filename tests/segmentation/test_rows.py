"""Rows kept for a fit: how many, in what precision, and their moments."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from nefkern.segmentation.rows import RowStore, mean_and_std, root_mean_square


def batch(n, seed, channels=4):
    return torch.randn(n, channels, generator=torch.Generator().manual_seed(seed))


def test_few_rows_stay_as_they_are():
    store = RowStore(100)
    for seed in range(3):
        store.add(batch(7, seed))
    assert (len(store), store.full) == (21, False)
    assert torch.equal(store.take(), torch.cat([batch(7, seed) for seed in range(3)]))
    assert len(store) == 0


def test_the_batch_that_fills_the_store_is_kept_whole():
    store = RowStore(10)
    store.add(batch(9, 0))
    assert not store.full
    store.add(batch(9, 1))
    assert store.full
    assert len(store) == 18


def test_full_memory_halves_the_precision_and_then_is_full():
    store = RowStore(10**9, max_bytes=10 * 4 * 4)  # ten rows in float32
    store.add(batch(10, 0))
    assert store._dtype == torch.float32
    store.add(torch.tensor([[1e6, -1e6, 0.1, 2.0]]))
    assert not store.full
    store.add(batch(9, 2))
    assert store.full
    rows = store.take()
    assert rows.dtype == torch.float16
    assert_close(rows[:10].float(), batch(10, 0), atol=1e-3, rtol=1e-3)
    assert rows[10].tolist()[:2] == [65504, -65504]


def test_what_is_kept_is_a_copy():
    rows = batch(5, 0)
    store = RowStore(10)
    store.add(rows)
    rows.zero_()
    assert torch.equal(store.take(), batch(5, 0))


def test_moments_in_half_precision_are_not_of_half_precision():
    rows = (batch(3000, 0) + 300).half()
    mean, std = mean_and_std(rows)
    assert_close(mean.double(), rows.double().mean(0), rtol=1e-6, atol=0)
    assert_close(std.double(), rows.double().std(0), rtol=1e-6, atol=0)
    expected = rows.double().square().mean(0).sqrt()
    assert_close(root_mean_square(rows).double(), expected, rtol=1e-6, atol=0)
