"""``python -m nefkern.segment``: overlays and index maps of any images."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nefkern.backends import check_environment
from nefkern.errors import ArgumentParser, UserError, command

if TYPE_CHECKING:
    from torch import Tensor

    from nefkern.segmenter import Segmenter

log = logging.getLogger(__name__)

DESCRIPTION = """\
Segment images with a trained run, each at its own resolution. For NAME.jpg it writes
  NAME.overlay.png   image | clusters | blend
  NAME.clusters.png  an image whose pixel values are the cluster indices (8 bits, coloured by a
                     palette; 16 bits grey from 257 clusters on)
A cluster has the same index and colour in every image.
"""
EXAMPLES = """\
examples:
  python -m nefkern.segment runs/voc photo.jpg --out segments
  python -m nefkern.segment runs/voc holiday/ --out segments         every image of a folder
  python -m nefkern.segment runs/voc photo.jpg --out segments --crf  edges as sharp as the image's
  python -m nefkern.segment runs/voc map.tif --out segments --sliding
                                     small things in a large image, window by window

read the indices:  numpy.array(PIL.Image.open("segments/photo.clusters.png"))

An image that cannot be read is reported, the others are done, and the exit code is 2.
"""


# ---- parse ----


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = ArgumentParser(
        prog="python -m nefkern.segment",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("run", type=Path, metavar="RUN", help="folder of a trained run")
    add("images", type=Path, nargs="+", metavar="IMAGE", help="image files, or folders of them")
    add("--out", type=Path, required=True, metavar="DIR", help="where to write; made if missing")
    add("--crf", action="store_true", help="refine by a CRF (needs pydensecrf)")
    add(
        "--sliding",
        action="store_true",
        help="overlapping windows as large as the training crop, at the image's own resolution; "
        "without it the whole image is seen at the scale of training",
    )
    add("--device", default="auto", help="cpu, cuda, cuda:1 ... [auto]")
    return result


# ---- build ----


def image_files(given: list[Path]) -> list[Path]:
    """The files, and the images in the folders, in order.

    Raises:
        UserError: a folder without images.
    """
    from nefkern.data import IMAGE_SUFFIXES

    files: list[Path] = []
    for path in given:
        if not path.is_dir():
            files.append(path)
            continue
        inside = [
            p
            for p in sorted(path.iterdir())
            if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")
        ]
        if not inside:
            raise UserError(f"{path}: no images in this folder ({' '.join(IMAGE_SUFFIXES)})")
        files += inside
    return files


def output_names(files: list[Path]) -> list[str]:
    """A name for each file: its stem; with the suffix, then a number, where two would agree."""
    names: list[str] = []
    for file in files:
        stem, number = file.stem, 1
        name = stem if [f.stem for f in files].count(stem) == 1 else file.name
        base = name
        while name in names:
            number += 1
            name = f"{base}-{number}"
        names.append(name)
    return names


# ---- run ----


def segment(segmenter: Segmenter, pixels: Tensor, *, sliding: bool, refine: bool) -> Tensor:
    """Clusters of ``[3, H, W]`` uint8 pixels, int64 ``[H, W]`` on the CPU."""
    from nefkern.segmentation.crf import refine_clusters
    from nefkern.segmentation.windows import Replay, sliding_clusters, sliding_windows

    if sliding:
        predict, window, stride = segmenter.predict, segmenter.window, segmenter.stride
    else:
        predict, pixels, window, stride = segmenter.at_training_scale(pixels)
    if not refine:
        return sliding_clusters(predict, pixels, window, stride, batch_size=1).cpu()
    replay = Replay(predict)
    clusters = sliding_clusters(replay, pixels, window, stride, batch_size=1)

    def probabilities(winners: Tensor) -> Tensor:
        again = replay.select(winners)
        return sliding_windows(again, pixels, window, stride, batch_size=1).softmax(0)

    return refine_clusters(pixels, clusters, probabilities).cpu()


def segment_file(segmenter: Segmenter, file: Path, name: str, arguments: argparse.Namespace) -> int:
    """Segment one file and write both pictures; returns how many clusters it shows."""
    from nefkern.data import read_image
    from nefkern.segmentation.pictures import index_image, overlay, palette, write_png

    pixels = read_image(file)
    segmenter.check_size(pixels, file)
    clusters = segment(segmenter, pixels, sliding=arguments.sliding, refine=arguments.crf)
    count = segmenter.num_clusters
    sheet = overlay(pixels, clusters, colours=palette(count))
    write_png(sheet, arguments.out / f"{name}.overlay.png")
    write_png(index_image(clusters, count), arguments.out / f"{name}.clusters.png")
    return len(clusters.unique())


def segment_all(arguments: argparse.Namespace) -> tuple[int, int]:
    """Segment every image, report those that fail; returns how many did not and how many did."""
    from tqdm import tqdm

    from nefkern.segmenter import Segmenter

    if arguments.crf:
        from nefkern.segmentation.crf import require_pydensecrf

        require_pydensecrf()
    files = image_files(arguments.images)
    segmenter = Segmenter.load(arguments.run, arguments.device)
    arguments.out.mkdir(parents=True, exist_ok=True)
    failed, named = 0, list(zip(files, output_names(files), strict=True))
    for file, name in tqdm(named, unit="image", disable=None):
        try:
            count = segment_file(segmenter, file, name, arguments)
            tqdm.write(f"{file}: {count} clusters")
        except UserError as error:
            if len(files) == 1:
                raise
            failed += 1
            tqdm.write(f"error: {error}", file=sys.stderr)
    return len(files) - failed, failed


@command
def main(arguments: list[str] | None = None) -> None:
    """Parse, build, run."""
    parsed = parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("timm").setLevel(logging.WARNING)
    check_environment()
    done, failed = segment_all(parsed)
    log.info("written: %d images to %s", done, parsed.out)
    if failed:
        raise UserError(f"{failed} of {done + failed} images could not be segmented, see above")


if __name__ == "__main__":
    sys.exit(main())
