"""Geometry and colours of the augmentation, and the evaluation protocols."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from nefkern.data import (
    VOID,
    Sample,
    TrainTransform,
    eval_transform,
    photometric_distortion,
    resize_shorter,
)
from nefkern.data.transforms import _reflect_to, _resize, _saturate_and_turn
from nefkern.runtime.errors import UserError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def image(width: int = 120, height: int = 90) -> torch.Tensor:
    """Smooth and colourful; resampling barely changes it."""
    y, x = torch.arange(height)[:, None], torch.arange(width)
    waves = torch.stack([(x / 17).sin() + 0 * y, (y / 13).cos() + 0 * x, ((x + y) / 23).sin()])
    return (127.5 + 100 * waves).round().to(torch.uint8)


def geometric(resize: int, crop: int, **options) -> TrainTransform:
    return TrainTransform(resize, crop, **{"flip": 0.0, "photometric": False, **options})


def positions(height: int, width: int) -> torch.Tensor:
    """An image whose first two channels tell where a pixel comes from (in 1/255 of the size)."""
    y = torch.linspace(0, 255, height)[:, None].expand(height, width)
    x = torch.linspace(0, 255, width)[None].expand(height, width)
    return torch.stack([y, x, y]).round().to(torch.uint8)


@settings(max_examples=30, deadline=None, derandomize=True)
@example(2, 2, 1, 1, 1)
@given(
    st.integers(1, 70), st.integers(1, 70), st.integers(1, 80), st.integers(1, 50), st.integers()
)
def test_any_size_gives_the_crop(height, width, resize, crop, seed):
    view = TrainTransform(resize, crop)(image(width, height), generator(seed % 2**63))
    assert view.shape == (3, crop, crop)
    assert view.dtype == torch.uint8
    assert view.is_contiguous()


def test_same_generator_same_view_and_no_global_randomness():
    transform, before = TrainTransform(64, 48), torch.get_rng_state()
    views = [transform(image(), generator(seed)) for seed in (1, 1, 2)]
    assert torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_the_image_is_left_alone():
    original = image()
    TrainTransform(64, 48)(original, generator())
    assert torch.equal(original, image())


def test_short_side_spans_the_ratio():
    transform, source = TrainTransform(100, 10), generator()
    drawn = [transform.short_side(source) for _ in range(2000)]
    assert min(drawn) in range(50, 54)
    assert max(drawn) in range(196, 201)
    assert np.mean(drawn) == pytest.approx(125, abs=3)


@pytest.mark.parametrize("short_side", [90, 135, 200])
def test_scale_is_the_drawn_one(short_side):
    """Along the view, positions advance as in an image of that shorter side."""
    view = geometric(90, 64)(positions(90, 120), generator(3), short_side=short_side).float()
    rows = (view[0, 60] - view[0, 3]).mean() / 57  # in 1/255 of the height per pixel
    columns = (view[1, :, 60] - view[1, :, 3]).mean() / 57
    assert rows == pytest.approx(255 / short_side, rel=0.04)
    assert columns == pytest.approx(255 / (short_side * 120 / 90), rel=0.04)


@pytest.mark.parametrize("short_side", [60, 90, 180])
def test_one_resampling_equals_resize_then_crop(short_side):
    """The view is, to within a pixel, a window of the whole resized image."""
    source = image(360, 270)
    view = geometric(90, 60)(source, generator(5), short_side=short_side).float()
    whole = F.resize(source, [short_side], antialias=True).float()
    view = view[:, ::4, ::4]  # sparse, for speed
    windows = whole.unfold(1, 57, 1).unfold(2, 57, 1)[..., ::4, ::4]  # [3, y, x, 15, 15]
    errors = (windows - view[:, None, None]).abs().mean(dim=(0, 3, 4))
    assert errors.min() < 4
    assert errors.mean() > 20  # so that the line above says something


def test_the_crop_reaches_every_border():
    transform, seen = geometric(60, 40, ratio=(1.0, 1.0)), []
    for seed in range(200):
        view = transform(positions(60, 90), generator(seed))
        seen.append([view[0].min(), view[0].max(), view[1].min(), view[1].max()])
    lows, highs = np.min(seen, axis=0), np.max(seen, axis=0)
    assert lows[0] == 0
    assert lows[2] == 0
    assert highs[1] == 255
    assert highs[3] == 255


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1), (8, 2), (40, 30)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_resizing_agrees_with_pil_down_to_one_pixel(size, channels_last):
    """From channels first, torch's own kernel fails for one pixel."""
    pixels = torch.randint(0, 256, (9, 7, 3), dtype=torch.uint8, generator=generator())
    resized = Image.fromarray(pixels.numpy()).resize(size[::-1], Image.Resampling.BILINEAR)
    source = pixels.permute(2, 0, 1)
    result = _resize(source if channels_last else source.contiguous(), list(size))
    assert (
        result.permute(1, 2, 0).int() - torch.from_numpy(np.array(resized)).int()
    ).abs().max() <= 1


def test_shrinking_is_antialiased():
    """A fine chequerboard becomes gray, not a coarse pattern."""
    board = (torch.arange(200)[:, None] + torch.arange(200)) % 2 * 255
    view = geometric(50, 40)(board.to(torch.uint8).expand(3, -1, -1), generator(), short_side=50)
    assert (view.float() - 127.5).abs().max() < 20


def test_smaller_images_are_continued_by_reflection():
    row = torch.tensor([10, 20, 30], dtype=torch.uint8).expand(3, 1, 3)
    assert _reflect_to(row, 9)[0, 4].tolist() == [20, 30, 20, 10, 20, 30, 20, 10, 20]
    view = geometric(30, 64)(image(40, 30), generator(), short_side=30)
    assert torch.equal(view[:, 17:47, 12:52], image(40, 30))  # whole and centred
    assert torch.equal(view[:, 16], view[:, 18])
    assert torch.equal(view[:, :, 11], view[:, :, 13])


@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_reflection_of_very_small_images(length):
    padded = _reflect_to(positions(length, length), 50)
    assert padded.shape == (3, 50, 50)
    start = (50 - length) // 2
    window = slice(start, start + length)
    assert torch.equal(padded[:, window, window], positions(length, length))


def test_extreme_shapes_stay_cheap():
    """Scaled as a whole this image would have 6 million columns."""
    view = geometric(600, 32)(image(20000, 2), generator())
    assert view.shape == (3, 32, 32)


def test_flip_mirrors_with_its_probability():
    source = image(50, 50)
    plain = geometric(50, 50, ratio=(1, 1))(source, generator())
    assert torch.equal(plain, source)
    mirrored = geometric(50, 50, ratio=(1, 1), flip=1.0)(source, generator())
    assert torch.equal(mirrored, source.flip(2))
    half = geometric(50, 50, ratio=(1, 1), flip=0.5)
    flips = sum(torch.equal(half(source, generator(s)), source.flip(2)) for s in range(200))
    assert 75 < flips < 125


@pytest.mark.parametrize("hue", [-0.1, -0.04, 0.0, 0.1])
@pytest.mark.parametrize("saturation", [0.5, 1.0, 1.5])
def test_saturation_and_hue_are_those_of_hsv(saturation, hue):
    pixels = torch.rand(3, 6, 30, generator=generator(), dtype=torch.float64)
    pixels[:, 0, :3] = torch.tensor([[0.0, 1.0, 0.3]] * 3)  # black, white, gray
    pixels[:, 0, 3:6] = torch.eye(3)
    changed = _saturate_and_turn(pixels, saturation, hue).flatten(1).T
    for before, after in zip(pixels.flatten(1).T.tolist(), changed.tolist(), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*before)
        expected = colorsys.hsv_to_rgb((h + hue) % 1, min(1, s * saturation), v)
        assert after == pytest.approx(expected, abs=1e-6)


def test_photometric_distortion_stays_in_its_ranges():
    gray = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    values = [photometric_distortion(gray, generator(s))[:, 0, 0] for s in range(400)]
    assert all(value.unique().numel() == 1 for value in values)  # gray stays gray
    levels = [int(value[0]) for value in values]
    assert (100 - 32) // 2 <= min(levels) <= 45
    assert 185 <= max(levels) <= 1.5 * (100 + 32)
    assert sum(level == 100 for level in levels) == pytest.approx(100, abs=40)  # a quarter


def test_photometric_distortion_of_extremes():
    extremes = torch.tensor([0, 255], dtype=torch.uint8).expand(3, 5, 2)
    for seed in range(50):
        changed = photometric_distortion(extremes, generator(seed))
        assert changed.dtype == torch.uint8
        assert (changed[..., 1] >= changed[..., 0]).all()  # nothing wraps around


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"resize": 0}, "resize"),
        ({"crop": 0}, "crop"),
        ({"ratio": (0.0, 1.0)}, "ratio"),
        ({"ratio": (2.0, 0.5)}, "ratio"),
        ({"flip": 1.5}, "flip"),
    ],
)
def test_arguments_out_of_range(arguments, text):
    with pytest.raises(UserError, match=text):
        TrainTransform(**{"resize": 8, "crop": 8, **arguments})


@pytest.mark.parametrize(("height", "width"), [(90, 120), (120, 90), (64, 64), (40, 200), (31, 33)])
def test_protocol_a_is_resize_then_centre_crop(height, width):
    labels = torch.arange(height * width).reshape(height, width).remainder(5).to(torch.uint8)
    sample = Sample("x", image(width, height), labels)
    result = eval_transform("crop320", size=64)(sample)
    assert result.image.shape == (3, 64, 64)
    assert result.annotation.shape == (64, 64)
    scale = 64 / min(height, width)
    for result_axis, length in ((1, height), (2, width)):
        centre = positions(height, width)[result_axis - 1]
        seen = eval_transform("crop320", size=64)(Sample("p", positions(height, width), centre))
        middle = seen.image[result_axis - 1].float().mean()
        assert middle == pytest.approx(127.5, abs=255 / length / scale + 1)  # centred
        # Image and annotation show the same place.
        shift = (seen.image[result_axis - 1].float() - seen.annotation.float()).mean()
        assert abs(shift) < 0.5 * 255 / length
    assert sample.annotation.shape == (height, width)  # the argument is unchanged


def test_protocol_a_makes_no_new_labels():
    labels = torch.tensor([[0, 10], [VOID, 200]], dtype=torch.uint8)
    labels = labels.repeat_interleave(37, 0).repeat_interleave(41, 1)
    result = eval_transform("crop320", size=50)(Sample("x", image(82, 74), labels))
    assert set(result.annotation.unique().tolist()) == {0, 10, VOID, 200}
    assert result.annotation.dtype == torch.uint8


def test_protocol_a_has_side_320_and_needs_no_annotation():
    result = eval_transform("crop320")(Sample("x", image(50, 40)))
    assert result.image.shape == (3, 320, 320)
    assert result.annotation is None


def test_protocol_b_changes_nothing():
    sample = Sample("x", image(), torch.zeros(90, 120, dtype=torch.uint8))
    assert eval_transform("full")(sample) is sample


@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [
        ((375, 500), 520, (520, 693)),  # the paper's shorter sides
        ((1024, 2048), 1024, (1024, 2048)),
        ((683, 512), 512, (683, 512)),
        ((90, 60), 30, (45, 30)),
        ((4, 1000), 100, (6, 1600)),  # a strip is enlarged to 16 shorter sides
        ((4, 4000), 100, (4, 4000)),
    ],
)
def test_shorter_side(size, side, expected):
    source = positions(*size)
    resized = resize_shorter(source, side)
    assert resized.shape == (3, *expected)
    assert resized.dtype == torch.uint8
    assert abs(resized.float().mean() - source.float().mean()) < 1
    if size == expected:
        assert torch.equal(resized, source)
    with pytest.raises(UserError, match="shorter side: expected a positive number"):
        resize_shorter(source, 0)


def test_unknown_protocol_or_size():
    with pytest.raises(UserError, match="'crop320' or 'full', got 'sliding'"):
        eval_transform("sliding")
    with pytest.raises(UserError, match="evaluation size"):
        eval_transform("crop320", size=0)
