"""The segment command: files, names, resolution, CRF, windows, and mistakes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nefkern.data import read_image
from nefkern.runtime.errors import UserError
from nefkern.segment import main, parser
from nefkern.segmentation.listing import image_files, output_names
from nefkern.segmentation.segmenter import Segmenter, occurring
from nefkern.segmentation.windows import window_starts
from tests.training.outcomes import trained

SIZES = {"wide.png": (120, 50), "tall.jpg": (40, 90), "large.png": (300, 260)}


@pytest.fixture(scope="module")
def pictures(photograph, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for seed, (name, size) in enumerate(SIZES.items()):
        photograph(*size, seed).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory) -> Path:
    return trained(pictures, tmp_path_factory.mktemp("runs") / "run")


def indices(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path)).astype(np.int64))


def test_every_image_at_its_own_resolution(run, pictures, tmp_path):
    assert main([str(run), *(str(pictures / n) for n in SIZES), "--out", str(tmp_path)]) == 0
    segmenter = Segmenter.load(run, "cpu")
    for name, (width, height) in SIZES.items():
        stem = name.partition(".")[0]
        clusters = indices(tmp_path / f"{stem}.clusters.png")
        assert clusters.shape == (height, width)
        assert torch.equal(clusters, segmenter(pictures / name))
        sheet = np.array(Image.open(tmp_path / f"{stem}.overlay.png"))
        assert sheet.shape == (height, 3 * width + 2 * 8, 3)
        assert (sheet[:, :width] == np.array(Image.open(pictures / name))).all()
    assert len(list(tmp_path.iterdir())) == 2 * len(SIZES)  # no temporary file stays


def test_sliding_windows_are_those_of_the_segmenters_logits(run, pictures, tmp_path):
    assert main([str(run), str(pictures / "large.png"), "--out", str(tmp_path), "--sliding"]) == 0
    expected = Segmenter.load(run, "cpu").logits(read_image(pictures / "large.png")).argmax(0)
    found = indices(tmp_path / "large.clusters.png")
    assert (found == expected).float().mean() > 0.999  # rounding decides ties
    whole = Segmenter.load(run, "cpu")(pictures / "large.png")
    assert (found != whole).any()


@pytest.mark.parametrize("options", [[], ["--sliding"]])
def test_crf_follows_the_image(run, pictures, tmp_path, options):
    """Neighbouring pixels of nearly one colour end in one segment more often than before."""
    pytest.importorskip("pydensecrf")
    image = str(pictures / "wide.png")
    assert main([str(run), image, "--out", str(tmp_path / "plain"), *options]) == 0
    assert main([str(run), image, "--out", str(tmp_path / "crf"), "--crf", *options]) == 0
    plain = indices(tmp_path / "plain" / "wide.clusters.png")
    refined = indices(tmp_path / "crf" / "wide.clusters.png")
    pixels = read_image(image).float()
    alike = (pixels[:, :, 1:] - pixels[:, :, :-1]).abs().amax(0) < 4

    def cuts(index):
        return (index[:, 1:] != index[:, :-1])[alike].sum()

    assert set(refined.unique().tolist()) <= set(plain.unique().tolist())
    assert (refined != plain).any()
    assert cuts(refined) <= cuts(plain)


def test_graph_follows_the_image_and_is_the_segmenters(run, pictures, tmp_path):
    image = str(pictures / "wide.png")
    assert main([str(run), image, "--out", str(tmp_path), "--edges", "graph"]) == 0
    refined = indices(tmp_path / "wide.clusters.png")
    segmenter = Segmenter.load(run, "cpu")
    plain = segmenter(image)
    assert torch.equal(refined, segmenter(image, edges="graph"))
    found = segmenter(read_image(image).float() / 255, edges="graph")
    assert (found == refined).float().mean() > 0.95, "the network sees other roundings"
    assert set(refined.unique().tolist()) <= set(plain.unique().tolist())
    pixels = read_image(image).float()
    alike = (pixels[:, :, 1:] - pixels[:, :, :-1]).abs().amax(0) < 4
    before, after = ((i[:, 1:] != i[:, :-1])[alike].sum() for i in (plain, refined))
    assert (refined != plain).any()
    assert after <= before
    windows = [str(run), str(pictures / "large.png"), "--sliding", "--edges", "graph"]
    assert main([*windows, "--out", str(tmp_path)]) == 0


def test_crf_is_a_kind_of_edges(run, pictures, tmp_path):
    pytest.importorskip("pydensecrf")
    image, found = str(pictures / "tall.jpg"), []
    for name, options in (("a", ["--crf"]), ("b", ["--edges", "crf", "--crf-workers", "0"])):
        assert main([str(run), image, "--out", str(tmp_path / name), *options]) == 0
        found.append(indices(tmp_path / name / "tall.clusters.png"))
    assert torch.equal(*found)
    assert torch.equal(found[0], Segmenter.load(run, "cpu")(image, edges="crf"))


def test_edges_that_are_none(run, pictures, tmp_path, capsys):
    options = [str(run), str(pictures), "--out", str(tmp_path / "o"), "--crf", "--edges", "graph"]
    assert main(options) == 2
    assert "--edges graph: expected crf, or no --crf beside it" in capsys.readouterr().err
    with pytest.raises(ValueError, match="edges: expected one of bilinear, graph, crf, got 'x'"):
        Segmenter.load(run, "cpu")(pictures / "wide.png", edges="x")


def test_crf_in_worker_processes_gives_the_same_files(run, pictures, tmp_path, capsys):
    """A bad image among them is reported as it is without a CRF."""
    pytest.importorskip("pydensecrf")
    small = tmp_path / "small.png"
    Image.new("RGB", (5, 40)).save(small)
    images = [str(pictures / "wide.png"), str(small), str(pictures / "tall.jpg")]
    for workers in ("0", "2"):
        out = ["--out", str(tmp_path / workers), "--crf", "--crf-workers", workers]
        assert main([str(run), *images, *out]) == 2
        printed, errors = capsys.readouterr()
        assert [line.rpartition(":")[0] for line in printed.splitlines()] == images[::2]
        assert f"error: {small}: 5 × 40 pixels" in errors
        assert "error: 1 of 3 images could not be segmented" in errors
    names = sorted(p.name for p in (tmp_path / "0").iterdir())
    assert len(names) == 4
    for name in names:
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_an_image_that_is_given_twice(run, pictures, tmp_path):
    """While one is refined the other is read."""
    pytest.importorskip("pydensecrf")
    image, out = str(pictures / "tall.jpg"), tmp_path / "o"
    assert main([str(run), image, image, "--out", str(out), "--crf", "--crf-workers", "1"]) == 0
    assert len(list(out.glob("*.clusters.png"))) == 2


def test_crf_workers_without_a_crf(run, pictures, tmp_path, capsys):
    options = [str(run), str(pictures), "--out", str(tmp_path / "o"), "--crf-workers", "1"]
    assert main(options) == 2
    assert "--crf-workers 1: expected --crf, or --edges crf, beside it" in capsys.readouterr().err


def test_flip_makes_a_mirrored_image_the_mirrored_segments(run, photograph, tmp_path):
    """Sides of whole patches, and windows that lie alike from both ends: the grids are the same."""
    image = photograph(112, 64, 5)
    image.save(tmp_path / "a.png")
    image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "b.png")
    for flags in ([], ["--flip"], ["--flip", "--sliding"]):
        out = tmp_path / "-".join(["out", *flags])
        files = [str(tmp_path / name) for name in ("a.png", "b.png")]
        assert main([str(run), *files, "--out", str(out), *flags]) == 0
        a, b = (indices(out / f"{name}.clusters.png") for name in "ab")
        agree = (b.flip(1) == a).float().mean()
        assert agree > 0.999 if flags else agree < 0.999
    found = Segmenter.load(run, "cpu", flip=True)(tmp_path / "a.png")
    assert torch.equal(found, indices(tmp_path / "out---flip" / "a.clusters.png"))


def test_a_folder_is_all_of_its_images(run, pictures, tmp_path):
    assert main([str(run), str(pictures), "--out", str(tmp_path / "new" / "deep")]) == 0
    names = {p.name for p in (tmp_path / "new" / "deep").glob("*.clusters.png")}
    assert names == {"wide.clusters.png", "tall.clusters.png", "large.clusters.png"}


def test_bad_images_are_reported_and_the_others_done(run, pictures, tmp_path, capsys):
    truncated = tmp_path / "truncated.jpg"
    truncated.write_bytes((pictures / "tall.jpg").read_bytes()[:400])
    small = tmp_path / "small.png"
    Image.new("RGB", (5, 40)).save(small)
    bad = [str(truncated), str(small), str(tmp_path / "missing.png")]
    good = str(pictures / "wide.png")
    assert main([str(run), *bad, good, "--out", str(tmp_path / "out")]) == 2
    errors = capsys.readouterr().err
    for name in bad:
        assert sum(name in line and "error: " in line for line in errors.splitlines()) == 1
    assert "error: 3 of 4 images could not be segmented" in errors
    assert "Traceback" not in errors
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "wide.clusters.png",
        "wide.overlay.png",
    ]


def test_names_do_not_move_the_cursor(run, pictures, tmp_path, capsys):
    for name in ("a\x1b[2J\nb.png", "c\x1b[2J.png"):
        shutil.copy(pictures / "wide.png", tmp_path / name)
    (tmp_path / "c\x1b[2J.png").write_bytes(b"no image")
    assert main([str(run), str(tmp_path), "--out", str(tmp_path / "o")]) == 2
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err.replace("\x1b[A", "")  # of the bar itself
    assert r"a\x1b[2J\x0ab.png: " in out
    assert r"c\x1b[2J.png: " in err


def test_a_single_bad_image_is_one_line(run, tmp_path, capsys):
    missing = tmp_path / "missing.png"
    assert main([str(run), str(missing), "--out", str(tmp_path / "out")]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 1
    assert "missing.png" in errors[0]


def test_names_never_collide():
    files = [Path(p) for p in ("a/x.png", "b/x.png", "b/x.jpg", "y.png", "a/x.png")]
    assert output_names(files) == ["x.png", "x.png-2", "x.jpg", "y", "x.png-3"]


def test_names_of_different_files_stay_apart_from_stems():
    assert output_names([Path("x.png"), Path("x.jpg"), Path("x.png.gif")]) == [
        "x.png",
        "x.jpg",
        "x.png-2",
    ]


@pytest.mark.usefixtures("unicode_names")
def test_very_long_names_leave_room_for_what_is_put_behind_them():
    files = [Path("空" * 80 + end) for end in (".jpg", ".png", "b.jpg")]
    names = output_names([*files, Path("a.jpg")])
    assert len(set(names)) == 4
    assert names[-1] == "a"
    assert max(len(name.encode()) for name in names) < 220


class CountedPath(type(Path())):
    """A path that counts how often its stem is asked for."""

    asked = 0

    @property
    def stem(self):
        CountedPath.asked += 1
        return super().stem


@pytest.mark.parametrize("name", ["{}.png", "{}/x.png"])
def test_names_of_many_files_take_linear_time(name):
    files = [CountedPath(name.format(i)) for i in range(2000)]
    CountedPath.asked = 0
    assert len(set(output_names(files))) == 2000
    assert CountedPath.asked <= 2 * len(files)


def test_folders_inside_are_named(run, pictures, tmp_path, caplog):
    """One of them is called as an image is. What the command wrote there is no image."""
    shutil.copy(pictures / "wide.png", tmp_path / "a.png")
    for inside in ("x.jpg", "deep/er", "segments"):
        (tmp_path / inside).mkdir(parents=True)
    for copy in ("x.jpg/b.png", "deep/er/a.png", "segments/a.overlay.png", "a.eigenmaps.png"):
        shutil.copy(pictures / "tall.jpg", tmp_path / copy)
    out = tmp_path / "segments"
    assert main([str(run), str(tmp_path), "--out", str(out)]) == 0
    line = f"{tmp_path}: the images in folders inside are not taken: deep, x.jpg; --recursive "
    assert line in caplog.text
    caplog.clear()
    assert {p.name for p in out.iterdir()} == {"a.overlay.png", "a.clusters.png"}

    assert main([str(run), str(tmp_path), "--out", str(out), "--recursive"]) == 0
    assert "not taken" not in caplog.text
    found = {str(p.relative_to(out)) for p in out.rglob("*.clusters.png")}
    assert found == {"a.clusters.png", "deep/er/a.clusters.png", "x.jpg/b.clusters.png"}


def test_a_folder_of_folders(run, pictures, tmp_path, capsys):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    shutil.copy(pictures / "wide.png", tmp_path / "in" / "deep")
    assert main([str(run), str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 2
    assert "not taken: deep, and there are none beside them; --recursive" in capsys.readouterr().err


def test_hidden_folders_are_left_alone(tmp_path):
    (tmp_path / ".cache").mkdir()
    for name in ("a.png", ".cache/b.png", ".c.png"):
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    assert image_files([tmp_path], recursive=True) == [tmp_path / "a.png"]


def test_names_in_several_folders():
    files = [Path(p) for p in ("r/x.png", "r/a/x.png", "r/a/x.jpg", "s/x.png")]
    folders = [Path(p) for p in (".", "a", "a", ".")]
    assert output_names(files, folders) == ["x.png", "a/x.png", "a/x.jpg", "x.png-2"]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_occurring_is_unique(dtype):
    clusters = torch.randint(0, 200, (2100, 2000), generator=torch.Generator().manual_seed(0))
    clusters[0, 0] = 7
    clusters[-1, -1] = 250
    clusters[clusters == 5] = 9
    clusters = clusters.to(dtype)
    assert torch.equal(occurring(clusters), clusters.unique().long())
    assert occurring(clusters[:0]).tolist() == []


def test_an_empty_folder_is_named(tmp_path, run, capsys):
    (tmp_path / "empty").mkdir()
    assert main([str(run), str(tmp_path / "empty"), "--out", str(tmp_path / "out")]) == 2
    assert "empty: no images in this folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_written_to_is_not_read_again(run, photograph, tmp_path):
    photograph(40, 40, 0).save(tmp_path / "a.png")
    for _ in range(2):
        assert main([str(run), str(tmp_path), "--out", str(tmp_path)]) == 0
        names = sorted(p.name for p in tmp_path.iterdir())
        assert names == ["a.clusters.png", "a.overlay.png", "a.png"]


def test_hidden_files_of_a_folder_are_left_alone(pictures, tmp_path):
    (tmp_path / ".thumb.png").write_bytes(b"")
    Image.new("RGB", (40, 40)).save(tmp_path / "a.PNG")
    assert [p.name for p in image_files([tmp_path])] == ["a.PNG"]


def test_out_that_is_a_file_is_one_line(run, pictures, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert main([str(run), str(pictures / "wide.png"), "--out", str(tmp_path / "file")]) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error")]
    assert lines == [f"error: --out {tmp_path / 'file'}: is a file; expected a folder to make"]
    assert (tmp_path / "file").read_text("utf-8") == "mine"


def test_an_opened_image_is_seen_as_its_file_is(run, photograph, tmp_path):
    """A phone's turned picture and a 16-bit one, which PIL's own conversions would spoil."""
    segmenter = Segmenter.load(run, "cpu")
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph(90, 60, 1).save(tmp_path / "turned.png", exif=exif)
    gray = np.array(photograph(90, 60, 2).convert("L")).astype(np.uint16) * 257
    Image.fromarray(gray).save(tmp_path / "deep.png")
    for name, shape in (("turned.png", (90, 60)), ("deep.png", (60, 90))):
        clusters = segmenter(tmp_path / name)
        assert clusters.shape == shape
        assert torch.equal(segmenter(Image.open(tmp_path / name)), clusters)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.full((3, 40, 40), 255.0), "values in [0, 1], it has 255 to 255"),
        (torch.full((3, 40, 40), -0.5), "values in [0, 1], it has -0.5 to -0.5"),
        (torch.full((3, 40, 40), float("nan")), "values in [0, 1], it has nan to nan"),
        (torch.zeros(3, 40, 40, dtype=torch.int64), "floating-point tensor, got torch.int64"),
        (torch.zeros(3, 40, 40, dtype=torch.bool), "floating-point tensor, got torch.bool"),
        (torch.zeros(40, 40, 3), "a tensor [3, H, W], got [40, 40, 3]"),
        (np.zeros((40, 40), np.uint8), "uint8 [H, W, 3], got uint8 [40, 40]"),
        (torch.zeros(3, 0, 40), "40 × 0 pixels, expected at least one patch"),
    ],
)
def test_what_is_no_image_is_refused(run, image, message):
    with pytest.raises(UserError) as error:
        Segmenter.load(run, "cpu")(image)
    assert message in str(error.value)


def test_floats_of_any_width_are_the_same_image(run, pictures):
    segmenter, pixels = Segmenter.load(run, "cpu"), read_image(pictures / "wide.png")
    single = segmenter(pixels.float() / 255)
    assert (single == segmenter(pixels)).float().mean() > 0.99  # 8 bits round as they are resized
    assert torch.equal(segmenter((pixels.float() / 255).double()), single)


def test_a_strip_is_a_few_windows(run):
    """At the scale of training these 16 × 2000 pixels would be 125 crops long."""
    segmenter, strip = Segmenter.load(run, "cpu"), torch.zeros(3, 16, 2000, dtype=torch.uint8)
    *_, window, stride = segmenter.at_training_scale(strip)
    assert len(window_starts(2000, window, stride)) <= 24
    assert segmenter(strip).shape == (16, 2000)


def test_no_run_there(pictures, tmp_path, capsys):
    assert main([str(tmp_path), str(pictures / "wide.png"), "--out", str(tmp_path / "o")]) == 2
    assert "not a run folder" in capsys.readouterr().err


def test_crf_without_its_package(run, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    options = [str(run), str(pictures / "wide.png"), "--out", str(tmp_path / "o"), "--crf"]
    assert main(options) == 2
    assert "pip install pydensecrf2" in capsys.readouterr().err


def test_help_teaches_and_is_light():
    text = parser().format_help()
    assert "examples:" in text
    assert "exit code is 2" in text
    assert "--crf-workers N" in text
    code = "import nefkern.segment as s, sys; s.parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
