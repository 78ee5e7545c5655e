"""Videos: frames and times kept, parts that are gone on from, and files that are no videos."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

av = pytest.importorskip("av")

from nefkern.runtime.errors import UserError  # noqa: E402
from nefkern.segmentation import video  # noqa: E402

COLOURS = np.array([[255, 0, 0], [0, 0, 255]], np.uint8)
MADE_OF = {"run": "a"}
FRAMES, HEIGHT, WIDTH = 37, 51, 65  # odd sides
RATE = Fraction(30000, 1001)


def picture(number: int) -> np.ndarray:
    """Black, with a white bar that moves."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[:, number : number + 10] = 255
    return pixels


def write_video(path: Path, times: list[int], rotation: int = 0) -> Path:
    """Frames at ``times``, in units of a frame."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "bgr0"
        stream.codec_context.time_base = 1 / RATE
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            frame.pts, frame.time_base = time, 1 / RATE
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture
def clip(tmp_path) -> video.Clip:
    return video.Clip.open(write_video(tmp_path / "in.mkv", list(range(FRAMES))))


@pytest.fixture
def output(tmp_path) -> video.Output:
    return video.Output(tmp_path / "o.overlay.mp4", tmp_path / "o.clusters.mkv", wide=False)


@pytest.fixture(autouse=True)
def short_parts(monkeypatch):
    monkeypatch.setattr(video, "PART", 10)


def index_of(pixels: torch.Tensor) -> np.ndarray:
    return (pixels[0] > 128).long().numpy()


def paint(frames):
    for frame in frames:
        index = index_of(frame.pixels)
        yield frame, video.Painted(video.blend(frame.pixels, index, COLOURS), index)


def indices(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray() for frame in container.decode(video=0)]


def times(path: Path) -> list[float]:
    return [float(f.pts * f.time_base) for f in video.Clip.open(path).read()]


def overlay_frames(output: video.Output) -> np.ndarray:
    return np.stack([f.pixels.numpy() for f in video.Clip.open(output.overlay).read()]).astype(int)


def test_every_frame_at_its_time(clip, output):
    told = []
    assert video.segment_clip(clip, output, paint, MADE_OF, told.append) == FRAMES
    assert told == list(range(FRAMES + 1))
    found = indices(output.index)
    assert len(found) == FRAMES
    for number, index in enumerate(found):
        assert np.array_equal(index, index_of(torch.from_numpy(picture(number)).movedim(-1, 0)))
    assert times(output.index) == pytest.approx([n / RATE for n in range(FRAMES)], abs=1e-3)
    assert times(output.overlay) == pytest.approx(times(output.index), abs=1.5e-3)
    assert not output.parts.exists()


def test_frames_of_changing_lengths_keep_their_times(tmp_path, output):
    given = [0, 1, 5, 6, 20, 21, 22, 40, 41, 60, 61, 62, 90]
    clip = video.Clip.open(write_video(tmp_path / "in.mkv", given))
    video.segment_clip(clip, output, paint, MADE_OF)
    expected = [time / RATE for time in given]
    assert times(output.index) == pytest.approx(expected, abs=1e-3)
    assert times(output.overlay) == pytest.approx(expected, abs=1.5e-3)


def test_the_overlay_has_the_segments_colours(clip, output):
    video.segment_clip(clip, output, paint, MADE_OF)
    frame = next(iter(video.Clip.open(output.overlay).read(20)))
    assert frame.pixels.shape == (3, HEIGHT + 1, WIDTH + 1)  # colours are kept for pairs of pixels
    mean = frame.pixels[:, 10:40, 24:26].float().mean((1, 2))  # of the bar, away from its edges
    assert mean.tolist() == pytest.approx([127.5, 127.5, 255], abs=12)
    left = frame.pixels[:, 10:40, 2:12].float().mean((1, 2))
    assert left.tolist() == pytest.approx([127.5, 0, 0], abs=12)


def test_16_bits_keep_many_clusters(clip, tmp_path):
    output = video.Output(tmp_path / "w.overlay.mp4", tmp_path / "w.clusters.mkv", wide=True)

    def far(frames):
        for frame, painted in paint(frames):
            yield frame, painted._replace(index=painted.index * 700)

    video.segment_clip(clip, output, far, MADE_OF)
    assert set(np.unique(indices(output.index)[3])) == {0, 700}


def test_a_killed_run_is_gone_on_with(clip, output):
    """Its whole parts stay, the frames after them are done again, and nothing else differs."""
    video.segment_clip(clip, output, paint, MADE_OF)
    whole = output.index.read_bytes(), overlay_frames(output)
    seen = []

    def killed(frames):
        for number, one in enumerate(paint(frames)):
            if number == 25:
                raise KeyboardInterrupt
            yield one

    def counted(frames):
        for frame, painted in paint(frames):
            seen.append(frame.pts)
            yield frame, painted

    with pytest.raises(KeyboardInterrupt):
        video.segment_clip(clip, output, killed, MADE_OF)
    assert video.segment_clip(clip, output, counted, MADE_OF) == FRAMES
    assert len(seen) == FRAMES - 20
    assert (
        indices(output.index)[33].tolist()
        == index_of(torch.from_numpy(picture(33)).movedim(-1, 0)).tolist()
    )
    assert output.index.read_bytes() == whole[0]
    found = overlay_frames(output)
    assert found.shape == whole[1].shape
    # x264 is not the same to the bit from run to run, whatever its threads: 3 of 900 times here.
    assert np.abs(found - whole[1]).mean((1, 2, 3)).max() < 1


def test_a_run_killed_before_joining_tells_as_many_frames(clip, output, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(video, "_join", killed)
        with pytest.raises(KeyboardInterrupt):
            video.segment_clip(clip, output, paint, MADE_OF)
    told = []
    assert video.segment_clip(clip, output, paint, MADE_OF, told.append) == FRAMES
    assert told == [FRAMES]
    assert len(indices(output.index)) == FRAMES


def test_parts_of_anything_else_are_thrown_away(clip, output):
    def killed(frames):
        for number, one in enumerate(paint(frames)):
            if number == 15:
                raise KeyboardInterrupt
            yield one

    seen = []

    def counted(frames):
        for one in paint(frames):
            seen.append(one)
            yield one

    with pytest.raises(KeyboardInterrupt):
        video.segment_clip(clip, output, killed, MADE_OF)
    video.segment_clip(clip, output, counted, {"run": "b"})
    assert len(seen) == FRAMES


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "no such file"),
        (b"", "cannot read this video"),
        (b"no video at all, but some text" * 50, "cannot read this video"),
    ],
)
def test_what_is_no_video_is_told(tmp_path, content, told):
    path = tmp_path / "clip.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=told) as caught:
        list(video.Clip.open(path).read())
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_sound_has_no_frames(tmp_path):
    path = tmp_path / "sound.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(UserError, match="this file holds none"):
        video.Clip.open(path)


def test_a_video_that_is_cut_off_ends_there(tmp_path, output):
    whole = write_video(tmp_path / "in.mkv", list(range(FRAMES)))
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    count = video.segment_clip(video.Clip.open(cut), output, paint, MADE_OF)
    assert 5 < count < FRAMES
    assert len(indices(output.index)) == count


def test_names_of_videos():
    assert video.is_video(Path("a/B.MP4"))
    assert not video.is_video(Path("a/mp4"))
    assert not video.is_video(Path("a.jpg"))
