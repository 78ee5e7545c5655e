"""``python -m nefkern.eigenmaps``: what single eigenfunctions look like on images."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nefkern.backends import check_environment
from nefkern.runtime.commandline import (
    add_device,
    add_run,
    command_parser,
    log_to_stderr,
    make_output_folder,
)
from nefkern.runtime.errors import UserError, command
from nefkern.spectrum import add_images

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from nefkern.segmentation.segmenter import Maps, Segmenter

log = logging.getLogger(__name__)

#: The folder of the run that pictures go to unasked.
FOLDER = "eigenmaps"

DESCRIPTION = """\
Draw a run's eigenfunctions on images, as the paper's appendix does: for NAME.jpg NAME.eigenmaps.png
with the image and ψ's raw outputs on its patches, before any softmax.

A quantised ψ (training's default) gives each cluster a function: light where it is large. Shown are
those that win most of the image's patches. The functions of a continuous ψ (--no-gumbel) are
ordered and signed: shown are the first, red where positive, blue where negative, white at 0. Those
of --method spectral are the data set's eigenvectors, extended to the image (v 0, v 1, ...), signed
too. The first tell images apart rather than their parts: shown are those that vary most within.
With --exact, below them the leading eigenvectors of κ on the image's own patches, signed too. They
have an order and no sign, where a quantised ψ has neither: don't compare them one by one.
"""
EXAMPLES = """\
examples:
  python -m nefkern.eigenmaps runs/voc                         8 images of the run's own
  python -m nefkern.eigenmaps runs/voc photo.jpg holiday/ --out maps
  python -m nefkern.eigenmaps runs/voc photo.jpg --exact       κ's exact eigenvectors below
  python -m nefkern.eigenmaps runs/voc photo.jpg --functions 3,17,40
  python -m nefkern.eigenmaps runs/voc --data-root DIR --split val --images 20

The image is seen whole, its shorter side as long as a training crop. The pictures in RUN/eigenmaps
stand in report.html too. An image that cannot be read is reported, the others are done, and the
exit code is 2.
"""


# ---- parse ----


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = command_parser("eigenmaps", DESCRIPTION, EXAMPLES)
    add = result.add_argument
    add_run(result)
    add(
        "images",
        type=Path,
        nargs="*",
        metavar="IMAGE",
        help="image files, or folders of them [the first of a data set]",
    )
    add("--count", type=int, default=5, metavar="N", help="functions an image [5]")
    add("--functions", metavar="A,B,...", help="these functions, counted from 0 [see above]")
    add(
        "--exact",
        action="store_true",
        help="below them as many of the leading eigenvectors of the image's own κ, exact",
    )
    add("--out", type=Path, metavar="DIR", help=f"where to write; made if missing [RUN/{FOLDER}]")
    group = result.add_argument_group("without IMAGE")
    add_images(group)
    group.add_argument(
        "--first", type=int, default=8, metavar="N", help="only the first N images [8]"
    )
    add_device(result, "eigenvectors: CPU")
    return result


def check(arguments: argparse.Namespace) -> None:
    """Raise a UserError that names the first option out of range, or of no use."""
    for name in ("count", "first"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} {getattr(arguments, name)}: expected at least 1")
    for name in ("data", "data_root", "split"):
        if arguments.images and getattr(arguments, name) is not None:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag}: is for a data set; expected no IMAGE beside it")


def chosen_functions(text: str, count: int) -> list[int]:
    """The indices of ``--functions``, each from 0 to ``count − 1``."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) < count for part in parts):
        raise UserError(f"--functions {text}: expected numbers from 0 to {count - 1}, as 3,17")
    return [int(part) for part in parts]


# ---- run ----


def ranked_functions(logits: Tensor, count: int, *, quantized: bool) -> list[int]:
    """The functions to show of one image.

    Args:
        logits: ψ's outputs, ``[K, h, w]``.
        quantized: take those that win most patches, of equal ones that of higher mean; else the
            first, which is the order that training gives continuous functions.
    """
    k = len(logits)
    if not quantized:
        return list(range(min(count, k)))
    wins = logits.flatten(1).argmax(0).bincount(minlength=k)
    means = logits.flatten(1).mean(1)
    return sorted(range(k), key=lambda j: (-int(wins[j]), -float(means[j])))[:count]


def varying_functions(outputs: Tensor, count: int) -> list[int]:
    """The functions ``[m, h, w]`` of largest variance over the image, the largest first."""
    spread = outputs.flatten(1).var(1, correction=0)
    return spread.argsort(descending=True, stable=True)[:count].tolist()


def eigenvectors(segmenter: Segmenter, pixels: Tensor, maps: Maps, count: int):
    """The leading eigenpairs of κ on one image's patches: λ ``[m]`` and maps ``[m, h, w]``.

    An eigenvector has no sign: here most of its weight is positive.
    """
    from nefkern.spectral.eigenpairs import leading_eigenpairs

    graph = segmenter.kappa(pixels[None], maps, per_image=True)
    pairs = leading_eigenpairs(graph, min(count, graph.num_nodes), tol=0)
    values, vectors = pairs.values, pairs.vectors.double().cpu()
    signs = vectors.pow(3).sum(0).sign()
    signs[signs == 0] = 1
    return values, (vectors * signs).T.unflatten(1, maps.logits.shape[2:])


def draw(segmenter: Segmenter, pixels: Tensor, arguments: argparse.Namespace) -> Image.Image:
    """The picture of one image ``[3, H, W]``: its ψ, and κ's eigenvectors if asked for."""
    from nefkern.data import resize_shorter
    from nefkern.segmentation.charts import Functions, function_sheet

    seen = resize_shorter(pixels, segmenter.options.crop)
    maps, quantized = segmenter.maps(seen[None]), segmenter.kind == "quantised"
    outputs = maps.functions[0].float().cpu()
    if arguments.functions:
        numbers = chosen_functions(arguments.functions, segmenter.num_functions)
    elif segmenter.kind == "spectral":
        numbers = varying_functions(outputs, arguments.count)
    else:
        numbers = ranked_functions(outputs, arguments.count, quantized=quantized)
    covered = (seen.shape[1] / maps.padded[0], seen.shape[2] / maps.padded[1])
    name = "v" if segmenter.kind == "spectral" else "ψ"
    rows = [Functions([f"{name} {j}" for j in numbers], outputs[numbers], not quantized)]
    if arguments.exact:
        values, vectors = eigenvectors(segmenter, seen, maps, len(numbers))
        heads = [f"v {j + 1}, λ = {value:.3f}" for j, value in enumerate(values.tolist())]
        rows.append(Functions(heads, vectors, signed=True))
    return function_sheet(pixels, rows, covered)


def sources(
    arguments: argparse.Namespace, segmenter: Segmenter, fail
) -> Iterator[tuple[str, Tensor]]:
    """Output names and pixels of the images; ``fail`` hears of those that cannot be used."""
    from nefkern.segment import read
    from nefkern.segmentation.listing import image_files, output_names
    from nefkern.spectrum import open_images

    if arguments.images:
        files = image_files(arguments.images)
        named = list(zip(output_names(files), files, strict=True))
    else:
        dataset, _ = open_images(arguments, segmenter.options)
        named = list(zip(dataset.names, dataset.paths, strict=True))[: arguments.first]
    for name, file in named:
        try:
            yield name, read(segmenter, file)
        except UserError as error:
            fail(error)


def eigenmaps(arguments: argparse.Namespace) -> list[Path]:
    """Draw every image; returns the pictures.

    Raises:
        UserError: a run, data set or option that cannot be used; at the end, if an image could not.
    """
    from nefkern.evaluation.report import write_report
    from nefkern.segmentation.listing import EIGENMAPS
    from nefkern.segmentation.pictures import write_png
    from nefkern.segmentation.segmenter import Segmenter
    from nefkern.training.runs import Run

    check(arguments)
    segmenter = Segmenter.load(arguments.run, arguments.device)
    if arguments.functions:
        chosen_functions(arguments.functions, segmenter.num_functions)
    folder = arguments.out or arguments.run / FOLDER
    make_output_folder(folder)
    written: list[Path] = []
    failures: list[UserError] = []

    def fail(error: UserError) -> None:
        failures.append(error)
        log.error("error: %s", error)

    for name, pixels in sources(arguments, segmenter, fail):
        path = folder / f"{name}{EIGENMAPS}"
        write_png(draw(segmenter, pixels, arguments), path)
        written.append(path)
    if written and arguments.out is None:
        write_report(Run(arguments.run))
    log.info("pictures in %s: %d", folder, len(written))
    if failures:
        total = len(failures) + len(written)
        raise UserError(f"{len(failures)} of {total} images could not be drawn, see above")
    return written


@command
def main(arguments: list[str] | None = None) -> None:
    """Parse and draw."""
    parsed = parser().parse_args(arguments)
    check(parsed)
    log_to_stderr()
    check_environment()
    eigenmaps(parsed)


if __name__ == "__main__":
    sys.exit(main())
