"""Samples of more than 8 bits, planes, bands and pages: the right 8 bits, or one clear line."""

from __future__ import annotations

import logging
import struct
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from nefkern.data import levels, read_image
from nefkern.data.images import upright_pixels
from nefkern.runtime.errors import UserError

RANDOM = np.random.default_rng(0)
RGB = RANDOM.integers(0, 65536, (20, 30, 3)).astype(np.uint16)
RGB[0, 0] = 65535


@pytest.fixture(autouse=True)
def untold(monkeypatch):
    """What is told once a process is told once a test; no setting of the caller's."""
    monkeypatch.setattr(levels, "_told", set())
    monkeypatch.delenv("NEFKERN_WHITE", raising=False)
    monkeypatch.delenv("NEFKERN_MAX_PIXELS", raising=False)


def expected(samples: np.ndarray, white: float = 65535) -> np.ndarray:
    return np.floor(samples.astype(np.float64) * 255 / white + 0.5).clip(0, 255)


def read(path: Path) -> np.ndarray:
    return read_image(path).permute(1, 2, 0).numpy()


def lzw(data: bytes) -> bytes:
    """LZW as TIFF has it, of 9-bit literals alone."""
    codes = "".join(("" if i % 200 else f"{256:09b}") + f"{b:09b}" for i, b in enumerate(data))
    codes += f"{257:09b}"
    codes += "0" * (-len(codes) % 8)
    return int(codes, 2).to_bytes(len(codes) // 8, "big")


def retag(path: Path, tag: int, value: int) -> None:
    """Change a tag of one short in a little-endian TIFF."""
    data = bytearray(path.read_bytes())
    (offset,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, offset)
    entries = [offset + 2 + 12 * i for i in range(count)]
    (entry,) = [e for e in entries if struct.unpack_from("<H", data, e)[0] == tag]
    struct.pack_into("<H", data, entry + 8, value)
    path.write_bytes(data)


def lzw_tiff(path: Path, samples: np.ndarray) -> None:
    strip = lzw(samples.astype("<u2").tobytes())
    tifffile.imwrite(
        path, iter([strip]), shape=samples.shape, dtype=np.uint16, photometric="rgb",
        compression="zlib", rowsperstrip=len(samples),
    )  # fmt: skip
    retag(path, 259, 5)


def png(path: Path, samples: np.ndarray) -> None:
    """A PNG of 16 bits in one to four channels (Pillow writes only one)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    height, width, channels = samples.shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    parts = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0))
    parts += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


# ---- what is right ----


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"planarconfig": "separate"},
        {"planarconfig": "separate", "tile": (16, 16)},
        {"tile": (16, 16)},
        {"bigtiff": True},
        {"byteorder": ">"},
        {"compression": "zlib", "predictor": True},
    ],
    ids=str,
)
def test_a_tiff_of_16_bits_in_every_layout(tmp_path, options):
    planar = options.get("planarconfig") == "separate"
    data = np.moveaxis(RGB, 2, 0) if planar else RGB
    if options.get("byteorder") == ">":
        data = data.astype(">u2")
    tifffile.imwrite(tmp_path / "a.tif", data, photometric="rgb", **options)
    assert (read(tmp_path / "a.tif") == expected(RGB)).all()


def test_an_opened_image_that_pillow_reads_wrongly(tmp_path):
    planes = np.moveaxis(RGB, 2, 0)
    tifffile.imwrite(tmp_path / "a.tif", planes, photometric="rgb", planarconfig="separate")
    tifffile.imwrite(tmp_path / "b.tif", RGB, photometric="rgb")
    with (
        Image.open(tmp_path / "a.tif") as image,
        pytest.raises(UserError, match="wrong colours; give the path of the file"),
    ):
        upright_pixels(image, "image")
    with Image.open(tmp_path / "b.tif") as image:
        assert (upright_pixels(image, "image").permute(1, 2, 0).numpy() == RGB >> 8).all()


def test_planes_of_8_bits(tmp_path):
    planes = np.moveaxis(RGB >> 8, 2, 0).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", planes, photometric="rgb", planarconfig="separate")
    assert (read(tmp_path / "a.tif") == RGB >> 8).all()


def test_white_is_zero(tmp_path):
    for name, samples in (("deep", RGB[..., 0]), ("flat", (RGB[..., 0] >> 8).astype(np.uint8))):
        tifffile.imwrite(tmp_path / f"{name}.tif", samples, photometric="miniswhite")
    assert (read(tmp_path / "deep.tif")[..., 0] == 255 - expected(RGB[..., 0])).all()
    assert (read(tmp_path / "flat.tif")[..., 0] == 255 - (RGB[..., 0] >> 8)).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("channels", [1, 3])
def test_floats_from_0_to_1(tmp_path, dtype, channels):
    samples = RANDOM.random((20, 30, channels)).astype(dtype)
    kind = "rgb" if channels == 3 else "minisblack"
    tifffile.imwrite(tmp_path / "a.tif", samples.squeeze(), photometric=kind)
    wanted = np.broadcast_to(expected(samples, 1), (20, 30, 3))
    assert (read(tmp_path / "a.tif") == wanted).all()


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("bands", [3, 4, 5, 12])
def test_the_first_three_of_many_bands(tmp_path, caplog, bands, planar):
    samples = RANDOM.integers(0, 65536, (20, 30, bands)).astype(np.uint16)
    samples[0, 0] = 65535
    data = np.moveaxis(samples, 2, 0) if planar == "separate" else samples
    tifffile.imwrite(tmp_path / "a.tif", data, photometric="minisblack", planarconfig=planar)
    assert (read(tmp_path / "a.tif") == expected(samples[..., :3])).all()
    told = f"a.tif: {bands} bands, the first three" in caplog.text
    assert told == (bands > 3)


def test_transparency_in_16_bits_lies_over_white(tmp_path):
    samples = np.array([[[65535, 0, 0, 65535], [65535, 0, 0, 0]]], np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", samples, photometric="rgb", extrasamples=["unassalpha"])
    png(tmp_path / "a.png", samples)
    for name in ("a.tif", "a.png"):
        assert read(tmp_path / name).tolist() == [[[255, 0, 0], [255, 255, 255]]], name


def test_cmyk_of_16_bits_is_that_of_8(tmp_path):
    cmyk = RANDOM.integers(0, 256, (20, 30, 4)).astype(np.uint8)
    for name, samples in (("flat", cmyk), ("deep", cmyk.astype(np.uint16) * 257)):
        tifffile.imwrite(tmp_path / f"{name}.tif", samples, photometric="separated")
    assert (read(tmp_path / "deep.tif") == read(tmp_path / "flat.tif")).all()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_png_of_16_bits(tmp_path, channels):
    samples = np.concatenate([RGB, np.full((20, 30, 1), 65535, np.uint16)], 2)
    chosen = {1: [0], 2: [0, 3], 3: [0, 1, 2], 4: [0, 1, 2, 3]}[channels]
    png(tmp_path / "a.png", samples[..., chosen])
    colours = RGB if channels > 2 else RGB[..., :1]
    assert (read(tmp_path / "a.png") == expected(colours)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("bits", [8, 16])
def test_the_orientation_of_a_tiff(tmp_path, orientation, bits):
    samples = RGB if bits == 16 else (RGB >> 8).astype(np.uint8)
    tag = [(274, "H", 1, orientation, True)]
    tifffile.imwrite(tmp_path / "a.tif", samples, photometric="rgb", extratags=tag)
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray((RGB >> 8).astype(np.uint8)).save(tmp_path / "a.png", exif=exif)
    difference = read(tmp_path / "a.tif").astype(int) - read(tmp_path / "a.png")
    assert np.abs(difference).max() <= 1  # the one is rounded, the other cut


def test_the_first_of_several_pages(tmp_path, caplog):
    pages = RANDOM.integers(0, 256, (4, 20, 30, 3)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", pages, photometric="rgb")
    assert (read(tmp_path / "a.tif") == pages[0]).all()
    assert "a.tif: 4 pages, the first is taken" in caplog.text


# ---- where white is ----


@pytest.mark.parametrize(
    ("high", "white"), [(200, 255), (255, 255), (300, 4095), (4095, 4095), (4096, 65535)]
)
@pytest.mark.parametrize("kind", ["gray.png", "rgb.png", "gray.tif", "rgb.tif", "planar.tif"])
def test_few_bits_in_16_are_not_black(tmp_path, caplog, high, white, kind):
    """The steps are few, so that the images of a folder keep their brightness to each other."""
    samples = RANDOM.integers(0, high + 1, (20, 30, 1 if "gray" in kind else 3)).astype(np.uint16)
    samples[0, 0] = high
    if kind.endswith("png"):
        png(tmp_path / kind, samples)
    elif kind == "planar.tif":
        planes = np.moveaxis(samples, 2, 0)
        tifffile.imwrite(tmp_path / kind, planes, photometric="rgb", planarconfig="separate")
    else:
        photometric = "rgb" if "rgb" in kind else "minisblack"
        tifffile.imwrite(tmp_path / kind, samples.squeeze(), photometric=photometric)
    wanted = np.broadcast_to(expected(samples, white), (20, 30, 3))
    for _ in range(2):
        assert (read(tmp_path / kind) == wanted).all()
    assert len(caplog.records) == 1
    assert f"{kind}: " in caplog.text
    assert "NEFKERN_WHITE=" in caplog.text


def test_a_bright_image_is_told_nothing(tmp_path, caplog):
    png(tmp_path / "a.png", RGB)
    read(tmp_path / "a.png")
    assert not caplog.records


def test_white_that_the_file_states(tmp_path, caplog):
    """A largest value of 3000 is what the image uses, 1023 is a depth."""
    samples = RANDOM.integers(0, 1001, (20, 30)).astype(np.uint16)
    for stated, white in ((1023, 1023), (4095, 4095), (3000, 4095)):
        tag = [(281, "H", 1, stated, True)]
        tifffile.imwrite(tmp_path / "a.tif", samples, extratags=tag)
        assert (read(tmp_path / "a.tif")[..., 0] == expected(samples, white)).all()
        assert bool(caplog.records) == (stated == 3000)


def test_12_bits_packed(tmp_path):
    """Two samples in three bytes; the tag says 12."""
    samples = RANDOM.integers(0, 4096, (20, 30)).astype(np.uint16)
    a, b = samples[:, ::2], samples[:, 1::2]
    packed = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], -1).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", packed.reshape(20, 45))
    retag(tmp_path / "a.tif", 256, 30)
    retag(tmp_path / "a.tif", 258, 12)
    assert (read(tmp_path / "a.tif")[..., 0] == expected(samples, 4095)).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_pnm_states_its_maximum(tmp_path, caplog, channels):
    samples = RANDOM.integers(0, 1001, (20, 30, channels)).astype(">u2")
    header = b"P%d 30 20 1023\n" % (5 if channels == 1 else 6)
    (tmp_path / "a.ppm").write_bytes(header + samples.tobytes())
    difference = read(tmp_path / "a.ppm") - expected(samples, 1023)
    assert np.abs(difference).max() <= 1
    assert not caplog.records


def test_a_pfm_is_of_floats(tmp_path):
    samples = np.array([[0, 0.5], [1, 0.25]], "<f4")
    (tmp_path / "a.ppm").write_bytes(b"Pf\n2 2\n-1.0\n" + samples[::-1].tobytes())
    assert (read(tmp_path / "a.ppm")[..., 0] == expected(samples, 1)).all()


def test_white_that_the_user_states(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("NEFKERN_WHITE", "10000")
    samples = RANDOM.integers(0, 12000, (20, 30)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", samples)
    tifffile.imwrite(tmp_path / "b.tif", samples.astype(np.float32))
    tifffile.imwrite(tmp_path / "c.tif", samples.astype(np.uint32) * 10)
    for name, factor in (("a", 1), ("b", 1), ("c", 10)):
        wanted = expected(samples * float(factor), 10000)
        assert (read(tmp_path / f"{name}.tif")[..., 0] == wanted).all(), name
    Image.new("L", (2, 2), 100).save(tmp_path / "d.png")  # 8 bits are as they are
    assert (read(tmp_path / "d.png") == 100).all()
    assert not caplog.records


# ---- what is refused ----


@pytest.mark.parametrize("text", ["white", "0", "-1", "nan", "inf"])
def test_white_that_is_no_white(tmp_path, monkeypatch, text):
    monkeypatch.setenv("NEFKERN_WHITE", text)
    png(tmp_path / "a.png", RGB)
    with pytest.raises(UserError, match=rf"NEFKERN_WHITE={text}: expected a number above 0"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("samples", "text"),
    [
        (np.array([[-7, 9]], np.int16), r"values -7 to 9; scale them"),
        (np.array([[-7, 9]], np.int8), r"values -7 to 9; scale them"),
        (np.array([[5, 70000]], np.uint32), r"values 5 to 70000; .*NEFKERN_WHITE=70000"),
        (np.array([[0, 900.5]], np.float32), r"values from 0 to 1, .* 0 to 900.5; .*WHITE=900.5"),
        (np.array([[-0.5, 0.5]]), r"floating-point pixels, .* it has -0.5 to 0.5; scale them"),
        (np.array([[0, np.nan]]), r"floating-point pixels, some of them NaN"),
        (np.array([[0, np.inf]]), r"floating-point pixels, .* 0 to inf; scale them"),
        (np.array([[1j, 2]], np.complex64), r"complex"),
    ],
)
def test_pixels_without_a_known_range(tmp_path, samples, text):
    tifffile.imwrite(tmp_path / "a.tif", samples)
    with pytest.raises(UserError, match=rf"a\.tif: .*{text}") as caught:
        read_image(tmp_path / "a.tif")
    assert "\n" not in str(caught.value)


def test_lzw_of_16_bits_with_pillow_alone(tmp_path):
    """Pillow takes the high bytes; where they say nothing, the package that can read it is told."""
    lzw_tiff(tmp_path / "full.tif", RGB)
    lzw_tiff(tmp_path / "dark.tif", RGB >> 4)
    if find_spec("imagecodecs"):
        assert (read(tmp_path / "dark.tif") == expected(RGB >> 4, 4095)).all()
        return
    assert (read(tmp_path / "full.tif") == RGB >> 8).all()
    with pytest.raises(UserError, match=r"dark\.tif: 3 samples of 16 bits .*LZW.*imagecodecs"):
        read_image(tmp_path / "dark.tif")


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_a_truncated_tiff(tmp_path, compression, truncate):
    planes = RANDOM.integers(0, 65536, (3, 90, 90)).astype(np.uint16)
    options = {"photometric": "rgb", "planarconfig": "separate", "compression": compression}
    tifffile.imwrite(tmp_path / "a.tif", planes, **options)
    truncate(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"a\.tif: cannot read this image"):
        read_image(tmp_path / "a.tif")


# ---- large images ----


def test_an_image_beyond_pillow_s_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    Image.new("RGB", (40, 30), (1, 2, 3)).save(tmp_path / "a.png")
    assert (read(tmp_path / "a.png") == (1, 2, 3)).all()
    assert Image.MAX_IMAGE_PIXELS == 50  # the caller's own limit stays


@pytest.mark.parametrize("name", ["a.png", "a.tif", "deep.tif"])
def test_a_limit_with_a_way_out(tmp_path, monkeypatch, name):
    monkeypatch.setenv("NEFKERN_MAX_PIXELS", "500")
    if name == "deep.tif":
        tifffile.imwrite(tmp_path / name, np.zeros((3, 20, 30), np.uint16), photometric="rgb")
    else:
        Image.new("RGB", (30, 20)).save(tmp_path / name)
    with pytest.raises(UserError, match=r"30 × 20 are .*NEFKERN_MAX_PIXELS=600 in the env"):
        read_image(tmp_path / name)
    monkeypatch.setenv("NEFKERN_MAX_PIXELS", "600")
    assert read_image(tmp_path / name).shape == (3, 20, 30)


def test_the_limit_is_generous(tmp_path):
    """Of files that end after their header: 196 megapixels are tried, 78,400 refused."""
    Image.new("1", (2, 2)).save(tmp_path / "map.png")
    data = bytearray((tmp_path / "map.png").read_bytes())
    for side, message in ((14_000, "cannot read this image"), (280_000, "78,400 megapixels")):
        data[16:24] = struct.pack(">II", side, side)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
        (tmp_path / "map.png").write_bytes(data)
        with pytest.raises(UserError, match=message):
            read_image(tmp_path / "map.png")


@pytest.mark.parametrize("text", ["many", "0", "-5", "1e9"])
def test_a_limit_that_is_no_number(tmp_path, monkeypatch, text):
    monkeypatch.setenv("NEFKERN_MAX_PIXELS", text)
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=rf"NEFKERN_MAX_PIXELS={text}: expected a number"):
        read_image(tmp_path / "a.png")


def test_stripes_do_not_show(tmp_path, monkeypatch, picture):
    """Large images are converted in stripes, of every mode."""
    for mode in ("RGB", "RGBA", "P", "L", "CMYK"):
        image = picture(31, 22).convert(mode)
        path = tmp_path / f"{mode}.tif"
        image.save(path)
        whole = read(path)
        monkeypatch.setattr("nefkern.data.images._STRIPE", 100)
        assert (read(path) == whole).all(), mode
        monkeypatch.undo()


def test_told_on_the_package_s_logger(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="nefkern"):
        png(tmp_path / "a.png", RGB >> 4)
        read(tmp_path / "a.png")
    assert caplog.records[0].name == "nefkern.data.levels"
