"""``python -m nefkern.export``: a run as one ONNX file, for programs without nefkern or PyTorch."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nefkern.backends import check_environment
from nefkern.runtime.commandline import add_run, check_file, command_parser, log_to_stderr
from nefkern.runtime.errors import UserError, command, visible

if TYPE_CHECKING:
    from torch import Tensor

    from nefkern.naming.names import Names
    from nefkern.segmentation.segmenter import Segmenter

log = logging.getLogger(__name__)

FILE, NAMES = "nefkern.onnx", "names.yaml"

DESCRIPTION = """\
Write a run as one ONNX file: the backbone and ψ, or for runs of --method spectral the backbone, the
patches that the run keeps, Nyström's extension with the pixel graph, and K-means; before them the
resize to the scale of training, after them the up-sampling. No nefkern, PyTorch or timm is needed
to run it:

  session = onnxruntime.InferenceSession("nefkern.onnx")
  image = numpy.asarray(PIL.Image.open("photo.jpg").convert("RGB"))       # [H, W, 3] uint8
  clusters = session.run(["clusters"], {"image": image.transpose(2, 0, 1)[None]})[0]

The input is uint8 [batch, 3, height, width], of any size. Outputs: "clusters" int32 [batch, height,
width]; "classes" uint8, where the run has names.yaml (255: no name); "logits" of the patches. The
file's metadata hold the clusters' colours, and names and colours of classes:

  facts = session.get_modelmeta().custom_metadata_map      # nefkern.colours, nefkern.classes, ...
"""
EXAMPLES = """\
examples:
  python -m nefkern.export runs/voc                             RUN/nefkern.onnx
  python -m nefkern.export runs/voc --out voc.onnx --names names.yaml
  python -m nefkern.export runs/voc --check photo.jpg other.png
                                     run it by onnxruntime, and print how many pixels agree
  python -m nefkern.export runs/voc --size 480 640              for images of one size

The same clusters as those of python -m nefkern.segment, up to rounding: all is in float32, also
what a run of --amp computes in bfloat16; --check then compares with both. Images more than twice as
long as wide, which segment sees in windows, the file sees whole. A backbone that takes some sizes
only (windows of attention, ...) is exported for one size by --size. Needs onnx and onnxscript;
--check needs onnxruntime.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = command_parser("export", DESCRIPTION, EXAMPLES)
    add = result.add_argument
    add_run(result)
    add("--out", type=Path, metavar="FILE", help=f"the file to write [RUN/{FILE}]")
    add(
        "--names",
        type=Path,
        metavar="FILE",
        help=f"names of clusters, for the classes [RUN/{NAMES}, if it is there]",
    )
    add(
        "--size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="only for images of this many pixels [any]",
    )
    add("--check", type=Path, nargs="+", default=[], metavar="IMAGE", help="compare on these")
    return result


def check(arguments: argparse.Namespace) -> None:
    """Raise a UserError that names the first option that cannot be used."""
    if arguments.size and min(arguments.size) < 1:
        raise UserError(f"--size {' '.join(map(str, arguments.size))}: expected at least 1 pixel")
    check_file("--out", arguments.out)


def run_names(arguments: argparse.Namespace, segmenter: Segmenter) -> Names | None:
    """The names that the file gets."""
    from nefkern.naming.names import fingerprint, read_names

    path = arguments.names or arguments.run / NAMES
    if arguments.names is None and not path.exists():
        return None
    names = read_names(path)
    names.require_run(path, segmenter.num_clusters, fingerprint(arguments.run))
    return names


def images(
    files: list[Path], segmenter: Segmenter, size: tuple[int, int] | None
) -> dict[Path, Tensor]:
    """Those of ``--check``, uint8 ``[3, H, W]``: read before the work, not after it."""
    from nefkern.data import read_image

    found = {file: read_image(file) for file in files}
    for file, pixels in found.items():
        segmenter.check_size(pixels, file)
        height, width = pixels.shape[1:]
        if size not in (None, (height, width)):
            raise UserError(
                f"--check {file}: {height} pixels high and {width} wide, expected {size[0]} and "
                f"{size[1]}, as --size has them"
            )
    return found


def compare(
    out: Path, segmenter: Segmenter, exact: Segmenter | None, found: dict[Path, Tensor]
) -> None:
    """Print how many pixels of each image have the same cluster; with ``exact``, the run in
    float32, also how many of that."""
    from nefkern.exporting.checking import Exported, agreement

    exported = Exported(out)
    for file, pixels in found.items():
        clusters = exported(pixels)
        line = f"{agreement(clusters, segmenter(pixels)):.3%} of the pixels have the same cluster"
        if exact is not None:
            line += f"; {agreement(clusters, exact(pixels)):.3%} that of the run in float32"
        print(visible(f"{file}: {line}"), flush=True)


@command
def main(arguments: list[str] | None = None) -> None:
    """Parse, build, run."""
    parsed = parser().parse_args(arguments)
    parsed.out = parsed.out or parsed.run / FILE
    check(parsed)
    log_to_stderr()
    check_environment()
    from nefkern.exporting.onnx_file import export, require_exporter
    from nefkern.segmentation.segmenter import Segmenter

    require_exporter()
    segmenter = Segmenter.load(parsed.run, "cpu")
    size = (parsed.size[0], parsed.size[1]) if parsed.size else None
    compared = images(parsed.check, segmenter, size)
    export(segmenter, parsed.out, run_names(parsed, segmenter), size)
    log.info("%s: %.1f MB", parsed.out, parsed.out.stat().st_size / 1e6)
    if compared:
        exact = Segmenter.load(parsed.run, "cpu", amp=False) if segmenter.options.amp else None
        compare(parsed.out, segmenter, exact, compared)


if __name__ == "__main__":
    sys.exit(main())
