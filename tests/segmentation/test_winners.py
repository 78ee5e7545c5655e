"""The winning cluster of every pixel: equal to the direct way, of a few clusters only."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nefkern.segmentation import winners as module
from nefkern.segmentation.windows import sliding_clusters, sliding_windows


def smooth(clusters: int, h: int, w: int, seed: int, dtype=torch.float64) -> torch.Tensor:
    """Logits ``[K, h, w]`` that neighbouring cells share, as those of images do."""
    random = torch.Generator().manual_seed(seed)
    noise = torch.randn(clusters, h + 2, w + 2, generator=random, dtype=dtype)
    return 5 * F.avg_pool2d(noise, 3, 1) + torch.randn(clusters, 1, 1, generator=random) / 4


def coarse(grid: tuple[int, int], clusters: int, *, pad: float = 0.0, dtype=torch.float64):
    """A predictor of one smooth map a window, another for each, spanning ``pad`` more pixels."""
    count = iter(range(1000))

    def predict(crops):
        logits = [smooth(clusters, *grid, next(count), dtype) for _ in crops]
        return torch.stack(logits), (crops.shape[2] + pad, crops.shape[3] + pad / 2)

    return predict


@pytest.fixture
def blocks(monkeypatch) -> list[int]:
    """Every comparison's number of candidates: none where blocks were not used."""
    seen: list[int] = []
    candidates = module._candidates

    def counted(corners):
        seen.append(len(candidates(corners)))
        return candidates(corners)

    monkeypatch.setattr(module, "_candidates", counted)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("size", "window", "stride", "grid", "pad"),
    [
        ((200, 260), 1000, 667, (5, 7), 0),  # one window
        ((200, 260), 1000, 667, (5, 7), 3.4),  # padded, not by whole pixels
        ((200, 90), 1000, 667, (1, 1), 0),  # one cell: constant
        ((300, 211), 120, 80, (4, 4), 0),  # overlapping windows, cells that do not meet
        ((300, 211), 121, 77, (3, 5), 2.5),
        ((90, 700), 90, 60, (4, 4), 0),
    ],
)
def test_equal_to_the_direct_way(size, window, stride, grid, pad, dtype, blocks):
    image = torch.zeros(3, *size)
    found = sliding_clusters(coarse(grid, 12, pad=pad, dtype=dtype), image, window, stride)
    assert blocks
    logits = sliding_windows(coarse(grid, 12, pad=pad, dtype=dtype), image, window, stride)
    first, second = logits.topk(2, 0).values
    clear = first - second > (1e-12 if dtype == torch.float64 else 1e-5)
    assert clear.float().mean() > 0.999
    assert torch.equal(found[clear], logits.argmax(0)[clear])
    assert len(found.unique()) > 3 or grid == (1, 1)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 9), st.integers(0, 999), st.data())
def test_the_largest_for_any_grid_and_whole_numbers(h, w, clusters, seed, data):
    """Logits of few whole numbers tie everywhere; any of the largest is right to rounding."""
    random = torch.Generator().manual_seed(seed)
    spread = data.draw(st.integers(1, 5))
    logits = torch.randint(0, spread, (clusters, h, w), generator=random).double()
    image = torch.zeros(3, 8 * h, 8 * w)

    def predict(crops):
        return logits[None], (8 * h, 8 * w)

    found = sliding_clusters(predict, image, 1000, 1000)
    values = sliding_windows(predict, image, 1000, 1000)
    assert (values.gather(0, found[None])[0] >= values.amax(0) - 1e-12).all()


def test_only_clusters_that_can_win_are_compared(blocks):
    """The work is that of the few, however many clusters there are."""
    small, large = 16, 512
    for clusters in (small, large):
        logits = torch.full((clusters, 20, 20), -50.0)
        logits[:4] = smooth(4, 20, 20, 0, torch.float32)
        blocks.clear()
        result = sliding_clusters(
            lambda crops, logits=logits: (logits[None], crops.shape[2:]),
            torch.zeros(3, 400, 400), 1000, 1000,
        )  # fmt: skip
        assert max(blocks) <= 4
        assert set(result.unique().tolist()) <= {0, 1, 2, 3}


def test_ties_go_to_the_lower_index():
    logits = torch.zeros(5, 3, 3)
    logits[2:] = 1
    found = sliding_clusters(lambda c: (logits[None], (90, 90)), torch.zeros(3, 90, 90), 99, 99)
    assert (found == 2).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_the_result_s_type(dtype):
    def run(**options):
        return sliding_clusters(coarse((6, 6), 9), torch.zeros(3, 200, 200), 999, 999, **options)

    found = run(dtype=dtype)
    assert found.dtype == dtype
    assert torch.equal(found.long(), run())


def test_a_grid_as_fine_as_the_pixels_is_compared_directly(blocks):
    sliding_clusters(coarse((40, 40), 4), torch.zeros(3, 44, 44), 99, 99)
    assert not blocks


def test_pixels_are_never_held_k_times(monkeypatch):
    """The largest tensor is a few maps of 64 thousand pixels, however large the image."""
    largest = 0
    addcmul = torch.addcmul

    def watched(*tensors):
        nonlocal largest
        result = addcmul(*tensors)
        largest = max(largest, result.numel())
        return result

    monkeypatch.setattr(torch, "addcmul", watched)
    sliding_clusters(coarse((6, 6), 9), torch.zeros(3, 1500, 2000), 9999, 9999)
    assert 0 < largest <= 1 << 16
