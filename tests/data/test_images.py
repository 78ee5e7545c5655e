"""Every kind of file that users have becomes upright uint8 RGB, or one clear line."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nefkern.data import read_annotation, read_image
from nefkern.runtime.errors import UserError


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def gray_png(path: Path, rows: list[list[int]], depth: int) -> None:
    """Write a grayscale PNG of any bit depth (PIL writes only 1, 8 and 16)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    def packed(row: list[int]) -> bytes:
        bits = "".join(f"{value:0{depth}b}" for value in row)
        bits += "0" * (-len(bits) % 8)
        return b"\0" + bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))

    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), depth, 0, 0, 0, 0)
    data = zlib.compress(b"".join(packed(row) for row in rows))
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp", "ppm"])
def test_lossless_formats_keep_every_pixel(tmp_path, suffix, picture):
    path = tmp_path / f"image.{suffix}"
    picture(31, 22).save(path, **({"lossless": True} if suffix == "webp" else {}))
    image = read_image(path)
    assert image.dtype == torch.uint8
    assert torch.equal(image, pixels(picture(31, 22)))


UNDO = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_an_annotation_is_applied(tmp_path, orientation):
    labels = np.arange(6, dtype=np.uint8).reshape(2, 3)
    stored = Image.fromarray(labels)
    stored = stored.transpose(UNDO[orientation]) if orientation > 1 else stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "mask.png", exif=exif)
    read = read_annotation(tmp_path / "mask.png", num_classes=6, size=(2, 3))
    assert read.tolist() == labels.tolist()


def test_an_annotation_on_its_side(tmp_path):
    Image.fromarray(np.zeros((5, 7), np.uint8)).save(tmp_path / "mask.png")
    with pytest.raises(UserError, match=r"5 x 7 pixels, it has 7 x 5; .* EXIF orientation"):
        read_annotation(tmp_path / "mask.png", num_classes=2, size=(7, 5))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation, picture):
    upright = picture(48, 32)
    stored = upright.transpose(UNDO[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "phone.png", exif=exif)
    assert torch.equal(read_image(tmp_path / "phone.png"), pixels(upright))


def test_grayscale_and_palette_become_rgb(tmp_path, picture):
    gray = picture(20, 10).convert("L")
    gray.save(tmp_path / "gray.png")
    assert torch.equal(read_image(tmp_path / "gray.png"), pixels(gray.convert("RGB")))
    palette = picture(20, 10).quantize(64)
    palette.save(tmp_path / "palette.png")
    assert torch.equal(read_image(tmp_path / "palette.png"), pixels(palette.convert("RGB")))


def test_transparency_lies_over_white(tmp_path):
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[..., 0] = 200
    rgba[:, 1, 3], rgba[:, 2, 3] = 128, 255
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    image = read_image(tmp_path / "rgba.png")
    assert image[:, 0, 0].tolist() == [255, 255, 255]
    assert image[:, 0, 2].tolist() == [200, 0, 0]
    assert image[1, 0, 1].item() == pytest.approx(127, abs=1)


def test_transparent_palette_entry_lies_over_white(tmp_path):
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([9, 9, 9, 50, 60, 70])
    palette.save(tmp_path / "p.png", transparency=0)
    image = read_image(tmp_path / "p.png")
    assert image[:, 0, 0].tolist() == [255, 255, 255]
    assert image[:, 0, 1].tolist() == [50, 60, 70]


def test_cmyk_jpeg_keeps_its_colours(tmp_path, picture):
    image = picture(64, 64)
    image.convert("CMYK").save(tmp_path / "print.jpg", quality=95)
    difference = read_image(tmp_path / "print.jpg").int() - pixels(image).int()
    assert difference.abs().float().mean() < 4


def test_16_bits_are_scaled_not_clipped(tmp_path):
    values = np.array([[0, 257 * 100, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png")[:, 0].tolist() == [[0, 100, 255]] * 3


@pytest.mark.parametrize(("dtype", "text"), [(np.float32, "floating-point"), (np.int32, "-7 to 9")])
def test_pixels_without_a_range_are_an_error(tmp_path, dtype, text):
    Image.fromarray(np.array([[-7, 9]], dtype)).save(tmp_path / "raw.tif")
    with pytest.raises(UserError, match=f"raw.tif.*{text}"):
        read_image(tmp_path / "raw.tif")


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_truncated_images_are_detected(tmp_path, suffix, picture, truncate):
    path = tmp_path / f"half.{suffix}"
    picture(200, 150).save(path)
    truncate(path)
    with pytest.raises(UserError, match=r"half\..*cannot read this image") as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"\x89PNG\r\n\x1a\n123"])
def test_files_that_are_no_images(tmp_path, content):
    path = tmp_path / "page.jpg"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"page\.jpg"):
        read_image(path)


def test_missing_file_is_named_once(tmp_path):
    with pytest.raises(UserError) as caught:
        read_image(tmp_path / "gone.jpg")
    assert str(caught.value).count("gone.jpg") == 1


def test_min_side_reads_large_jpegs_small(tmp_path, picture):
    path = tmp_path / "large.jpg"
    picture(1000, 640).save(path, quality=95)
    full, small = read_image(path), read_image(path, min_side=150)
    assert full.shape == (3, 640, 1000)
    assert small.shape == (3, 160, 250)  # 1/4: 1/8 would be below 150
    assert read_image(path, min_side=400).shape == full.shape
    assert torch.equal(small, read_image(path, min_side=150))
    averaged = torch.nn.functional.avg_pool2d(full.float(), 4)
    assert (averaged - small.float()).abs().mean() < 2


def test_min_side_holds_for_the_upright_image(tmp_path, picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(801, 403).save(tmp_path / "phone.jpg", exif=exif)
    assert read_image(tmp_path / "phone.jpg", min_side=100).shape == (3, 201, 101)


@pytest.mark.parametrize("mode", ["P", "L"])
def test_annotation_indices_survive(tmp_path, mode):
    labels = np.array([[0, 1, 2], [20, 255, 3]], np.uint8)
    mask = Image.fromarray(labels)
    if mode == "P":
        mask = Image.fromarray(labels, "P")
        mask.putpalette(list(range(256)) * 3)
    mask.save(tmp_path / "mask.png")
    read = read_annotation(tmp_path / "mask.png", num_classes=21, size=(2, 3))
    assert read.dtype == torch.uint8
    assert np.array_equal(read.numpy(), labels)


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_annotations_of_few_bits_are_not_stretched(tmp_path, depth):
    rows = [[0, 1, 2**depth - 1 if depth < 8 else 200], [1, 0, 1]]
    gray_png(tmp_path / "mask.png", rows, depth)
    read = read_annotation(tmp_path / "mask.png", num_classes=201, size=(2, 3))
    assert read.tolist() == rows


def test_annotation_of_another_size(tmp_path):
    Image.fromarray(np.zeros((5, 7), np.uint8)).save(tmp_path / "mask.png")
    with pytest.raises(UserError, match=r"mask\.png.*9 x 5 pixels, it has 7 x 5"):
        read_annotation(tmp_path / "mask.png", num_classes=2, size=(5, 9))


def test_annotation_index_outside_the_classes(tmp_path):
    Image.fromarray(np.array([[0, 37, 255]], np.uint8)).save(tmp_path / "mask.png")
    with pytest.raises(UserError, match=r"mask\.png: holds index 37.*21 classes \(0 to 20"):
        read_annotation(tmp_path / "mask.png", num_classes=21, size=(1, 3))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "I;16"])
def test_annotation_that_is_no_index_image(tmp_path, mode):
    Image.new(mode, (3, 2)).save(tmp_path / "mask.png")
    with pytest.raises(UserError, match=rf"mask\.png: expected an index image.*it is {mode}"):
        read_annotation(tmp_path / "mask.png", num_classes=2, size=(2, 3))


def test_annotations_in_grey_levels(tmp_path):
    Image.fromarray(np.array([[0, 128, 255]], np.uint8)).save(tmp_path / "mask.png")
    with pytest.raises(UserError, match=r"holds index 128.*its values are 0, 128, 255: if they"):
        read_annotation(tmp_path / "mask.png", num_classes=3, size=(1, 3))


@pytest.mark.parametrize(
    ("pixels", "hint"),
    [
        (np.array([[[1, 1, 1], [0, 0, 0]]], np.uint8), "its channels are equal: save one of them"),
        (np.array([[[9, 1, 1], [0, 0, 0]]], np.uint8), "write each colour's class index instead"),
        (np.array([[1, 0]], np.uint16), "if it holds indices, save them in 8 bits"),
    ],
)
def test_what_to_do_with_a_mask_that_holds_no_indices(tmp_path, pixels, hint):
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    with pytest.raises(UserError, match=hint):
        read_annotation(tmp_path / "mask.png", num_classes=2, size=(1, 2))


def test_truncated_annotation(tmp_path, truncate):
    noise = np.random.default_rng(0).integers(0, 2, (100, 100), np.uint8)
    Image.fromarray(noise).save(tmp_path / "mask.png")
    truncate(tmp_path / "mask.png")
    with pytest.raises(UserError, match=r"mask\.png: cannot read this annotation"):
        read_annotation(tmp_path / "mask.png", num_classes=2, size=(100, 100))
