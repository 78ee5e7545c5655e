"""``python -m nefkern.segment``: overlays and index maps of any images."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from nefkern.backends import check_environment
from nefkern.naming.choices import FORMATS, parse_formats
from nefkern.runtime.commandline import (
    EDGES,
    add_crf_workers,
    add_device,
    add_run,
    check_crf_workers,
    command_parser,
    log_to_stderr,
    make_output_folder,
)
from nefkern.runtime.errors import UserError, command, visible

if TYPE_CHECKING:
    from torch import Tensor
    from tqdm import tqdm

    from nefkern.naming.names import Names
    from nefkern.naming.output import Confidence
    from nefkern.segmentation.graph_edges import GraphRefiner
    from nefkern.segmentation.listing import Listed, Watch
    from nefkern.segmentation.refinement import Job, Refiner
    from nefkern.segmentation.segmenter import Segmenter
    from nefkern.segmentation.video import Frame, Painted
    from nefkern.segmentation.windows import Replay

T = TypeVar("T")

log = logging.getLogger(__name__)

#: The entry of an index image's own text that says what it was made of.
_MADE_OF = "made-of"

#: Seconds between two looks into a watched folder.
_WATCH = 2.0

DESCRIPTION = """\
Segment images with a trained run, each at its own resolution. For NAME.jpg it writes
  NAME.overlay.png   image | clusters | blend, each at most 2048 pixels long
  NAME.clusters.png  an image as large as NAME.jpg whose pixel values are the cluster indices (8
                     bits, coloured by a palette; 16 bits grey from 257 clusters on)
A cluster has the same index and colour in every image.

With --names, a file that says which class each cluster stands for (python -m nefkern.atlas makes
one), it writes classes instead of clusters:
  NAME.overlay.png     in the classes' colours
  NAME.classes.png     pixel values are class indices, 255 where the cluster has no name
  NAME.confidence.png  how probable the class is, 255 for certain (as up-sampled, whatever --edges)
  classes.legend.png   the classes' colours and names
  classes.txt          their names; the line is the index, from 0
and with --formats what annotation tools read, each connected region of a class an instance:
{formats}

Of a video, NAME.mp4 and its like, it writes
  NAME.overlay.mp4   the frames in the segments' colours (H.264)
  NAME.clusters.mkv  index maps without loss (FFV1, grey), or NAME.classes.mkv with --names
frame by frame, so that colours are the same throughout. The same command goes on with a video where
a killed one ended.
"""
EXAMPLES = """\
examples:
  python -m nefkern.segment runs/voc photo.jpg --out segments
  python -m nefkern.segment runs/voc holiday/ --out segments         every image of a folder
  python -m nefkern.segment runs/voc holiday/ --out segments --recursive
                                     and of the folders inside; segments/ is laid out like holiday/
  python -m nefkern.segment runs/voc photo.jpg --out segments --edges graph
                                     edges where the image has them
  python -m nefkern.segment runs/voc map.tif --out segments --sliding
                                     small things in a large image, window by window
  python -m nefkern.segment runs/voc photo.jpg --out segments --classes 20
                                     the run's clusters merged to 20
  python -m nefkern.segment runs/voc holiday/ --out masks --names runs/voc/names.yaml \\
      --formats coco,labelme --min-area 64
                                     named masks for annotation tools, without specks
  python -m nefkern.segment runs/voc holiday/ --out segments --resume
                                     only what is not done yet
  python -m nefkern.segment runs/voc inbox/ --out segments --watch
                                     and whatever comes into the folder, until Ctrl-C
  python -m nefkern.segment runs/voc walk.mp4 --out segments --edges graph

read the indices:  numpy.array(PIL.Image.open("segments/photo.clusters.png"))

An image that cannot be read is reported, the others are done, and the exit code is 2.
In the environment: NEFKERN_MAX_PIXELS=N allows images beyond 500 megapixels, and NEFKERN_WHITE=N
says which value is white in images of more than 8 bits (python -m nefkern.data --help).
"""


# ---- parse ----


def parser() -> argparse.ArgumentParser:
    """The command line."""
    width = max(map(len, FORMATS))
    formats = "\n".join(f"  {name:{width}}  {what}" for name, what in FORMATS.items())
    result = command_parser("segment", DESCRIPTION.format(formats=formats), EXAMPLES)
    add = result.add_argument
    add_run(result)
    add(
        "images",
        type=Path,
        nargs="+",
        metavar="IMAGE",
        help="image files, folders of them, videos",
    )
    add(
        "--recursive",
        action="store_true",
        help="take the images in folders inside the given folders too",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="where to write; made if missing")
    add(
        "--resume",
        action="store_true",
        help="pass over images of which all is there, made of the same file by the same run and "
        "options",
    )
    add(
        "--watch",
        type=float,
        nargs="?",
        const=_WATCH,
        metavar="SECONDS",
        help="go on with images that come into the folders, looked for this often, until Ctrl-C "
        f"[{_WATCH:g}]",
    )
    add(
        "--edges",
        choices=EDGES,
        help="what draws the edges of segments: bilinear up-sampling of patches; graph: a solve on "
        "the image's pixels, which moves them to where colours change, in a fraction of a second; "
        "crf: a fully connected CRF, eight to ten times slower (needs pydensecrf) [bilinear]",
    )
    add("--crf", action="store_true", help="the same as --edges crf")
    add_crf_workers(result)
    add(
        "--sliding",
        action="store_true",
        help="overlapping windows as large as the training crop, at the image's own resolution; "
        "without it the whole image is seen at the scale of training",
    )
    add(
        "--flip",
        action="store_true",
        help="average over the image and its mirror image: twice the time, steadier segments",
    )
    add(
        "--classes",
        type=int,
        metavar="N",
        help="merge the run's clusters to N, those first that are nearest (Ward's tree of K-means' "
        "centres, drawn in report.html) [all K]",
    )
    add("--names", type=Path, metavar="FILE", help="names.yaml: write classes, not clusters")
    add("--formats", metavar="A,B,...", help=f"with --names: some of {','.join(FORMATS)}")
    add(
        "--min-area",
        type=int,
        default=0,
        metavar="N",
        help="with --names: regions and holes of fewer than N pixels go to the class around [0]",
    )
    add_device(result)
    return result


def check(arguments: argparse.Namespace) -> list[str]:
    """The formats asked for; a UserError that names the first option that cannot be used."""
    if arguments.crf and arguments.edges not in (None, "crf"):
        raise UserError(f"--edges {arguments.edges}: expected crf, or no --crf beside it")
    arguments.edges = "crf" if arguments.crf else arguments.edges or "bilinear"
    arguments.crf = arguments.edges == "crf"
    check_crf_workers(arguments)
    _check_growing(arguments)
    if arguments.min_area < 0:
        raise UserError(f"--min-area {arguments.min_area}: expected 0 or more pixels")
    if arguments.names is not None and arguments.classes is not None:
        raise UserError(
            f"--classes {arguments.classes}: expected none with --names, where equal names "
            "say which clusters are one"
        )
    given = {"--formats": arguments.formats, "--min-area": arguments.min_area}
    for name, value in given.items():
        if value and arguments.names is None:
            raise UserError(
                f"{name} {value}: expected --names FILE beside it; python -m nefkern.atlas RUN "
                "makes a page to name clusters on"
            )
    return parse_formats(arguments.formats) if arguments.formats is not None else []


def _check_growing(arguments: argparse.Namespace) -> None:
    """Refuse --resume and --watch where they cannot be kept."""
    if arguments.resume and arguments.formats:
        raise UserError(
            f"--resume: expected no --formats {arguments.formats} beside it, whose files list all "
            "images of one run of the command"
        )
    if arguments.watch is None:
        return
    if not 0 < arguments.watch < float("inf"):
        raise UserError(f"--watch {arguments.watch:g}: expected more than 0 seconds")
    if not any(path.is_dir() for path in arguments.images):
        raise UserError(f"--watch: expected a folder among the images, got {arguments.images[0]}")


# ---- run ----


class Picture(NamedTuple):
    """What is to be segmented: a file or a frame of one, what is written of it is called, and its
    pixels when they are asked for."""

    file: Path
    name: str
    load: Callable[[], Tensor]


class Segmented(NamedTuple):
    """A picture's pixels uint8 ``[3, H, W]`` and clusters ``[H, W]``, its output name, and, where
    clusters have names, how to measure confidence."""

    file: Path
    name: str
    pixels: Tensor
    clusters: Tensor
    confidence: Confidence | None = None


def windows(segmenter: Segmenter, pixels: Tensor, *, sliding: bool) -> tuple:
    """Predictor, pixels, window and stride, as :mod:`nefkern.segmentation.windows` takes them."""
    if sliding:
        return segmenter.predict, pixels, segmenter.window, segmenter.stride
    return segmenter.at_training_scale(pixels)


def segment(
    segmenter: Segmenter, pixels: Tensor, *, sliding: bool, replay: Replay | None = None
) -> Tensor:
    """Clusters of ``[3, H, W]`` uint8 pixels, ``[H, W]`` in few bits, on the CPU.

    Args:
        replay: of the predictor of :func:`windows`; it keeps what that says.
    """
    import torch

    from nefkern.segmentation.windows import sliding_clusters

    dtype = torch.uint8 if segmenter.num_clusters <= 256 else torch.int32
    predict, *cut = windows(segmenter, pixels, sliding=sliding)
    return sliding_clusters(replay or predict, *cut, batch_size=1, dtype=dtype).cpu()


def refinable(segmenter: Segmenter, picture: Picture, *, sliding: bool, names: Names | None) -> Job:
    """A picture whose edges are to be drawn."""
    from nefkern.naming.output import confidence
    from nefkern.segmentation.windows import Replay

    pixels = picture.load()
    predict, *cut = windows(segmenter, pixels, sliding=sliding)
    replay = Replay(predict)
    measure = names and confidence(segmenter, replay, *cut, names.class_of())
    context = picture.file, picture.name, pixels, measure
    scale = 1.0 if sliding else segmenter.training_scale(pixels)
    return segmenter.refinable(replay, *cut, scale, name=str(picture.file), context=context)


def read(segmenter: Segmenter, file: Path) -> Tensor:
    """The pixels of a file, uint8 ``[3, H, W]``.

    Raises:
        UserError: it cannot be read, or is smaller than a patch.
    """
    from nefkern.data import read_image

    pixels = read_image(file)
    segmenter.check_size(pixels, file)
    return pixels


def segment_pictures(
    segmenter: Segmenter,
    pictures: Iterable[Picture],
    fail: Callable[[Path, UserError], None],
    *,
    sliding: bool,
    refiner: Refiner | GraphRefiner | None,
    names: Names | None = None,
) -> Iterator[Segmented]:
    """Segment pictures, in order; ``fail`` hears of those that cannot be."""
    from nefkern.naming.output import confidence
    from nefkern.segmentation.windows import Replay

    def usable(make: Callable[[Picture], T]) -> Iterator[T]:
        for picture in pictures:
            try:
                made = make(picture)
            except UserError as error:
                fail(picture.file, error)
            else:
                yield made

    def plain(picture: Picture) -> Segmented:
        pixels = picture.load()
        found = Segmented(picture.file, picture.name, pixels, pixels)
        if names is None:
            return found._replace(clusters=segment(segmenter, pixels, sliding=sliding))
        predict, _, *steps = windows(segmenter, pixels, sliding=sliding)
        replay = Replay(predict)
        clusters = segment(segmenter, pixels, sliding=sliding, replay=replay)
        measure = confidence(segmenter, replay, pixels, *steps, names.class_of())
        return found._replace(clusters=clusters, confidence=measure)

    if refiner is None:
        yield from usable(plain)
        return
    job = partial(refinable, segmenter, sliding=sliding, names=names)
    with refiner(usable(job)) as results:
        for clusters, (file, name, pixels, measure) in results:
            yield Segmented(file, name, pixels, clusters.cpu(), measure)


def merged(segmented: Segmented, groups: Tensor) -> Segmented:
    """The same with every cluster's group, int64 ``[K]``, in its place."""
    clusters = segmented.clusters
    # As an index, 8 bits would be a mask.
    return segmented._replace(clusters=groups.to(clusters.dtype)[clusters.int()])


def write(segmented: Segmented, num_clusters: int, folder: Path, made_of: str) -> None:
    """Write both pictures of a file."""
    from nefkern.runtime.files import make_folder
    from nefkern.segmentation.listing import CLUSTERS, OVERLAY
    from nefkern.segmentation.pictures import index_image, overlay, palette, write_png

    make_folder(folder, (folder / segmented.name).parent)
    sheet = overlay(segmented.pixels, segmented.clusters, colours=palette(num_clusters))
    write_png(sheet, folder / f"{segmented.name}{OVERLAY}")
    indices = index_image(segmented.clusters, num_clusters)
    write_png(indices, folder / f"{segmented.name}{CLUSTERS}", {_MADE_OF: made_of})


def run_names(file: Path, fingerprint: str, num_clusters: int) -> Names:
    """The names in ``file``, of the clusters of the run of this fingerprint."""
    from nefkern.naming.names import read_names

    names = read_names(file)
    names.require_run(file, num_clusters, fingerprint)
    if not names.names:
        raise UserError(f"{file}: names: no cluster has one, expected some")
    return names


def refiner_of(arguments: argparse.Namespace) -> Refiner | GraphRefiner | None:
    """What draws the edges; a UserError without the package that it needs."""
    from nefkern.segmentation.graph_edges import GraphRefiner
    from nefkern.segmentation.mean_field import require_pydensecrf
    from nefkern.segmentation.refinement import Refiner

    if arguments.edges == "graph":
        return GraphRefiner()
    if not arguments.crf:
        return None
    require_pydensecrf()
    return Refiner(arguments.crf_workers)


class Work:
    """A run, and what is to be written of images and videos by it.

    Attributes:
        done, failed: how many images and videos.
    """

    def __init__(self, arguments: argparse.Namespace, formats: list[str], bar: tqdm) -> None:
        from nefkern.naming.names import fingerprint
        from nefkern.naming.output import NamedOutput
        from nefkern.segmentation.segmenter import Segmenter

        self.arguments, self.folder, self.bar = arguments, arguments.out, bar
        self.refiner = refiner_of(arguments)
        self.segmenter = Segmenter.load(arguments.run, arguments.device, flip=arguments.flip)
        self.segmenter.require_clusters()
        count, clusters = arguments.classes, self.segmenter.num_clusters
        self.groups = None if count is None else self.segmenter.merged(count, "--classes")
        self.count = count or clusters
        run = fingerprint(arguments.run)
        self.names = arguments.names and run_names(arguments.names, run, clusters)
        make_output_folder(self.folder)
        self.output = self.names and NamedOutput(
            self.names, self.folder, formats, arguments.min_area
        )
        self._settings = self._settings_of(arguments, run)
        self._digests: dict[str, str] = {}  # of files in work, by their output names
        self.done = self.failed = 0

    @staticmethod
    def _settings_of(arguments: argparse.Namespace, run: str) -> dict[str, Any]:
        """Whatever the result depends on beside the image."""
        from nefkern.data.levels import WHITE

        names = arguments.names and hashlib.sha256(arguments.names.read_bytes()).hexdigest()
        given = vars(arguments)
        shown = {key: given[key] for key in ("edges", "sliding", "flip", "classes", "min_area")}
        white = os.environ.get(WHITE)
        return {"run": run, "names": names or "", **shown, **({"white": white} if white else {})}

    def made_of(self, file: Path) -> dict[str, Any]:
        """Run, options, and the file as it is now."""
        found = file.stat()
        return {**self._settings, "file": [found.st_size, found.st_mtime_ns]}

    def _digest(self, file: Path) -> str:
        """Of :meth:`made_of`; empty, which nothing is made of, for a file that has gone since."""
        if not file.is_file():
            return ""
        text = json.dumps(self.made_of(file), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def is_done(self, file: Path, name: str) -> bool:
        """Whether all that would be written of a file is there, made of the same."""
        from nefkern.segmentation.listing import CLASSES, CLUSTERS, CONFIDENCE, OVERLAY
        from nefkern.segmentation.pictures import png_text

        index, *others = (
            (CLASSES, CONFIDENCE, OVERLAY) if self.names is not None else (CLUSTERS, OVERLAY)
        )
        paths = [self.folder / f"{name}{end}" for end in (index, *others)]
        if not file.is_file() or not all(path.is_file() for path in paths):
            return False
        return png_text(paths[0]).get(_MADE_OF) == self._digest(file)

    def images(
        self, named: list[tuple[Path, str]], fail: Callable[[Path, UserError], None]
    ) -> None:
        """Segment and write files, each given with its output name; annotations of all of them are
        whole thereafter.

        Args:
            fail: hears of those that cannot be.
        """
        pictures = (Picture(file, name, partial(self._read, file, name)) for file, name in named)
        with closing(self._segmented(pictures, fail)) as results:
            for segmented in results:
                self.bar.write(visible(f"{segmented.file}: {self._write(segmented)}"))
                self.bar.update()
                self.done += 1
        if self.output:
            self.output.finish()

    def _read(self, file: Path, name: str) -> Tensor:
        """The pixels of a file, which may be another one by the time they are segmented: what it is
        made of is looked at before."""
        self._digests[name] = self._digest(file)
        return read(self.segmenter, file)

    def _segmented(
        self, pictures: Iterable[Picture], fail: Callable[[Path, UserError], None]
    ) -> Iterator[Segmented]:
        return segment_pictures(
            self.segmenter, pictures, fail,
            sliding=self.arguments.sliding, refiner=self.refiner, names=self.names,
        )  # fmt: skip

    def _write(self, segmented: Segmented) -> str:
        from nefkern.segmentation.segmenter import occurring

        made_of = self._digests.pop(segmented.name)
        if self.output:
            text = {_MADE_OF: made_of}
            return f"{len(self.output.write(*segmented, text=text))} classes"
        if self.groups is not None:
            segmented = merged(segmented, self.groups)
        write(segmented, self.count, self.folder, made_of)
        return f"{len(occurring(segmented.clusters))} clusters"

    def video(self, file: Path, name: str) -> None:
        """Segment and write a video.

        Raises:
            UserError: it cannot be.
        """
        from nefkern.runtime.files import make_folder
        from nefkern.runtime.progress import frame_bar
        from nefkern.segmentation.video import Clip, Output, require_av, segment_clip

        require_av()
        clip = Clip.open(file)
        make_folder(self.folder, (self.folder / name).parent)
        kind = "clusters" if self.names is None else "classes"
        output = Output(
            self.folder / f"{name}.overlay.mp4",
            self.folder / f"{name}.{kind}.mkv",
            wide=self.names is None and self.count > 256,
        )
        with frame_bar(clip.frames, file.name) as bar:

            def shown(frames: int) -> None:
                bar.update(frames - bar.n)

            paint = partial(self._paint, file)
            count = segment_clip(clip, output, paint, self.made_of(file), shown)
        self.bar.write(visible(f"{file}: {count} frames"))
        self.bar.update()
        self.done += 1

    def _paint(self, file: Path, frames: Iterable[Frame]) -> Iterator[tuple[Frame, Painted]]:
        waiting: deque[Frame] = deque()

        def pictures() -> Iterator[Picture]:
            for frame in frames:
                self.segmenter.check_size(frame.pixels, file)
                waiting.append(frame)
                yield Picture(file, "", lambda pixels=frame.pixels: pixels)

        def fail(_: Path, error: UserError) -> None:
            raise error

        with closing(self._segmented(pictures(), fail)) as results:
            for segmented in results:
                yield waiting.popleft(), self._painted(segmented)

    def _painted(self, segmented: Segmented) -> Painted:
        from nefkern.segmentation.pictures import palette
        from nefkern.segmentation.video import Painted, blend

        if self.output:
            index, colours = self.output.classes(segmented.clusters), self.output.colours
        else:
            if self.groups is not None:
                segmented = merged(segmented, self.groups)
            index, colours = segmented.clusters.numpy(), palette(self.count)
        return Painted(blend(segmented.pixels, index, colours), index)

    def tell_seconds(self) -> None:
        """Log what drawing the edges took."""
        if not (self.refiner and self.refiner.inferences):
            return
        each = self.refiner.seconds / self.refiner.inferences
        if self.arguments.crf:
            log.info("CRF: %.2f s an image; worker processes: %d", each, self.refiner.workers)
        else:
            log.info("edges on the pixel graph: %.2f s an image", each)


def segment_all(arguments: argparse.Namespace, formats: list[str]) -> tuple[int, int]:
    """Segment every image, report those that fail; returns how many did not and how many did."""
    from nefkern.runtime.progress import image_bar
    from nefkern.segmentation.listing import Watch, listed_files
    from nefkern.segmentation.video import is_video

    look = partial(
        listed_files,
        arguments.images,
        recursive=arguments.recursive,
        may_be_empty=arguments.watch is not None,
    )
    found = look()
    watch = None if arguments.watch is None else Watch(look, found, arguments.watch)
    names = _Names()
    named = names.of(found)
    with image_bar(len(named)) as bar:
        work = Work(arguments, formats, bar)

        def fail(file: Path, error: UserError) -> None:
            if len(named) == 1 and watch is None:
                raise error
            again = watch is not None and not is_video(file)
            if again:
                watch.fail(file)
            work.failed += 1
            told = "; it is read again when it has changed" if again else ""
            bar.write(visible(f"error: {error}{told}"), file=sys.stderr)
            bar.update()

        images = [(file, name) for file, name in named if not is_video(file)]
        if arguments.resume:
            images = _left(work, images)
        if images:
            work.images(images, fail)
        for file, name in named:
            if is_video(file):
                try:
                    work.video(file, name)
                except UserError as error:
                    fail(file, error)
        if watch is not None:
            _watch(work, watch, names, fail)
    work.tell_seconds()
    return work.done, work.failed


class _Names:
    """Output names, which a file keeps."""

    def __init__(self) -> None:
        self._of: dict[Path, str] = {}
        self._taken: set[str] = set()

    def of(self, found: list[Listed]) -> list[tuple[Path, str]]:
        """Each file and its name."""
        from nefkern.segmentation.listing import output_names

        new = [(file, folder) for file, folder in found if file not in self._of]
        files, folders = [file for file, _ in new], [folder for _, folder in new]
        named = list(zip(files, output_names(files, folders, self._taken), strict=True))
        self._of.update(named)
        fresh = set(files)
        return [(file, self._of[file]) for file, _ in found if file not in fresh] + named


def _left(work: Work, images: list[tuple[Path, str]]) -> list[tuple[Path, str]]:
    """Those that are not done."""
    left = [one for one in images if not work.is_done(*one)]
    done = len(images) - len(left)
    work.bar.update(done)
    work.done += done
    log.info("--resume: %d of %d images are done", done, len(images))
    return left


def _watch(
    work: Work, watch: Watch, names: _Names, fail: Callable[[Path, UserError], None]
) -> None:
    """Segment what comes, until Ctrl-C."""
    log.info("watching every %g s; Ctrl-C ends it", work.arguments.watch)
    try:
        while True:
            come = watch.next()
            if come:
                work.bar.total += len(come)
                work.images(names.of(come), fail)
    except KeyboardInterrupt:
        log.info("no longer watching")


@command
def main(arguments: list[str] | None = None) -> None:
    """Parse, build, run."""
    parsed = parser().parse_args(arguments)
    formats = check(parsed)
    log_to_stderr()
    check_environment()
    done, failed = segment_all(parsed, formats)
    log.info("written: %d images to %s", done, parsed.out)
    if failed:
        raise UserError(f"{failed} of {done + failed} images could not be segmented, see above")


if __name__ == "__main__":
    sys.exit(main())
