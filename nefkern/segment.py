"""``python -m nefkern.segment``: overlays and index maps of any images."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from nefkern.backends import check_environment
from nefkern.naming.choices import FORMATS, parse_formats
from nefkern.runtime.commandline import (
    add_crf_workers,
    add_device,
    add_run,
    check_crf_workers,
    command_parser,
    log_to_stderr,
    make_output_folder,
)
from nefkern.runtime.errors import UserError, command

if TYPE_CHECKING:
    from torch import Tensor

    from nefkern.naming.names import Names
    from nefkern.naming.output import Confidence
    from nefkern.segmentation.refinement import Job, Refiner
    from nefkern.segmentation.segmenter import Segmenter
    from nefkern.segmentation.windows import Replay

T = TypeVar("T")

log = logging.getLogger(__name__)

#: How the names of what is written end.
OVERLAY, CLUSTERS = ".overlay.png", ".clusters.png"
WRITTEN = (OVERLAY, CLUSTERS, ".classes.png", ".confidence.png", ".legend.png")

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
  NAME.confidence.png  how probable the class is, 255 for certain (before a CRF's refinement)
  classes.legend.png   the classes' colours and names
  classes.txt          their names; the line is the index, from 0
and with --formats what annotation tools read, each connected region of a class an instance:
{formats}
"""
EXAMPLES = """\
examples:
  python -m nefkern.segment runs/voc photo.jpg --out segments
  python -m nefkern.segment runs/voc holiday/ --out segments         every image of a folder
  python -m nefkern.segment runs/voc holiday/ --out segments --recursive
                                     and of the folders inside; segments/ is laid out like holiday/
  python -m nefkern.segment runs/voc photo.jpg --out segments --crf  edges as sharp as the image's
  python -m nefkern.segment runs/voc map.tif --out segments --sliding
                                     small things in a large image, window by window
  python -m nefkern.segment runs/voc photo.jpg --out segments --classes 20
                                     the run's clusters merged to 20
  python -m nefkern.segment runs/voc holiday/ --out masks --names runs/voc/names.yaml \\
      --formats coco,labelme --min-area 64
                                     named masks for annotation tools, without specks

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
    add("images", type=Path, nargs="+", metavar="IMAGE", help="image files, or folders of them")
    add(
        "--recursive",
        action="store_true",
        help="take the images in folders inside the given folders too",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="where to write; made if missing")
    add("--crf", action="store_true", help="refine by a CRF (needs pydensecrf)")
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
    check_crf_workers(arguments)
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


# ---- build ----


def image_files(given: list[Path], *, recursive: bool = False) -> list[Path]:
    """The files, and the images in the folders, in order, without what this command wrote there.

    Args:
        given: files and folders.
        recursive: take the images in folders inside the folders too; without it a warning names
            those folders.

    Raises:
        UserError: a folder without images.
    """
    return [file for file, _ in _found(given, recursive=recursive)]


def _found(given: list[Path], *, recursive: bool) -> list[tuple[Path, Path]]:
    """Each file, and the folder below ``--out`` for what is written of it."""
    from nefkern.data import IMAGE_SUFFIXES

    found: list[tuple[Path, Path]] = []
    for path in given:
        if not path.is_dir():
            found.append((path, Path()))
            continue
        inside = list(_images_in(path, recursive=recursive))
        if not recursive:
            _tell_nested(path, empty=not inside)
        if not inside:
            suffixes = " ".join(IMAGE_SUFFIXES)
            raise UserError(f"{path}: no images in this folder ({suffixes})")
        found += inside
    return found


def _images_in(root: Path, *, recursive: bool) -> Iterator[tuple[Path, Path]]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if recursive and not _is_left_out(folder, f))
        for name in sorted(filter(_is_wanted, names)):
            yield Path(folder, name), Path(folder).relative_to(root)


def _is_left_out(folder: str, name: str) -> bool:
    """Whether a folder is hidden, or holds index images as ``--formats voc`` writes them."""
    return name.startswith(".") or Path(folder, name, "labelmap.txt").is_file()


def _is_wanted(name: str) -> bool:
    from nefkern.data.folder import is_image_name

    return is_image_name(name) and not name.endswith(WRITTEN)


def _tell_nested(folder: Path, *, empty: bool) -> None:
    from nefkern.data.folder import nested_images

    line = nested_images(folder, _is_wanted)
    if line and empty:
        raise UserError(f"{line}, and there are none beside them; --recursive takes them")
    if line:
        log.warning("%s; --recursive takes them too", line)


def output_names(files: list[Path], folders: list[Path] | None = None) -> list[str]:
    """A name for each file: its stem; with the suffix, then a number, where two would agree.

    Args:
        files: in any number; the time is linear in it.
        folders: of each, below ``--out``; default, ``--out`` itself.
    """
    folders = folders or [Path()] * len(files)
    stems = [str(folder / file.stem) for file, folder in zip(files, folders, strict=True)]
    shared = Counter(stems)
    last: Counter[str] = Counter()  # the last number given to a name
    taken: set[str] = set()
    names: list[str] = []
    for file, folder, stem in zip(files, folders, stems, strict=True):
        base = name = stem if shared[stem] == 1 else str(folder / file.name)
        while name in taken:
            last[base] += 1
            name = f"{base}-{last[base] + 1}"
        taken.add(name)
        names.append(name)
    return names


# ---- run ----


class Segmented(NamedTuple):
    """A file's pixels uint8 ``[3, H, W]`` and clusters ``[H, W]``, its output name, and, where
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


def occurring(clusters: Tensor) -> Tensor:
    """The clusters that win a pixel, int64 and ascending: ``unique`` without sorting."""
    import torch

    counts = torch.zeros(0, dtype=torch.int64)
    for part in clusters.flatten().split(1 << 22):
        seen = part.bincount(minlength=len(counts)).cpu()
        seen[: len(counts)] += counts
        counts = seen
    return counts.nonzero().flatten()


def crf_job(
    segmenter: Segmenter, file: Path, name: str, *, sliding: bool, names: Names | None
) -> Job:
    """A file to refine: the clusters that win a pixel, and their probabilities."""
    from nefkern.naming.output import confidence
    from nefkern.segmentation.refinement import Job
    from nefkern.segmentation.windows import Replay, sliding_clusters, sliding_windows

    pixels = read(segmenter, file)
    predict, _, window, stride = windows(segmenter, pixels, sliding=sliding)
    replay = Replay(predict)
    clusters = sliding_clusters(replay, pixels, window, stride, batch_size=1)
    shown = occurring(clusters).to(clusters.device)
    again = replay.select(shown)
    logits = sliding_windows(again, pixels, window, stride, batch_size=1)
    probabilities = segmenter.probabilities(logits)
    measure = None
    if names is not None:
        measure = confidence(segmenter, replay, pixels, window, stride, names.class_of())
    return Job(str(file), pixels, probabilities, shown, (file, name, pixels, measure))


def read(segmenter: Segmenter, file: Path) -> Tensor:
    """The pixels of a file, uint8 ``[3, H, W]``.

    Raises:
        UserError: it cannot be read, or is smaller than a patch.
    """
    from nefkern.data import read_image

    pixels = read_image(file)
    segmenter.check_size(pixels, file)
    return pixels


def segment_files(
    segmenter: Segmenter,
    files: list[tuple[Path, str]],
    fail: Callable[[UserError], None],
    *,
    sliding: bool,
    refiner: Refiner | None,
    names: Names | None = None,
) -> Iterator[Segmented]:
    """Segment files, each given with its output name; ``fail`` hears of those that cannot be."""
    from nefkern.naming.output import confidence
    from nefkern.segmentation.windows import Replay

    def usable(make: Callable[[Path, str], T]) -> Iterator[T]:
        for file, name in files:
            try:
                made = make(file, name)
            except UserError as error:
                fail(error)
            else:
                yield made

    def plain(file: Path, name: str) -> Segmented:
        pixels = read(segmenter, file)
        if names is None:
            return Segmented(file, name, pixels, segment(segmenter, pixels, sliding=sliding))
        predict, _, *steps = windows(segmenter, pixels, sliding=sliding)
        replay = Replay(predict)
        clusters = segment(segmenter, pixels, sliding=sliding, replay=replay)
        measure = confidence(segmenter, replay, pixels, *steps, names.class_of())
        return Segmented(file, name, pixels, clusters, measure)

    if refiner is None:
        yield from usable(plain)
        return
    job = partial(crf_job, segmenter, sliding=sliding, names=names)
    with refiner(usable(job)) as results:
        for clusters, (file, name, pixels, measure) in results:
            yield Segmented(file, name, pixels, clusters.cpu(), measure)


def merged(segmented: Segmented, groups: Tensor) -> Segmented:
    """The same with every cluster's group, int64 ``[K]``, in its place."""
    clusters = segmented.clusters
    # As an index, 8 bits would be a mask.
    return segmented._replace(clusters=groups.to(clusters.dtype)[clusters.int()])


def write(segmented: Segmented, num_clusters: int, folder: Path) -> None:
    """Write both pictures of a file."""
    from nefkern.runtime.files import make_folder
    from nefkern.segmentation.pictures import index_image, overlay, palette, write_png

    make_folder(folder, (folder / segmented.name).parent)
    sheet = overlay(segmented.pixels, segmented.clusters, colours=palette(num_clusters))
    write_png(sheet, folder / f"{segmented.name}{OVERLAY}")
    indices = index_image(segmented.clusters, num_clusters)
    write_png(indices, folder / f"{segmented.name}{CLUSTERS}")


def run_names(file: Path, run: Path, num_clusters: int) -> Names:
    """The names in ``file``, of this run's clusters."""
    from nefkern.naming.names import fingerprint, read_names

    names = read_names(file)
    names.require_run(file, num_clusters, fingerprint(run) if names.checkpoint else "")
    if not names.names:
        raise UserError(f"{file}: names: no cluster has one, expected some")
    return names


def segment_all(arguments: argparse.Namespace, formats: list[str]) -> tuple[int, int]:
    """Segment every image, report those that fail; returns how many did not and how many did."""
    from nefkern.naming.output import NamedOutput
    from nefkern.runtime.progress import image_bar
    from nefkern.segmentation.mean_field import require_pydensecrf
    from nefkern.segmentation.refinement import Refiner
    from nefkern.segmentation.segmenter import Segmenter

    if arguments.crf:
        require_pydensecrf()
    refiner = Refiner(arguments.crf_workers) if arguments.crf else None
    files, folders = zip(*_found(arguments.images, recursive=arguments.recursive), strict=True)
    segmenter = Segmenter.load(arguments.run, arguments.device, flip=arguments.flip)
    segmenter.require_clusters()
    count = arguments.classes
    groups = None if count is None else segmenter.merged(count, "--classes")
    names = arguments.names and run_names(arguments.names, arguments.run, segmenter.num_clusters)
    make_output_folder(arguments.out)
    output = names and NamedOutput(names, arguments.out, formats, arguments.min_area)
    named, failures = list(zip(files, output_names(files, folders), strict=True)), []
    with image_bar(len(files)) as bar:

        def fail(error: UserError) -> None:
            if len(files) == 1:
                raise error
            failures.append(error)
            bar.write(f"error: {error}", file=sys.stderr)
            bar.update()

        sliding = arguments.sliding
        results = segment_files(
            segmenter, named, fail, sliding=sliding, refiner=refiner, names=names
        )
        with closing(results):
            for segmented in results:
                if output:
                    bar.write(f"{segmented.file}: {len(output.write(*segmented))} classes")
                else:
                    if groups is not None:
                        segmented = merged(segmented, groups)
                    write(segmented, count or segmenter.num_clusters, arguments.out)
                    bar.write(f"{segmented.file}: {len(occurring(segmented.clusters))} clusters")
                bar.update()
    if output:
        output.finish()
    if refiner and refiner.inferences:
        log.info(
            "CRF: %.2f s an image; worker processes: %d",
            refiner.seconds / refiner.inferences,
            refiner.workers,
        )
    return len(files) - len(failures), len(failures)


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
