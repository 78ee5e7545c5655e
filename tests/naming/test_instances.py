"""Regions, outlines and runs of class maps, against scikit-image's and COCO's own rasterisers."""

from __future__ import annotations

import numpy as np
import pytest

from nefkern.naming.instances import box_runs, coco_rle, instances, polygon, without_specks

skimage = pytest.importorskip("skimage")
coco = pytest.importorskip("pycocotools.mask")
VOID = 255


def blobs(seed: int, classes: int = 4, size=(70, 90)) -> np.ndarray:
    """Smooth regions of every class, with holes and void."""
    from scipy.ndimage import gaussian_filter

    noise = np.random.default_rng(seed).normal(size=(classes + 1, *size))
    index = np.stack([gaussian_filter(n, 4) for n in noise]).argmax(0).astype(np.uint8)
    return np.where(index == classes, VOID, index).astype(np.uint8)


def disc_with_holes() -> np.ndarray:
    y, x = np.mgrid[:80, :90]
    inside = (y - 40) ** 2 + (x - 45) ** 2 < 35**2
    for cy, cx in ((30, 35), (50, 55), (45, 25)):
        inside &= (y - cy) ** 2 + (x - cx) ** 2 >= 7**2
    return np.where(inside, 0, VOID).astype(np.uint8)


def whole(instance, size) -> np.ndarray:
    mask = np.zeros(size, bool)
    left, top, w, h = instance.box
    mask[top : top + h, left : left + w] = instance.mask
    return mask


@pytest.mark.parametrize("seed", range(3))
def test_instances_partition_the_named_pixels(seed):
    classes = blobs(seed)
    again, times = np.full_like(classes, VOID), np.zeros(classes.shape, int)
    for instance in instances(classes):
        mask = whole(instance, classes.shape)
        assert instance.area == mask.sum()
        assert skimage.measure.label(mask, connectivity=1).max() == 1
        again[mask] = instance.label
        times += mask
    assert np.array_equal(again, classes)
    assert times.max() == 1


def test_corners_do_not_connect_and_class_254_is_one():
    classes = np.full((4, 4), VOID, np.uint8)
    classes[0, 0] = classes[1, 1] = 254
    assert [(i.label, i.area) for i in instances(classes)] == [(254, 1), (254, 1)]


@pytest.mark.parametrize("classes", [blobs(0), blobs(1), disc_with_holes()])
def test_polygons_keep_the_pixels_and_the_holes(classes):
    """By COCO's rasteriser and by scikit-image's, which fill differently."""
    for instance in instances(classes):
        if instance.area < 30:
            continue
        points, mask = polygon(instance), whole(instance, classes.shape)
        by_coco = coco.decode(
            coco.frPyObjects([[c for point in points for c in point]], *mask.shape)
        )[..., 0].astype(bool)
        rows_cols = np.array(points)[:, ::-1] - 0.5
        by_skimage = skimage.draw.polygon2mask(mask.shape, rows_cols)
        for drawn in (by_coco, by_skimage):
            assert (drawn & mask).sum() / (drawn | mask).sum() > 0.9
        assert len(points) < mask.sum()
    if classes is disc_with_holes:
        assert not by_coco[30, 35]


def test_holes_stay_open():
    (instance,) = instances(disc_with_holes())
    flat = [[c for point in polygon(instance) for c in point]]
    drawn = coco.decode(coco.frPyObjects(flat, 80, 90))[..., 0]
    assert [drawn[y, x] for y, x in ((30, 35), (50, 55), (45, 25), (40, 45))] == [0, 0, 0, 1]


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (2, 2), (9, 1)])
def test_small_regions_are_polygons_too(shape):
    classes = np.full((12, 12), VOID, np.uint8)
    classes[: shape[0], 2 : 2 + shape[1]] = 3
    (instance,) = instances(classes)
    points = np.array(polygon(instance))
    assert len(points) >= 3
    assert (points.min(0) >= [2, 0]).all()
    assert (points.max(0) <= [2 + shape[1], shape[0]]).all()


def test_runs_are_exactly_the_pixels():
    classes = blobs(2)
    for instance in instances(classes):
        rle = coco_rle(instance, classes.shape)
        assert np.array_equal(coco.decode(rle).astype(bool), whole(instance, classes.shape))
        runs = box_runs(instance)
        values = np.arange(len(runs)) % 2 == 1
        assert np.array_equal(np.repeat(values, runs), instance.mask.ravel())


@pytest.mark.parametrize("seed", range(3))
def test_no_speck_is_left_and_nothing_else_moves(seed):
    random = np.random.default_rng(seed)
    classes = blobs(seed)
    noisy = np.where(random.random(classes.shape) < 0.03, 2, classes).astype(np.uint8)
    clean = without_specks(noisy, 25)
    regions = skimage.measure.label(clean, background=-1, connectivity=1)
    assert np.bincount(regions.ravel())[1:].min() >= 25
    before = skimage.measure.label(noisy, background=-1, connectivity=1)
    large = np.bincount(before.ravel())[before] >= 25
    assert np.array_equal(clean[large], noisy[large])
    assert (clean != noisy).any()


def test_a_hole_is_filled_and_a_map_of_specks_stays():
    classes = np.zeros((10, 10), np.uint8)
    classes[4:6, 4:6] = VOID
    assert not without_specks(classes, 5).any()
    assert np.array_equal(without_specks(classes, 4), classes)
    assert np.array_equal(without_specks(classes, 1000), classes)
