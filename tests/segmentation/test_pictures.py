import io

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.color import rgb2lab

from nefkern.segmentation.pictures import (
    boundaries,
    colorize,
    grid,
    index_image,
    overlay,
    palette,
)


def closest(colours):
    """The smallest distance between two colours in CIELAB; about 2.3 is just noticeable."""
    lab = rgb2lab(colours[None].astype(np.uint8))[0]
    distance = np.linalg.norm(lab[:, None] - lab[None], axis=-1)
    return distance[~np.eye(len(colours), dtype=bool)].min()


@pytest.mark.parametrize(("n", "least"), [(8, 40), (32, 12), (256, 5), (512, 4)])
def test_colours_can_be_told_apart(n, least):
    assert closest(palette(n)) > least


def test_no_colour_is_near_the_black_of_void():
    assert rgb2lab(palette(256)[None])[0, :, 0].min() > 20


def test_palettes_extend_each_other_and_never_change():
    assert (palette(256)[:40] == palette(40)).all()
    assert palette(0).shape == (0, 3)
    with pytest.raises(ValueError, match="read-only"):
        palette(8)[0] = 0
    # The same on every machine: these values may only change on purpose.
    assert palette(3).tolist() == PALETTE_OF_THREE


PALETTE_OF_THREE = [[27, 121, 201], [255, 228, 0], [228, 81, 0]]


def test_more_colours_than_there_are_repeat():
    assert palette(20_000).shape == (20_000, 3)


def test_colorize_by_hand():
    colours = np.array([[1, 2, 3], [4, 5, 6]], np.uint8)
    index = torch.tensor([[0, 1], [255, -1]])
    painted = colorize(index, colours)
    assert painted.dtype == np.uint8
    assert painted.tolist() == [[[1, 2, 3], [4, 5, 6]], [[0, 0, 0], [0, 0, 0]]]


def test_a_colour_does_not_depend_on_the_rest_of_the_picture():
    small, large = np.array([[3]]), np.array([[3, 700]])
    assert (colorize(small)[0, 0] == colorize(large)[0, 0]).all()


def test_boundaries_are_one_pixel_wide():
    index = np.zeros((4, 6), int)
    index[:, 3:] = 1
    edge = boundaries(index)
    assert edge[:, 2].all()
    assert edge.sum() == 4
    assert not boundaries(np.zeros((1, 1), int)).any()


def test_overlay_shows_image_clusters_blend():
    image = torch.full((3, 20, 30), 100, dtype=torch.uint8)
    clusters = torch.zeros(20, 30, dtype=torch.int64)
    clusters[:, 15:] = 1
    picture = np.array(overlay(image, clusters))
    assert picture.shape == (20, 3 * 30 + 2 * 8, 3)
    photo, painted, blend = picture[:, :30], picture[:, 38:68], picture[:, 76:]
    assert (photo == 100).all()
    assert (painted[3, 3] == palette(1)[0]).all()
    assert (painted[3, 20] == palette(2)[1]).all()
    assert (painted[3, 14] == 0).all()
    assert (blend[3, 14] == 255).all()
    expected = (100 + palette(1)[0].astype(int)) / 2
    assert np.abs(blend[3, 3] - expected).max() <= 0.5


def test_a_large_image_is_drawn_at_a_size_to_look_at():
    image = torch.zeros(3, 1500, 3000, dtype=torch.uint8)
    image[:, :, 1500:] = 200
    clusters = (torch.arange(3000) >= 1500).long().expand(1500, -1)
    picture = np.array(overlay(image, clusters))
    assert picture.shape == (1024, 3 * 2048 + 2 * 8, 3)
    photo, painted = picture[:, :2048], picture[:, 2056 : 2056 + 2048]
    assert (photo[:, :1020] == 0).all()
    assert (photo[:, 1028:] == 200).all()
    assert (painted[:, :1023] == palette(2)[0]).all()
    assert (painted[:, 1024:] == palette(2)[1]).all()


def test_a_small_panel_shows_the_clusters_at_its_pixels_centres():
    clusters = torch.arange(35).view(5, 7)
    picture = np.array(overlay(torch.zeros(3, 5, 7, dtype=torch.uint8), clusters, longest=3))
    assert picture.shape == (2, 3 * 3 + 2 * 8, 3)
    # Centres of 2 rows of 5, and of 3 columns of 7: 1.25, 3.75; 1.17, 3.5, 5.83.
    colours = palette(256)[clusters[[1, 3]][:, [1, 3, 5]].numpy()]
    edge = np.array([[1, 1, 1], [1, 1, 0]], bool)
    assert (picture[:, 11:14][~edge] == colours[~edge]).all()
    assert (picture[:, 11:14][edge] == 0).all()


def test_overlay_takes_tensors_arrays_and_pictures():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    clusters = np.arange(35).reshape(5, 7)
    first = overlay(torch.from_numpy(pixels).permute(2, 0, 1), torch.from_numpy(clusters))
    assert first.tobytes() == overlay(pixels, clusters).tobytes()
    assert first.tobytes() == overlay(Image.fromarray(pixels), clusters).tobytes()


def test_overlay_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"image is \(4, 4\) \(H, W\) but clusters \(4, 5\)"):
        overlay(torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(4, 5, dtype=torch.int64))


def test_grid_of_unequal_pictures():
    small, large = np.zeros((2, 3, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)
    sheet = np.array(grid([[small, large], [large]]))
    assert sheet.shape == (4 + 8 + 4, 5 + 8 + 5, 3)
    assert (sheet[5:11] == 255).all()
    assert (sheet[:2, :3] == 0).all()
    assert (sheet[2:4, :5] == 255).all()


@pytest.mark.parametrize(
    ("largest", "mode"), [(0, "P"), (255, "P"), (256, "I;16"), (65535, "I;16")]
)
def test_index_images_keep_the_indices(largest, mode):
    index = torch.randint(0, largest + 1, (9, 11), generator=torch.Generator().manual_seed(0))
    index[0, 0] = largest
    file = io.BytesIO()
    index_image(index).save(file, "PNG")
    read = Image.open(file)
    assert read.mode == mode
    assert np.array(read).tolist() == index.tolist()


def test_the_format_can_be_fixed_for_all_images():
    assert index_image(torch.zeros(2, 2, dtype=torch.int64), 256).mode == "P"
    assert index_image(torch.zeros(2, 2, dtype=torch.int64), 257).mode == "I;16"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_index_images_of_any_integers(dtype):
    picture = index_image(torch.tensor([[0, 255 if dtype == torch.uint8 else 127]]).to(dtype))
    assert picture.mode == "P"


def test_index_images_show_the_palette():
    picture = index_image(torch.tensor([[0, 7]]))
    assert (np.array(picture.convert("RGB"))[0, 1] == palette(8)[7]).all()


@pytest.mark.parametrize("wrong", [-1, 65536])
def test_indices_that_do_not_fit_are_refused(wrong):
    with pytest.raises(ValueError, match=r"0\.\.65535"):
        index_image(torch.tensor([[0, wrong]]))
