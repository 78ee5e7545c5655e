"""Videos in and out: frames, and segments of them, in parts that a killed run goes on from."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nefkern.runtime.errors import UserError, first_line
from nefkern.runtime.files import make_folder, replace_file
from nefkern.segmentation.pictures import boundaries, colorize

if TYPE_CHECKING:
    import av

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".mts", ".wmv")
"""Names of files that are taken for videos, whatever their case."""

PART = 240
"""Frames of a part: what a killed run may have to do again."""

#: Pixels of a segment's colour, the rest is the frame's.
_OPACITY = 0.5
_KEY = "made-of.json"


def is_video(path: Path) -> bool:
    """Whether a file is called as videos are."""
    return path.suffix.lower() in SUFFIXES


def require_av() -> None:
    """Raises :class:`UserError` where PyAV is missing."""
    try:
        import av  # noqa: F401
    except ImportError:
        raise UserError(
            'videos: expected PyAV, which is not installed: pip install av (or "nefkern[video]")'
        ) from None


class Frame(NamedTuple):
    """A picture of a video: uint8 ``[3, H, W]``, upright, and the time it is shown at."""

    pixels: Tensor
    pts: int
    time_base: Fraction


@dataclass(frozen=True)
class Clip:
    """What is known of a video before its frames are read.

    Attributes:
        path: the file.
        frames: how many, as far as the file tells; 0: unknown.
        rate: frames a second.
    """

    path: Path
    frames: int
    rate: Fraction

    @classmethod
    def open(cls, path: Path) -> Clip:
        """Look into a file.

        Raises:
            UserError: it cannot be read, or holds no video.
        """
        with _opened(path) as (container, stream):
            rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
            count = stream.frames
            if not count and container.duration:  # in microseconds
                count = round(container.duration * rate / 1_000_000)
            return cls(path, int(count), rate)

    def read(self, first: int = 0) -> Iterator[Frame]:
        """The frames from number ``first`` on; those before are decoded and passed over.

        Raises:
            UserError: the file ends, or turns unreadable, before its first frame. What is damaged
                later ends the video there, as players do.
        """
        number = 0
        with _opened(self.path) as (container, stream):
            stream.thread_type = "AUTO"
            with _told(self.path, lambda: number == 0):
                for picture in container.decode(stream):
                    if number >= first:
                        yield _frame(picture, number, self.rate)
                    number += 1
        if not number:
            raise UserError(f"{self.path}: expected a video, it has no frame")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its first video."""
    import av

    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with _told(path, lambda: True):
        container = av.open(str(path))
    with container:
        if not container.streams.video:
            raise UserError(f"{path}: expected a video, this file holds none")
        yield container, container.streams.video[0]


@contextlib.contextmanager
def _told(path: Path, fatal: Callable[[], bool]) -> Iterator[None]:
    """Errors of decoding name the file; those that are not fatal end the block."""
    import av

    try:
        yield
    except av.FFmpegError as error:
        if fatal():
            reason = first_line(error)
            raise UserError(f"{path}: cannot read this video: {reason}") from None


def _frame(picture: av.VideoFrame, number: int, rate: Fraction) -> Frame:
    turned = np.rot90(picture.to_ndarray(format="rgb24"), round(picture.rotation / 90) % 4)
    pixels = torch.from_numpy(np.ascontiguousarray(turned)).movedim(-1, 0)
    if picture.pts is None:  # some old files count on the reader
        return Frame(pixels, number, 1 / rate)
    return Frame(pixels, picture.pts, picture.time_base)


# ---- write ----


class Painted(NamedTuple):
    """What becomes of a frame: the blend uint8 ``[H, W, 3]``, and the index map ``[H, W]``."""

    blend: np.ndarray
    index: np.ndarray


def blend(pixels: Tensor, index: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """A frame in its segments' colours, uint8 ``[H, W, 3]``, outlined in white.

    Args:
        pixels: uint8 ``[3, H, W]``.
        index: ``[H, W]``, rows of ``colours``; others are black.
        colours: uint8 ``[n, 3]``.
    """
    photo = pixels.movedim(0, -1).numpy()
    mixed = (1 - _OPACITY) * photo + _OPACITY * colorize(index, colours)
    mixed[boundaries(index)] = 255
    return mixed.round().astype(np.uint8)


@dataclass(frozen=True)
class Output:
    """The two videos of a clip and the folder of their parts.

    Attributes:
        overlay: H.264, to look at (MPEG-4 where PyAV comes without an encoder of it).
        index: FFV1, without loss: grey values are indices, of 16 bits from 257 on.
        wide: whether indices need 16 bits.
    """

    overlay: Path
    index: Path
    wide: bool

    @property
    def parts(self) -> Path:
        """Where parts lie until all are there."""
        return self.overlay.with_name(f".{self.overlay.name}.parts")

    def begin(self, made_of: dict[str, Any]) -> int:
        """Frames that are there from a run before, which ended too early.

        Args:
            made_of: whatever the result depends on; parts of anything else are thrown away.
        """
        key = self.parts / _KEY
        wanted = json.dumps(made_of, sort_keys=True)
        if not key.is_file() or key.read_text("utf-8", errors="replace") != wanted:
            shutil.rmtree(self.parts, ignore_errors=True)
            make_folder(self.overlay.parent, self.parts)
            replace_file(key, wanted)
        done = 0
        while all(path.is_file() for path in self._pair(done)):
            done += 1
        # The last one of a video is shorter, and stands alone where only joining is left.
        return (done - 1) * PART + _frames_of(self._pair(done - 1)[1]) if done else 0

    def write_part(self, number: int, frames: Iterable[tuple[Frame, Painted]]) -> None:
        """Part ``number``, in two files that are there whole or not at all."""
        final = self._pair(number)
        temporary = [path.with_suffix(".part") for path in final]
        with contextlib.ExitStack() as stack:
            writers = [
                stack.enter_context(_Encoder(temporary[0], *_overlay_codec())),
                stack.enter_context(
                    _Encoder(temporary[1], "ffv1", "gray16le" if self.wide else "gray", {})
                ),
            ]
            for frame, painted in frames:
                writers[0].add(frame, _even(painted.blend))
                dtype = np.uint16 if self.wide else np.uint8
                writers[1].add(frame, np.ascontiguousarray(painted.index, dtype))
        for source, target in zip(temporary, final, strict=True):
            source.replace(target)

    def finish(self, parts: int) -> None:
        """Join so many parts, without encoding them again, and remove them."""
        for side, target in enumerate((self.overlay, self.index)):
            temporary = self.parts / f"joined{target.suffix}"
            _join([self._pair(number)[side] for number in range(parts)], temporary)
            temporary.replace(target)
        shutil.rmtree(self.parts)

    def _pair(self, number: int) -> tuple[Path, Path]:
        return tuple(self.parts / f"{number:06}.{side}.nut" for side in ("overlay", "index"))


def _overlay_codec() -> tuple[str, str, dict[str, str]]:
    import av

    # Without frames that look ahead parts can be put one after another.
    if "libx264" in av.codecs_available:
        return "libx264", "yuv420p", {"crf": "20", "preset": "veryfast", "bf": "0"}
    return "mpeg4", "yuv420p", {"qscale": "3", "bf": "0"}


class _Encoder:
    """A file of one video, opened when its first frame says how large it is."""

    def __init__(self, path: Path, codec: str, pixel_format: str, options: dict[str, str]) -> None:
        import av

        self._container = av.open(str(path), "w", format="nut")
        self._codec, self._format, self._options = codec, pixel_format, options
        self._stream: Any = None

    def __enter__(self) -> _Encoder:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None and self._stream is not None:
            self._container.mux(self._stream.encode())
        self._container.close()

    def add(self, frame: Frame, array: np.ndarray) -> None:
        """One more: uint8 ``[H, W, 3]``, or grey ``[H, W]``."""
        import av

        if self._stream is None:
            self._open(frame, array)
        source = "rgb24" if array.ndim == 3 else self._format
        # Converted here: the encoder's own conversion differs from run to run.
        picture = av.VideoFrame.from_ndarray(array, format=source).reformat(format=self._format)
        picture.pts, picture.time_base = frame.pts, frame.time_base
        self._container.mux(self._stream.encode(picture))

    def _open(self, frame: Frame, array: np.ndarray) -> None:
        stream = self._container.add_stream(self._codec, options=self._options)
        stream.height, stream.width = array.shape[:2]
        stream.pix_fmt = self._format
        stream.codec_context.time_base = frame.time_base
        self._stream = stream


def _frames_of(part: Path) -> int:
    """How many there are in a part."""
    import av

    with av.open(str(part)) as source:
        packets = source.demux(source.streams.video[0])
        return sum(packet.pts is not None for packet in packets)  # the last one is empty


def _even(array: np.ndarray) -> np.ndarray:
    """With a last row and column more where their number is odd: colours are kept for pairs."""
    rows, columns = array.shape[0] % 2, array.shape[1] % 2
    return np.pad(array, ((0, rows), (0, columns), (0, 0)), "edge") if rows or columns else array


def _join(parts: list[Path], target: Path) -> None:
    import av

    with av.open(str(target), "w", options={"fflags": "bitexact"}) as output:  # nor random names
        stream = None
        for part in parts:
            with av.open(str(part)) as source:
                video = source.streams.video[0]
                if stream is None:
                    stream = output.add_stream_from_template(video)
                for packet in source.demux(video):
                    if packet.pts is not None:  # the last one is empty
                        packet.stream, packet.dts = stream, packet.pts  # no frame looks ahead
                        output.mux(packet)


def segment_clip(
    clip: Clip,
    output: Output,
    paint: Callable[[Iterable[Frame]], Iterator[tuple[Frame, Painted]]],
    made_of: dict[str, Any],
    shown: Callable[[int], object] = lambda frames: None,
) -> int:
    """Segment a video; a run that was killed goes on from its last whole part.

    Args:
        clip: what to read.
        output: where to write.
        paint: frames to what becomes of them, in order; it may look a few ahead.
        made_of: see :meth:`Output.begin`.
        shown: called with the number of frames that are done.

    Returns:
        How many frames there are.

    Raises:
        UserError: the video cannot be read, or its frames change their size.
    """
    total = output.begin(made_of)
    shown(total)
    parts = -(-total // PART)
    with contextlib.closing(paint(_of_one_size(clip.read(total), clip.path))) as painted:

        def counted(frames: Iterable[tuple[Frame, Painted]]) -> Iterator[tuple[Frame, Painted]]:
            nonlocal total
            for one in frames:
                yield one
                total += 1
                shown(total)

        while (first := next(painted, None)) is not None:
            rest = itertools.islice(painted, PART - 1)
            output.write_part(parts, counted(itertools.chain((first,), rest)))
            parts += 1
    output.finish(parts)
    return total


def _of_one_size(frames: Iterator[Frame], path: Path) -> Iterator[Frame]:
    size = None
    for frame in frames:
        size = size or frame.pixels.shape
        if frame.pixels.shape != size:
            raise UserError(
                f"{path}: expected frames of one size, {size[2]} x {size[1]}, one is"
                f" {frame.pixels.shape[2]} x {frame.pixels.shape[1]}"
            )
        yield frame
