"""The segment command on what grows: --resume, --watch, and videos."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nefkern import segment, train
from nefkern.naming import output
from nefkern.segment import main
from nefkern.segmentation.listing import Watch, output_names
from nefkern.segmentation.pictures import png_text

PATIENCE = 120  # seconds, on a busy machine


@pytest.fixture(scope="module")
def pictures(photograph, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for seed in range(3):
        photograph(60, 50, seed).save(folder / f"{seed}.png")
    return folder


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory) -> Path:
    """A run of seconds with a small random backbone, K = 6."""
    out = tmp_path_factory.mktemp("runs") / "run"
    command = (
        "--method spectral --data folder --pictures 0 -K 6 --backbone test_vit --weights random "
        "--crop 64 --k 16 --eigenvectors 6"
    )
    where = ["--data-root", str(pictures), "--out", str(out)]
    assert train.main([*command.split(), *where]) == 0
    return out


@pytest.fixture
def inbox(pictures, tmp_path) -> Path:
    return Path(shutil.copytree(pictures, tmp_path / "inbox"))


def written(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}


# ---- --resume ----


def test_resume_does_what_is_missing_and_no_more(run, inbox, tmp_path):
    out = tmp_path / "out"
    command = [str(run), str(inbox), "--out", str(out), "--resume"]
    assert main(command) == 0
    before = written(out)
    assert len(before) == 6
    (out / "1.overlay.png").unlink()
    assert main(command) == 0
    after = written(out)
    assert {name for name in after if after[name] != before[name]} == {
        "1.overlay.png",
        "1.clusters.png",
    }
    assert "made-of" in png_text(out / "1.clusters.png")


def test_resume_sees_other_options_and_other_files(run, inbox, tmp_path, photograph):
    out = tmp_path / "out"
    command = [str(run), str(inbox), "--out", str(out), "--resume"]
    assert main(command) == 0
    first = written(out)
    assert main([*command, "--flip"]) == 0
    second = written(out)
    assert all(second[name] != first[name] for name in first)
    photograph(70, 50, 9).save(inbox / "2.png")
    assert main([*command, "--flip"]) == 0
    third = written(out)
    assert {name for name in third if third[name] != second[name]} == {
        "2.overlay.png",
        "2.clusters.png",
    }
    assert Image.open(out / "2.clusters.png").size == (70, 50)


def test_resume_with_nothing_left(run, inbox, tmp_path):
    command = [str(run), str(inbox), "--out", str(tmp_path / "out"), "--resume"]
    assert main(command) == 0
    before = written(tmp_path / "out")
    assert main(command) == 0
    assert written(tmp_path / "out") == before


def test_a_file_that_leaves_while_it_is_segmented_is_written(run, inbox, tmp_path, monkeypatch):
    """As files of a watched folder do; what was made of it is done, should it come back."""
    read = segment.read

    def read_and_move(segmenter, file):
        pixels = read(segmenter, file)
        file.rename(file.with_suffix(".moved"))
        return pixels

    monkeypatch.setattr(segment, "read", read_and_move)
    out = tmp_path / "out"
    assert main([str(run), str(inbox), "--out", str(out)]) == 0
    assert len(written(out)) == 6
    monkeypatch.undo()
    for file in inbox.iterdir():
        file.rename(file.with_suffix(".png"))
    before = written(out)
    assert main([str(run), str(inbox), "--out", str(out), "--resume"]) == 0
    assert written(out) == before


def test_a_file_that_changes_while_it_is_segmented_is_not_done(
    run, inbox, tmp_path, monkeypatch, photograph
):
    read = segment.read

    def read_and_change(segmenter, file):
        pixels = read(segmenter, file)
        if file.name == "2.png":
            photograph(70, 50, 9).save(file)
        return pixels

    monkeypatch.setattr(segment, "read", read_and_change)
    command = [str(run), str(inbox), "--out", str(tmp_path / "out"), "--resume"]
    assert main(command) == 0
    monkeypatch.undo()
    assert Image.open(tmp_path / "out" / "2.clusters.png").size != (70, 50)
    assert main(command) == 0
    assert Image.open(tmp_path / "out" / "2.clusters.png").size == (70, 50)


def test_resume_does_again_what_was_killed_between_two_pictures_of_an_image(
    run, inbox, tmp_path, monkeypatch, photograph
):
    """With names, too, and where those of an older file lie there."""
    names = tmp_path / "names.yaml"
    names.write_text("clusters: 6\nnames: {0: sky, 1: road, 2: sky, 3: sky}\n")
    command = [str(run), str(inbox), "--out", str(tmp_path / "out"), "--names", str(names)]
    assert main(command) == 0
    photograph(70, 50, 9).save(inbox / "2.png")
    drawn = output.overlay

    def killed(pixels, *args, **more):
        if pixels.shape[2] == 70:
            raise KeyboardInterrupt
        return drawn(pixels, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(output, "overlay", killed)
        assert main([*command, "--resume"]) == 130
    assert main([*command, "--resume"]) == 0
    assert Image.open(tmp_path / "out" / "2.overlay.png").width > 3 * 70


def test_resume_sees_another_white(run, inbox, tmp_path, monkeypatch):
    Image.fromarray(np.arange(3000, dtype=np.uint16).reshape(60, 50)).save(inbox / "2.png")
    command = [str(run), str(inbox / "2.png"), "--out", str(tmp_path), "--resume"]
    assert main(command) == 0
    before = written(tmp_path)
    monkeypatch.setenv("NEFKERN_WHITE", "1000")
    assert main(command) == 0
    assert all(written(tmp_path)[name] != before[name] for name in before)


# ---- --watch ----


def test_a_file_is_taken_once_when_it_is_whole(tmp_path):
    old, new = tmp_path / "old.png", tmp_path / "new.png"
    old.write_bytes(b"1")
    there = [(old, Path())]
    watch = Watch(lambda: there, list(there), seconds=0.01)
    assert watch.next() == []
    new.write_bytes(b"")
    there.append((new, Path()))
    assert watch.next() == []
    assert watch.next() == []  # nothing in it yet
    new.write_bytes(b"half")
    assert watch.next() == []
    new.write_bytes(b"half and half")
    assert watch.next() == []  # it grew since
    assert watch.next() == [(new, Path())]
    assert watch.next() == []


def test_a_file_that_failed_is_taken_again_when_it_has_changed(tmp_path):
    file = tmp_path / "new.png"
    file.write_bytes(b"broken")
    watch = Watch(lambda: [(file, Path())], [], seconds=0.01)
    assert [watch.next(), watch.next()] == [[], [(file, Path())]]
    watch.fail(file)
    assert [watch.next(), watch.next(), watch.next()] == [[], [], []]
    file.write_bytes(b"mended now")
    assert [watch.next(), watch.next()] == [[], [(file, Path())]]


def test_a_file_that_changed_while_it_failed_is_taken_again(tmp_path):
    """As one that was still being copied when the command came to it: then, or at its start."""
    first, new = tmp_path / "first.png", tmp_path / "new.png"
    there = [(first, Path()), (new, Path())]
    first.write_bytes(b"half")
    watch = Watch(lambda: [one for one in there if one[0].exists()], there[:1], seconds=0.01)
    first.write_bytes(b"half and half")
    watch.fail(first)
    assert [watch.next(), watch.next(), watch.next()] == [[], there[:1], []]
    new.write_bytes(b"half")
    assert [watch.next(), watch.next()] == [[], there[1:]]
    new.write_bytes(b"half and half")
    watch.fail(new)
    assert [watch.next(), watch.next(), watch.next()] == [[], there[1:], []]


def test_names_stay_apart_from_those_given_before():
    taken: set[str] = set()
    assert output_names([Path("a/x.png")], taken=taken) == ["x"]
    assert output_names([Path("a/x.jpg"), Path("a/y.png")], taken=taken) == ["x.jpg", "y"]
    assert output_names([Path("b/x.jpg")], taken=taken) == ["x.jpg-2"]


def test_watching_a_folder(run, inbox, tmp_path, photograph):
    """What lies there, what comes, what comes broken and is mended; Ctrl-C ends it well."""
    out = tmp_path / "out"
    program = subprocess.Popen(
        [sys.executable, "-m", "nefkern.segment", run, inbox, "--out", out, "--watch", "0.1"],
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests are a shell's background job, SIGINT is ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        wait_for(out / "2.clusters.png")
        (inbox / "broken.png").write_bytes(b"\x89PNG")
        photograph(48, 40, 5).save(tmp_path / "later.png")
        os.replace(tmp_path / "later.png", inbox / "later.png")
        wait_for(out / "later.clusters.png")
        photograph(40, 40, 6).save(tmp_path / "mended.png")
        os.replace(tmp_path / "mended.png", inbox / "broken.png")
        wait_for(out / "broken.clusters.png")
        program.send_signal(signal.SIGINT)
        _, errors = program.communicate(timeout=PATIENCE)
    finally:
        program.kill()
    assert "broken.png: " in errors
    assert "it is read again when it has changed" in errors
    assert "no longer watching" in errors
    assert "written: 5 images" in errors
    assert "Traceback" not in errors


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.05)


# ---- videos ----


@pytest.fixture(scope="module")
def clip(pictures, tmp_path_factory) -> Path:
    """Three photographs, two frames each."""
    av = pytest.importorskip("av")
    path = tmp_path_factory.mktemp("clips") / "walk.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=5)
        stream.width, stream.height, stream.pix_fmt = 60, 50, "bgr0"
        for number in range(6):
            image = Image.open(pictures / f"{number // 2}.png")
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return path


def frames(path: Path) -> list[np.ndarray]:
    av = pytest.importorskip("av")
    with av.open(str(path)) as container:
        return [frame.to_ndarray() for frame in container.decode(video=0)]


@pytest.mark.parametrize("options", [[], ["--edges", "graph"], ["--classes", "3"]])
def test_a_video_has_the_clusters_of_its_frames(run, pictures, clip, tmp_path, options):
    command = [str(run), str(clip), *(str(pictures / f"{n}.png") for n in range(3))]
    assert main([*command, "--out", str(tmp_path), *options]) == 0
    found = frames(tmp_path / "walk.clusters.mkv")
    assert len(found) == 6
    assert len(frames(tmp_path / "walk.overlay.mp4")) == 6
    for number, index in enumerate(found):
        picture = np.array(Image.open(tmp_path / f"{number // 2}.clusters.png"))
        assert np.array_equal(index, picture)


def test_a_video_with_names(run, clip, tmp_path):
    from nefkern.naming.names import Names, fingerprint, write_names

    names = Names(6, {0: "thing", 1: "thing", 2: "other"}, checkpoint=fingerprint(run))
    write_names(tmp_path / "names.yaml", names)
    out = tmp_path / "out"
    command = [str(run), str(clip), "--out", str(out), "--names", str(tmp_path / "names.yaml")]
    assert main(command) == 0
    found = np.stack(frames(out / "walk.classes.mkv"))
    assert set(np.unique(found)) <= {0, 1, 255}
    assert (out / "classes.legend.png").exists()


def test_a_video_that_cannot_be_read_stops_no_image(run, pictures, tmp_path, capsys):
    pytest.importorskip("av")
    (tmp_path / "bad.mp4").write_bytes(b"nothing")
    out = tmp_path / "out"
    command = [str(run), str(tmp_path / "bad.mp4"), str(pictures / "0.png"), "--out", str(out)]
    assert main(command) == 2
    errors = capsys.readouterr().err
    assert "bad.mp4: cannot read this video" in errors
    assert "1 of 2 images could not be segmented" in errors
    assert (out / "0.clusters.png").exists()


def test_videos_without_pyav(run, clip, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    assert main([str(run), str(clip), "--out", str(tmp_path)]) == 2
    assert "pip install av" in capsys.readouterr().err


# ---- mistakes ----


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--resume", "--formats", "coco", "--names", "n.yaml"], "--resume: expected no --formats"),
        (["--watch", "0"], "--watch 0: expected more than 0 seconds"),
        (["--watch", "-1"], "--watch -1: expected more than 0 seconds"),
        (["--watch", "nan"], "--watch nan: expected more than 0 seconds"),
    ],
)
def test_mistakes_are_one_line(run, inbox, tmp_path, capsys, options, told):
    assert main([str(run), str(inbox), "--out", str(tmp_path / "out"), *options]) == 2
    assert told in capsys.readouterr().err


def test_watching_needs_a_folder(run, inbox, tmp_path, capsys):
    command = [str(run), str(inbox / "0.png"), "--out", str(tmp_path / "out"), "--watch"]
    assert main(command) == 2
    assert "--watch: expected a folder among the images" in capsys.readouterr().err
